#!/usr/bin/env bash
# All tests, on a fresh machine too:   bash launch/test.sh [pytest arguments]
case ${1:-} in -h | --help) sed -n '2,${/^##*SBATCH/q;/^[^#]/q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac
# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" "${MINIMIND_DS_EXTRAS:-[test]}"

# Some images set it: hundreds of processes would then compile all of the package's modules.
unset PYTHONDONTWRITEBYTECODE
# Ranks of one test share the cores; more threads than cores is several times slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Three workers on two cores: much of starting ranks, and of a cluster, is waiting.
exec python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations 40 "${@:-tests}"
