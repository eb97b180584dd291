"""Full supervised fine-tuning under DeepSpeed: the loss is on the assistant's words only, samples are packed.

    deepspeed launch/sft.py --deepspeed ds_configs/zero2.json
    deepspeed --num_gpus 2 launch/sft.py --deepspeed ds_configs/zero2.json --data_path my.jsonl --preset minimind-3
"""

import pathlib
import sys

# Works from a checkout that was not installed, and whatever the working directory is.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from minimind_ds.config.errors import report_bugs  # noqa: E402
from minimind_ds.training.loop import main  # noqa: E402

if __name__ == "__main__":
    report_bugs()
    sys.exit(main("sft", sys.argv[1:]))
