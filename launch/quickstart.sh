#!/usr/bin/env bash
# From a fresh machine to a model that answers: install, pretrain and fine-tune the bundled sample under DeepSpeed,
# score it on held-out questions, talk to it.   bash launch/quickstart.sh [RUN_FOLDER]
case ${1:-} in -h | --help) sed -n '2,${/^##*SBATCH/q;/^[^#]/q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;; esac
# shellcheck source=launch/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ""

out=${1:-out/quickstart}
# For so small a model a second thread gains a third on a CPU that is idle, and on a busy one it is many times slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say "pretraining on examples/pretrain.jsonl"
deepspeed --log_level warning launch/pretrain.py --config examples/quickstart.yaml --save_dir "$out/pretrain" --epochs 6

say "held-out score before fine-tuning"
python launch/score.py --weight "$out/pretrain" --data_path examples/sft_heldout.jsonl

say "fine-tuning on examples/sft_train.jsonl"
deepspeed --log_level warning launch/sft.py --config examples/quickstart.yaml --save_dir "$out/sft" --from_weight "$out/pretrain" --epochs 5

say "held-out score after fine-tuning"
python launch/score.py --weight "$out/sft" --data_path examples/sft_heldout.jsonl

question="Please say the opposite of hot."
say "one chat turn: $question"
python launch/chat.py --weight "$out/sft" --prompt "$question" --temperature 0

say "done: $out/sft/report.html shows the run; python launch/chat.py --weight $out/sft   talks on"
