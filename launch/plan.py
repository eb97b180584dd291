"""Memory, bytes sent and time of a run at every ZeRO stage, before it starts, and which ds_configs/ file to take.

    python launch/plan.py --preset minimind-3 --ranks 8 --memory 80
    python launch/plan.py --preset minimind-3 --ranks 8 --gpu H200 --batch_size 16 --tokens 4.5e9 --price 3.2
    python launch/plan.py --preset minimind-3-moe --ranks 4 --memory 24 --batch_size 8 --deepspeed my.json --json
    python launch/plan.py --preset debug --ranks 2 --pack_len 1024 --measure      # checks itself against real steps

Exit code 2 for a mistake in flags or files.
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("plan", sys.argv[1:]))
