"""Memory and bytes sent of a run at every ZeRO stage, before it starts, and which ds_configs/ file to take.

    python launch/plan.py --preset minimind-3 --ranks 8 --memory 80
    python launch/plan.py --preset minimind-3-moe --ranks 4 --memory 24 --batch_size 8 --deepspeed my.json --json
    python launch/plan.py --preset debug --ranks 2 --pack_len 1024 --measure      # checks itself against real steps

Exit code 2 for a mistake in flags or files.
"""

import pathlib
import sys

# Works from a checkout that was not installed, and whatever the working directory is.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from minimind_ds.config.errors import report_bugs  # noqa: E402
from minimind_ds.plan.report import main  # noqa: E402

if __name__ == "__main__":
    report_bugs()
    sys.exit(main(sys.argv[1:]))
