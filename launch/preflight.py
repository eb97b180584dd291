"""Before a long run: are all nodes alike, healthy and connected?  A table; exit code 2 names the node that is not.

    srun --nodes=2 --ntasks-per-node=8 python launch/preflight.py --save_dir /shared/runs/sft
    deepspeed launch/preflight.py --save_dir runs/sft

launch/slurm/*.sbatch and launch/multi_node.sh run it by themselves when told --preflight.  Flags of the training that
it does not know are ignored.
"""

import argparse
import os
import pathlib
import sys

# Works from a checkout that was not installed, and whatever the working directory is.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# A node that does not answer is this program's to name; PyTorch would add its C++ stacks.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

from minimind_ds.config.errors import UserError, one_line, report_bugs  # noqa: E402
from minimind_ds.config.spellings import OneLineParser, number, translate  # noqa: E402
from minimind_ds.distributed.world import read_world
from minimind_ds.resilience import preflight  # noqa: E402


def main() -> int:
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_dir", default="out", help="the run folder (default: %(default)s)")
    parser.add_argument("--cache_dir", help="where tokenised data is kept; default: ~/.cache/minimind_ds")
    for name, (value, meaning) in preflight.LIMITS.items():
        parser.add_argument(f"--{name}", type=number, default=value, help=meaning + " (default: %(default)s)")
    try:
        args, _ = parser.parse_known_args(translate(sys.argv[1:])[0])
        world = read_world()
        return preflight.main(world, save_dir=args.save_dir, cache_dir=args.cache_dir,
                              limits={name: getattr(args, name) for name in preflight.LIMITS})
    except UserError as error:
        print(one_line(error), file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    report_bugs()
    sys.exit(main())
