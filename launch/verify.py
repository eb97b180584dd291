"""Check a run before it starts, in about a minute: its data, its labels, its kernels, its DeepSpeed file.

    deepspeed launch/verify.py --deepspeed ds_configs/zero1.json
    deepspeed --num_gpus 2 launch/verify.py --deepspeed my.json --data_path my.jsonl --preset minimind-3
    python launch/verify.py --deepspeed ds_configs/zero1.json --data_path my.jsonl       # one rank
    python launch/verify.py --deepspeed ds_configs/zero1.json --sensitivity     # how small an error each law finds

Exit code 0: every law holds; 1: one does not, and is named; 2: a mistake in flags or files.
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("verify", sys.argv[1:]))
