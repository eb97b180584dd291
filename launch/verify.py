"""Check a run before it starts, in about a minute: its data, its labels, its kernels, its DeepSpeed file.

    deepspeed launch/verify.py --deepspeed ds_configs/zero2.json
    deepspeed --num_gpus 2 launch/verify.py --deepspeed my.json --data_path my.jsonl --preset minimind-3
    python launch/verify.py --deepspeed ds_configs/zero2.json --data_path my.jsonl       # one rank
    python launch/verify.py --deepspeed ds_configs/zero2.json --sensitivity     # how small an error each law finds

Exit code 0: every law holds; 1: one does not, and is named; 2: a mistake in flags or files.
"""

import pathlib
import sys

# Works from a checkout that was not installed, and whatever the working directory is.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from minimind_ds.config.errors import report_bugs  # noqa: E402
from minimind_ds.verify import main  # noqa: E402

if __name__ == "__main__":
    report_bugs()
    sys.exit(main(sys.argv[1:]))
