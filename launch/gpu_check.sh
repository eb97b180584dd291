#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and within 9 minutes:
#
#   bash launch/gpu_check.sh OUT_DIR [--seconds 540] [--wheels DIR]
#
# Do our kernels agree with the reference, training throughput (dense, mixture of experts, MiniMind's padded loop) with
# a profile, cuBLAS at the model's shapes, other tiles of our kernels, each ZeRO stage against PyTorch alone, kernels
# against fp64, leak probes, training curves, kernel timings beside their floors.  OUT_DIR gets results.json, summary.md
# (what to do next comes last), log.txt and a trace, whole after each part.  Exit status: 0, 1 if a result is wrong or
# missing, 2 if nothing could be run.  Takes the python of .venv if there is one, else python3.
# A machine without a network needs what it lacks brought along: DeepSpeed and what that imports, 20 MB at most.
#
#   bash launch/gpu_check.sh --make_wheels DIR [3.12]     where there is a network, for that Python
#   bash launch/gpu_check.sh OUT_DIR --wheels DIR         there
#
# More flags: --parts, --limits (python3 -m minimind_ds.bench.gpu --help).
case ${1:-} in -h | --help) sed -n '2,${/^##*SBATCH/q;/^[^#]/q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac
set -uo pipefail
[ $# -ge 1 ] || { printf 'usage: bash launch/gpu_check.sh OUT_DIR [--wheels DIR]\n' >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
python=python3
[ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python

if [ "$1" = --make_wheels ]; then
    [ $# -ge 2 ] || { printf 'usage: bash launch/gpu_check.sh --make_wheels DIR [3.12]\n' >&2; exit 2; }
    version=${3:-3.12}
    of() { sed -n "s/^$1==\([^;]*\).*/$1==\1/p" "$root/constraints.txt"; }
    mkdir -p "$2" || exit 2
    # DeepSpeed comes as source: no operation is built, so its wheel fits every Python.
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$2" "$(of deepspeed)" "$(of hjson)" || exit 2
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
        --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$2" \
        "$(of pydantic)" "$(of pydantic-core)" "$(of annotated-types)" "$(of typing-inspection)" || exit 2
    du -sh "$2"
    exit
fi

out=$1
mkdir -p "$out" || exit 2
exec > >(tee "$out/log.txt") 2>&1
wheels=
for ((i = 2; i <= $#; i++)); do [ "${!i}" != --wheels ] || { next=$((i + 1)); wheels=${!next:-}; }; done
if [ -n "$wheels" ]; then
    site=$(mktemp -d) || exit 2
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
        "$wheels"/*.whl || exit 2
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
"$python" -m minimind_ds.bench.gpu "$@"
