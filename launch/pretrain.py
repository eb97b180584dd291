"""Pretraining on {"text": ...} lines under DeepSpeed: every token is predicted, texts are packed.

    deepspeed launch/pretrain.py --deepspeed ds_configs/zero1.json
    deepspeed launch/pretrain.py --deepspeed ds_configs/zero1.json --data_path my.jsonl --preset minimind-3
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("pretrain", sys.argv[1:]))
