"""Before a long run: are all nodes alike, healthy and connected?  A table; exit code 2 names the node that is not.

    srun --nodes=2 --ntasks-per-node=8 python launch/preflight.py --save_dir /shared/runs/sft
    deepspeed launch/preflight.py --save_dir runs/sft

launch/slurm/*.sbatch and launch/multi_node.sh run it by themselves when told --preflight.  Flags of the training that
it does not know are ignored.
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("preflight", sys.argv[1:]))
