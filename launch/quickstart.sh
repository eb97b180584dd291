#!/usr/bin/env bash
# From a fresh machine to a model that answers: install, pretrain and fine-tune the bundled sample under DeepSpeed,
# score it on held-out questions, talk to it.   bash launch/quickstart.sh [RUN_FOLDER]
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ""

out=${1:-out/quickstart}
json=ds_configs/zero2.json
common=(--preset debug --deepspeed "$json" --max_seq_len 128 --pack_len 1024 --save_interval 0 --log_interval 20)

say "pretraining on examples/pretrain.jsonl"
deepspeed launch/pretrain.py "${common[@]}" --save_dir "$out/pretrain" --epochs 2 --learning_rate 2e-3

say "held-out score before fine-tuning"
python launch/score.py --weight "$out/pretrain" --data_path examples/sft_heldout.jsonl

say "fine-tuning on examples/sft_train.jsonl"
deepspeed launch/sft.py "${common[@]}" --save_dir "$out/sft" --from_weight "$out/pretrain" --epochs 3 \
    --learning_rate 2e-3

say "held-out score after fine-tuning"
python launch/score.py --weight "$out/sft" --data_path examples/sft_heldout.jsonl

say "one chat turn"
python launch/chat.py --weight "$out/sft" --prompt "What is 3 + 4?" --temperature 0

say "done: python launch/chat.py --weight $out/sft   talks on"
