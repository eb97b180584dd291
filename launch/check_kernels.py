"""Check and time the kernels on this machine; JSON files in OUT_DIR, and one JSON document printed last.

    python launch/check_kernels.py OUT_DIR
    python launch/check_kernels.py OUT_DIR --parts timings --groups attention
    python launch/check_kernels.py --cpu_ratios OUT.json

Without a GPU the same checks run at tiny sizes in Triton's interpreter.
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("check_kernels", sys.argv[1:]))
