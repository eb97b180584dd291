#!/usr/bin/env bash
# Pretraining, then fine-tuning of its weights, then an export: three jobs, each waiting for the one before.
#   PRETRAIN="--data_path /shared/pretrain.jsonl" SFT="--data_path /shared/sft.jsonl" \
#       bash launch/slurm/chain.sh /shared/runs/mine --partition=gpu --nodes=2
# Writes pretrain, sft and hf below the folder.  What follows the folder goes to sbatch, for all three; PRETRAIN, SFT
# and FLAGS hold flags of pretrain.py, of sft.py and of both, separated by blanks.  The same command again goes on after a
# failure: what is finished ends at once.
case ${1:-} in -h | --help) sed -n '2,${/^##*SBATCH/q;/^[^#]/q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac
set -euo pipefail
MINIMIND_DS_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export MINIMIND_DS_HOME

if [ -z "${1:-}" ] || [[ $1 = -* ]]; then
    echo "error: usage: bash launch/slurm/chain.sh FOLDER [OPTION OF SBATCH...]" >&2
    exit 2
fi
folder=$(realpath -m -- "$1")
shift

submit() { # FILE, the job to wait for or nothing, flags
    local after=()
    # Without kill-on-invalid-dep a job waits for ever for one that has failed.
    if [ -n "$2" ]; then after=("--dependency=afterok:$2" --kill-on-invalid-dep=yes); fi
    # A federation's answer is JOB;CLUSTER.
    sbatch --parsable "${options[@]}" "${after[@]}" "$MINIMIND_DS_HOME/launch/slurm/$1.sbatch" "${@:3}" | cut -d';' -f1
}

options=("$@")
# Words that no shell takes for patterns of files: a share of data may be *.jsonl.
read -r -d '' -a for_pretrain <<<"${FLAGS:-} ${PRETRAIN:-}" || :
read -r -d '' -a for_sft <<<"${FLAGS:-} ${SFT:-}" || :
pretrain=$(submit pretrain "" "${for_pretrain[@]}" --save_dir "$folder/pretrain")
sft=$(submit sft "$pretrain" "${for_sft[@]}" --from_weight "$folder/pretrain" --save_dir "$folder/sft")
options+=(--nodes=1 --ntasks-per-node=1)
export=$(submit export "$sft" --weight "$folder/sft" --to hf --out "$folder/hf" --overwrite)
echo "pretraining $pretrain, fine-tuning $sft, export $export into $folder/hf"
