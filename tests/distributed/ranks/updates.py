"""The update with deepspeed_compat's workarounds and DeepSpeed's own, for tests/distributed/test_compat.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/updates.py OUT_DIR

Rank 0 writes OUT_DIR/updates.json: per case, whether all weights are equal after a few steps, how far apart they are
as a share of how far they moved, both lists of gradient norms, and whether the workaround was in place; and what fp16
does with an overflow.
"""

import contextlib
import json
import pathlib
import sys

import torch
import torch.distributed as dist

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from minimind_ds.distributed import deepspeed_compat, engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.training import prepare  # noqa: E402
from minimind_ds.training.build import build_engine  # noqa: E402
from minimind_ds.training.live import LiveRun  # noqa: E402
from minimind_ds.training.step import Position, fetch, train_step  # noqa: E402
from tests.distributed.ranks.layouts import make_run  # noqa: E402

STEPS = 3
# Without a type of its own DeepSpeed's FusedAdam updates (in C++ here), flat at stage 0.
FUSED = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
EXPERTS = {"expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe"}}


def cases():
    """(name, model, stage, dtype, DeepSpeed keys, clipping); all gradients' norms are well above 0.1."""
    yield "bf16 0, no clipping", "dense", 0, "bf16", {}, "0"
    for stage in range(4):
        yield f"bf16 {stage}", "dense", stage, "bf16", {}, "0.1"
    for stage in (0, 1):
        yield f"fp16 {stage}", "dense", stage, "fp16", {}, "0.1"
    for stage in (1, 3):
        yield f"experts {stage}", "moe", stage, "bf16", EXPERTS, "0.1"
    yield "fp32 1", "dense", 1, "fp32", {}, "0.1"
    for dtype in ("bf16", "fp16"):
        yield f"fused {dtype}", "dense", 0, dtype, FUSED, "0.1"


@contextlib.contextmanager
def deepspeeds_own():
    kept = deepspeed_compat.take_norm_once, deepspeed_compat.update_together
    deepspeed_compat.take_norm_once = deepspeed_compat.update_together = lambda engine, take: False
    try:
        yield
    finally:
        deepspeed_compat.take_norm_once, deepspeed_compat.update_together = kept


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on a CPU, where torch has it: slow, and good enough to see an update."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = prepare.fp16_runs = lambda: True


def trained(prepared) -> tuple[dict, dict, list, bool]:
    """-> weights before and after (rank 0), norms, whether the workaround was in place."""
    live, plan = LiveRun(engine=build_engine(prepared)), prepared.first_plan
    start = engine.full_weights(live.engine, prepared.stage)
    engine.set_lr(live.engine, prepared.run.learning_rate)
    batches = fetch(prepared, 0, plan, range(STEPS))
    lines = [train_step(prepared, live, plan, Position(i + 1, 0, i), batches).line() for i in range(STEPS)]
    weights = engine.full_weights(live.engine, prepared.stage)
    return start, weights, [line["grad_norm"] for line in lines], live.engine.takes_norms


def distance(ones: dict, others: dict) -> float:
    """The Euclidean distance of two lists of weights."""
    return sum(float((ones[name] - others[name]).square().sum()) for name in ones) ** 0.5


def overflow(prepared) -> list[dict]:
    """A step with fp16 whose gradients overflow on rank 1 alone, and the next: what each said and did."""
    live, plan = LiveRun(engine=build_engine(prepared)), prepared.first_plan
    engine.set_lr(live.engine, prepared.run.learning_rate)
    batches, found = fetch(prepared, 0, plan, range(2)), []
    weight = live.engine.module.model.layers[0].mlp.down_proj.weight
    hook = weight.register_hook(lambda grad: grad * float("inf")) if prepared.world.rank == 1 else None
    for i in range(2):
        before = engine.full_weights(live.engine, prepared.stage)
        line = train_step(prepared, live, plan, Position(i + 1, 0, i), batches).line()
        after = engine.full_weights(live.engine, prepared.stage)
        found.append({"skipped": line.get("skipped", False), "loss": line["loss"], "norm": line["grad_norm"],
                      "moved": any(not torch.equal(before[name], after[name]) for name in before)})
        if hook:
            hook.remove()
    return found


def main(out: pathlib.Path) -> None:
    world = read_world()
    engine.start(world)
    allow_fp16()
    found = {}
    for name, model, stage, dtype, keys, clip in cases():
        # A loss scale that the first steps do not halve.
        scale = {"fp16": {"enabled": True, "initial_scale_power": 8}} if dtype == "fp16" else {}
        prepared = make_run(world, out, model, stage, 2, ["--grad_clip", clip], dtype, keys={**keys, **scale})
        start, ours, norms, taken = trained(prepared)
        with deepspeeds_own():
            _, theirs, their_norms, _ = trained(prepared)
        found[name] = {"equal": all(torch.equal(ours[n], theirs[n]) for n in ours), "norms": norms,
                       "apart": distance(ours, theirs) / (distance(theirs, start) or 1.0),
                       "their_norms": their_norms, "taken": taken}
    for stage in range(4):
        found[f"overflow {stage}"] = overflow(make_run(world, out, "dense", stage, 2, [], "fp16"))
    if world.rank == 0:
        (out / "updates.json").write_text(json.dumps(found))
    dist.barrier()
    engine.stop()


if __name__ == "__main__":
    main(pathlib.Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
