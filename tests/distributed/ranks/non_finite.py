"""A gradient that is not finite must not reach the weights, for tests/training/test_training.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/non_finite.py OUT_DIR some|all

At every stage, in fp32 and bf16 (some: in one of them): one good step, then one whose gradients (not its loss) are NaN
on rank 1 alone.  The trainer's own step must raise on both ranks and leave the weights as they were, bit for bit.  The
same with one element of one gradient, NaN and infinite (some: one of them), where parameters are checked or updated in
other ways.  Then the same with losses that are NaN or a spike and are to be skipped.
"""

import itertools
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


def attempt(prepared, spoil_gradients) -> dict:
    """A good step and a bad one -> what was raised, and which of the two changed weights or optimizer state."""
    live = LiveRun(engine=build_engine(prepared))
    ds_engine, plan = live.engine, prepared.first_plan
    batches = fetch(prepared, 0, plan, range(2))
    at_first = engine.full_weights(ds_engine, prepared.stage)
    train_step(prepared, live, plan, Position(1, 0, 0), batches)
    before, mine = engine.full_weights(ds_engine, prepared.stage), own_state(ds_engine)
    if prepared.world.rank == 1:
        spoil_gradients(ds_engine.module)
    said = "nothing"
    try:
        train_step(prepared, live, plan, Position(2, 0, 1), batches)
    except NonFinite as error:
        said = str(error)
    after = engine.full_weights(ds_engine, prepared.stage)
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in ((at_first, before), (before, after))]
    now = own_state(ds_engine)
    return {"said": said, "good_moved": moved[0], "bad_moved": moved[1], "state": len(mine),
            "state_moved": len(now) != len(mine) or any(not torch.equal(a, b) for a, b in zip(mine, now))}


def own_state(ds_engine) -> list[torch.Tensor]:
    """Copies of what this rank holds: parameters or its part of them, masters, moments and counts."""
    held = [getattr(p, "ds_tensor", p) for p in ds_engine.module.parameters()]
    for master, state in ds_engine.basic_optimizer.state.items():
        held += [master, *(x for x in state.values() if torch.is_tensor(x))]
    return [x.detach().clone() for x in held]


def spoil_all(module) -> None:
    module.model.norm.register_forward_hook(poison)


def spoil_one(name: str, value: str):
    """One element of one parameter's gradient."""
    def spoil_gradient(grad):
        grad = grad.clone()
        grad.view(-1)[1] = float(value)
        return grad

    return lambda module: dict(module.named_parameters())[name].register_hook(spoil_gradient)


LAST, EXPERTS = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.experts.down_proj"
OFFLOAD = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
SHARED_OUT = {"expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe"}}


def cases():
    """(name, model, stage, dtype, DeepSpeed keys, parameter): in each, one element is spoilt."""
    for stage in range(4):
        yield f"stage {stage}", "dense", stage, "bf16", {}, LAST
        if stage:
            yield f"experts {stage}", "moe", stage, "bf16", SHARED_OUT, EXPERTS
            yield f"before experts {stage}", "moe", stage, "bf16", SHARED_OUT, "model.norm.weight"
        if stage > 1:
            zero = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
            yield f"offload {stage}", "dense", stage, "bf16", {**OFFLOAD, **zero}, LAST
    for check in (True, False):
        bf16 = {"bf16": {"enabled": True, "check_grad_overflow": check}}
        yield f"check_grad_overflow {check}", "dense", 2, "bf16", bf16, LAST
    yield "fused", "dense", 0, "bf16", OFFLOAD, LAST
    yield "fp32 0", "dense", 0, "fp32", {}, LAST


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


def main(out: pathlib.Path, which: str) -> None:
    world = read_world()
    engine.start(world)
    results, skips = {}, {}
    values, dtypes = ("nan", "inf", "-inf"), ("fp32", "bf16")
    for i, (name, model, stage, dtype, keys, spoilt) in enumerate(cases()):
        for value in values if which == "all" else (values[i % 3],):
            prepared = make_run(world, out, model, stage, 2, [], dtype, keys=keys)
            results[f"{name} {value}"] = attempt(prepared, spoil_one(spoilt, value))
    for stage, dtype in itertools.product(range(4), dtypes):
        if which != "all" and dtype != dtypes[stage % 2]:
            continue
        prepared = make_run(world, out, "dense", stage, 2, [], dtype)
        results[f"{dtype} {stage}"] = attempt(prepared, spoil_all)
        prepared = make_run(world, out, "dense", stage, 2, ["--on_non_finite", "skip", "--on_spike", "skip"], dtype)
        skips[f"{dtype} {stage}"] = skipped(prepared)
    (out / f"non_finite_{world.rank}.json").write_text(json.dumps(results))
    (out / f"skipped_{world.rank}.json").write_text(json.dumps(skips))
    engine.stop()


if __name__ == "__main__":
    folder, which = (a for a in sys.argv[1:] if not a.startswith("--local_rank"))
    main(pathlib.Path(folder), which)
