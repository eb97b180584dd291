# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with the project installed, made once.
# MINIMIND_DS_PYTHON chooses the Python it is made with.
case ${1:-} in -h | --help) sed -n '1,${/^##*SBATCH/q;/^[^#]/q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

python=${MINIMIND_DS_PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python: install Python 3.10 to 3.14"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' ||
    fail "$("$python" -V) is not supported: set MINIMIND_DS_PYTHON to a Python 3.10 to 3.14"
command -v g++ >/dev/null || fail "no g++: install a C++ compiler (Debian: apt-get install g++)"

extra=${1:-}
# The stamp holds what was installed: other ranges, other exact versions or another set of extras install again.
stamp="$(cat setup.py constraints.txt | cksum) $extra"
if [ ! -e .venv/installed ] || ! grep -qxF "$stamp" .venv/installed; then
    say "installing into .venv (once, some minutes: PyTorch is large)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extra"
    printf '%s\n' "$stamp" >>.venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
export VIRTUAL_ENV="$PWD/.venv"
