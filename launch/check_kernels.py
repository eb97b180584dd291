"""Check and time the kernels on this machine; JSON files in OUT_DIR, and one JSON document printed last.

    python launch/check_kernels.py OUT_DIR
    python launch/check_kernels.py OUT_DIR --parts timings --groups attention
    python launch/check_kernels.py --cpu_ratios OUT.json

Without a GPU the same checks run at tiny sizes in Triton's interpreter.
"""

import pathlib
import sys

# Works from a checkout that was not installed, and whatever the working directory is.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from minimind_ds.bench import kernels  # noqa: E402
from minimind_ds.config.errors import report_bugs  # noqa: E402

if __name__ == "__main__":
    report_bugs()
    sys.exit(kernels.main(sys.argv[1:]))
