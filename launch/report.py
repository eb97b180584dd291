"""One HTML file of a run: curves, data, packed rows, memory, restarts, settings; several runs beside each other.

    python launch/report.py out/sft
    python launch/report.py out/sft out/lora --out compare.html

The file needs no network and opens from the disk.  A training writes report.html into its run folder at its end.
Exit code 2 for a folder that holds no run.
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("report", sys.argv[1:]))
