"""A gradient that is not finite must not reach the weights, for tests/training/test_training.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/non_finite.py OUT_DIR

At every stage, in fp32 and bf16: one good step, then one whose gradients (not its loss) are NaN on rank 1 alone.  The
trainer's own step must raise on both ranks and leave the weights as they were, bit for bit.  Then the same with
losses that are NaN or a spike and are to be skipped.
"""

import json
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.engine import NonFinite  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.training.build import build_engine  # noqa: E402
from minimind_ds.training.live import LiveRun  # noqa: E402
from minimind_ds.training.spikes import SpikeDetector  # noqa: E402
from minimind_ds.training.step import Position, fetch, train_step  # noqa: E402
from tests.distributed.ranks.layouts import make_run  # noqa: E402


def poison(module, inputs, output):
    output.register_hook(lambda grad: grad * float("nan"))


def attempt(prepared) -> tuple[str, bool, bool]:
    """-> (what was raised, whether the good step moved the weights, whether the bad one did)."""
    live = LiveRun(engine=build_engine(prepared))
    ds_engine, plan = live.engine, prepared.first_plan
    batches = fetch(prepared, 0, plan, range(2))
    at_first = engine.full_weights(ds_engine, prepared.stage)
    train_step(prepared, live, plan, Position(1, 0, 0), batches)
    before = engine.full_weights(ds_engine, prepared.stage)
    if prepared.world.rank == 1:
        ds_engine.module.model.norm.register_forward_hook(poison)
    said = "nothing"
    try:
        train_step(prepared, live, plan, Position(2, 0, 1), batches)
    except NonFinite as error:
        said = str(error)
    after = engine.full_weights(ds_engine, prepared.stage)
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in ((at_first, before), (before, after))]
    return said, *moved


def spoil(module, inputs, output):
    return output * float("nan")


def skipped(prepared) -> dict:
    """A good step, one whose loss is NaN on rank 1 alone, one whose loss is a spike, a good one; both are skipped."""
    live, plan = LiveRun(engine=build_engine(prepared)), prepared.first_plan
    ds_engine = live.engine
    batches = fetch(prepared, 0, plan, range(4))
    found = {"lines": [], "moved": [], "updates": []}
    for step in range(4):
        before = engine.full_weights(ds_engine, prepared.stage)
        hook = None
        if step == 1 and prepared.world.rank == 1:
            hook = ds_engine.module.model.norm.register_forward_hook(spoil)
        live.spikes = SpikeDetector([0.1 + 0.001 * (i % 3) for i in range(40)] if step == 2 else [])
        line = train_step(prepared, live, plan, Position(step + 1, 0, step), batches).line()
        if hook:
            hook.remove()
        after = engine.full_weights(ds_engine, prepared.stage)
        counts = [int(state["step"]) for state in ds_engine.basic_optimizer.state.values() if "step" in state]
        found["lines"].append({key: line.get(key) for key in ("loss", "skipped", "note")})
        found["moved"].append(any(not torch.equal(before[name], after[name]) for name in before))
        found["updates"].append(max(counts))
    return found


def main(out: pathlib.Path) -> None:
    world = read_world()
    engine.start(world)
    results, skips = {}, {}
    for dtype in ("fp32", "bf16"):
        for stage in range(4):
            prepared = make_run(world, out, "dense", stage, 2, [], dtype)
            results[f"{dtype} {stage}"] = attempt(prepared)
            prepared = make_run(world, out, "dense", stage, 2, ["--on_non_finite", "skip", "--on_spike", "skip"],
                                dtype)
            skips[f"{dtype} {stage}"] = skipped(prepared)
    (out / f"non_finite_{world.rank}.json").write_text(json.dumps(results))
    (out / f"skipped_{world.rank}.json").write_text(json.dumps(skips))
    engine.stop()


if __name__ == "__main__":
    main(pathlib.Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
