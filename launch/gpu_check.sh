#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and under 10 minutes on an H200:
#
#   bash launch/gpu_check.sh OUT_DIR
#
# Kernels against the reference, leak probes, training curves, kernel timings beside their floors and beside others'
# kernels; training throughput against the padded loop, and of each ZeRO stage against PyTorch alone: JSON files in
# OUT_DIR, one JSON document printed last.  The exit status is 1 if anything is wrong or missing.  Runs on the python
# of the PATH where that has torch and triton, else in .venv.
# Without a GPU: the same at tiny sizes, kernels in Triton's interpreter.
#   GPU_CHECK_DATA  conversations for the throughput; default: made from the bundled sample, about 300 tokens each
#   GPU_CHECK_FLAGS more flags for launch/check_kernels.py, for example "--no_pytest --without compiled"
case ${1:-} in -h | --help) sed -n '2,${/^##*SBATCH/q;/^[^#]/q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac
set -uo pipefail
[ $# -eq 1 ] || { printf 'usage: bash launch/gpu_check.sh OUT_DIR\n' >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

printf '== looking for torch and triton in %s\n' "$(command -v python)"
if ! python -c 'import torch, triton' 2>/dev/null; then
    source launch/setup_env.sh "[test]"
    set +e
fi
missing=$(python - <<'PY'
import importlib.util

names = {"deepspeed": "deepspeed", "sentencepiece": "sentencepiece", "tokenizers": "tokenizers", "yaml": "pyyaml",
         "safetensors": "safetensors", "transformers": "transformers", "numpy": "numpy", "tqdm": "tqdm",
         "pytest": "pytest"}
print(*(package for module, package in names.items() if importlib.util.find_spec(module) is None))
PY
) || exit 2
[ -z "$missing" ] || { printf 'error: %s lacks %s: pip install %s\n' "$(command -v python)" "$missing" "$missing" >&2
                       exit 2; }

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    sizes="--rows 4096x8 --padded_rows 64 --warm_up 3 --steps 10"
    dense=minimind-3 stretch=1
else
    sizes="--rows 768 --padded_rows 1 --warm_up 0 --steps 1"
    dense=debug stretch=5
fi

status=0
step() { printf '\n== %s (%s s since the start)\n' "$*" "$SECONDS"; }
run() { timeout --kill-after=5 $((stretch * $1)) "${@:2}" || { printf '== failed (%s): %s\n' "$?" "${*:2}"; status=1; }; }
rm -f "$out"/{correctness,curve,timings,throughput,throughput_moe,throughput_stages,summary}.json

step "kernels: right, how fast, the same training curve"
# shellcheck disable=SC2086
run 400 python launch/check_kernels.py "$out" ${GPU_CHECK_FLAGS:-}

step "training throughput"
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
data=${GPU_CHECK_DATA:-$work/conversations.jsonl}
[ -n "${GPU_CHECK_DATA:-}" ] || run 20 python -m minimind_ds.bench.kernels.long_data "$data"
# The one place where throughput is measured.
measure() { # SECONDS NAME PRESET flags: launch/benchmark.py's, into NAME.json
    # shellcheck disable=SC2086
    run "$1" python launch/benchmark.py "${@:4}" --preset "$3" --data_path "$data" --save_dir "$work/run" \
        --cache_dir "$work/cache" --out "$out/$2.json" $sizes
}
measure 50 throughput "$dense" --compare padded --dtypes bf16
measure 60 throughput_moe "$dense-moe" --compare padded --dtypes bf16
measure 70 throughput_stages "$dense" --compare plain --dtype bf16

step "summary"
files=correctness,curve,timings,throughput,throughput_moe,throughput_stages
python launch/check_kernels.py "$out" --summary $files || status=1
exit $status
