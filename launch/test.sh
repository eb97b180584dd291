#!/usr/bin/env bash
# All tests, on a fresh machine too:   bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" "[test]"

# Ranks of one test share the cores; more threads than cores is several times slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Two workers: most tests use one core, and much of starting ranks is waiting.
exec python -m pytest -q -n 2 --dist loadfile "${@:-tests}"
