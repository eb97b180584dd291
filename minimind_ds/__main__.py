"""python -m minimind_ds is minimind-ds, where that is not on the PATH."""

import sys

from minimind_ds.programs import command

if __name__ == "__main__":
    sys.exit(command())
