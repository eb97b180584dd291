"""Plans against counted tensors in real steps, for tests/plan/test_planner.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/plan.py OUT_DIR CASES

CASES is a JSON list of {name, flags, model}; `model` are fields of the debug preset.  Every rank writes
OUT_DIR/rank<r>.json: {name: what plan_check.measure gives}.
"""

import json
import pathlib
import sys

import torch
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.plan import measure  # noqa: E402
from minimind_ds.training.prepare import prepare  # noqa: E402


def main(out: pathlib.Path, cases: list[dict]) -> None:
    world = read_world()
    engine.start(world)
    torch.manual_seed(0)
    found = {}
    for case in cases:
        yaml = out / f"run_{world.rank}.yaml"
        yaml.write_text("preset: debug\nmodel: " + json.dumps(case["model"]), encoding="utf-8")
        prepared = prepare("sft", ["--config", str(yaml), "--save_dir", str(out / "run"), "--cache_dir",
                              str(out / "cache"), "--max_seq_len", "128", *case["flags"]], world)
        found[case["name"]] = measure.measure(prepared)
    measure.write(out / f"rank{world.rank}.json", found)
    dist.barrier()
    engine.stop()


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(pathlib.Path(args[0]), json.loads(args[1]))
