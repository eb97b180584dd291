"""Real steps with optimizers and settings of users' DeepSpeed files, for tests/distributed/test_configs.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/configs.py OUT_DIR curves:quick values:16 files
    deepspeed --num_gpus 1 tests/distributed/ranks/configs.py OUT_DIR values:500

curves: of all optimizers and settings at every stage; quick ones without stage 1, which is stage 2's code, and
without what DeepSpeed compiles in C++.  values: what the optimizer holds with random files and flags.
files: those of OUT_DIR/*.json train.  Rank 0 writes OUT_DIR/found/<mode>.json.
"""

import dataclasses
import gc
import json
import pathlib
import random
import sys

import torch
import torch.distributed as dist
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds import checkpoint  # noqa: E402
from minimind_ds.config.deepspeed_json import read_json, resolve  # noqa: E402
from minimind_ds.config.errors import UserError  # noqa: E402
from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.paths import DS_CONFIGS  # noqa: E402
from minimind_ds.training.build import build_engine  # noqa: E402
from minimind_ds.training.live import LiveRun  # noqa: E402
from minimind_ds.training.lr_schedule import learning_rate, progress  # noqa: E402
from minimind_ds.training.prepare import PreparedRun  # noqa: E402
from minimind_ds.training.resume import manifest_facts  # noqa: E402
from minimind_ds.training.step import Position, fetch, train_step  # noqa: E402
from tests.config.try_configs import prepared_with  # noqa: E402
from tests.distributed.ranks.layouts import make_run  # noqa: E402

STEPS = 3
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
# name: (optimizer block, or None for the run's own; further top-level keys; keys of the ZeRO block; flags)
COLUMNS = {
    "AdamW": ({"type": "AdamW", "params": {}}, {}, {}, {}),
    "AdamW of torch": ({"type": "AdamW", "params": {"torch_adam": True}}, {}, {}, {}),
    "Adam with L2": ({"type": "Adam", "params": {"adam_w_mode": False}}, {}, {}, {}),
    "SGD": ({"type": "SGD", "params": {"momentum": 0.9}}, {}, {}, {}),
    "Adagrad": ({"type": "Adagrad", "params": {}}, {}, {}, {"save_interval": 0}),
    "NAdam": ({"type": "NAdam", "params": {}}, {}, {}, {}),
    "Lion on the CPU": ({"type": "Lion", "params": {}}, {}, {"offload_optimizer": {"device": "cpu"}}, {}),
    "AdamW on the CPU": ({"type": "AdamW", "params": {}}, {}, {"offload_optimizer": {"device": "cpu"}}, {}),
    "Muon": ({"type": "Muon", "params": {"muon_lr": 0.02}}, {}, {"reduce_scatter": False},
             {"grad_clip": 0.0}),
    "Muon, clipped": ({"type": "Muon", "params": {}}, {}, {}, {}),
    "Lamb": ({"type": "Lamb", "params": {}}, {}, {}, {}),
    "prescaled": (None, {"prescale_gradients": True}, {"reduce_scatter": False}, {}),
    "predivided": (None, {"gradient_predivide_factor": 4.0}, {"reduce_scatter": False}, {}),
    "predivided by the ranks": (None, {"gradient_predivide_factor": 2.0}, {"reduce_scatter": False}, {}),
    "prescaled, scattered": (None, {"prescale_gradients": True}, {}, {}),
    "not contiguous": (None, {}, {"contiguous_gradients": False}, {}),
    "round robin": (None, {}, {"round_robin_gradients": True, "overlap_comm": True}, {}),
    "no sub-groups": (None, {}, {"sub_group_size": 0}, {}),
    "summed": (None, {"gradient_allreduce_op": "sum"}, {}, {}),
}
CONTROL = (None, {}, {}, {})
COMPILED = ("Adagrad", "Lion on the CPU")
# Columns that are resumed, and at which stages.
RESUMED = {"SGD": (0, 1, 2, 3), "Adagrad": (0, 1, 2), "NAdam": (0, 1, 2, 3), "Lion on the CPU": (1, 2, 3),
           "Muon": (0, 1, 2, 3), "round robin": (1, 2), "no sub-groups": (3,)}


def curve(base: PreparedRun, stage: int, name: str, column: tuple, out: pathlib.Path) -> dict:
    """Losses and norms of some steps at a stage, or what prepare() says against it; the data are the base's.

    Where the column is resumed, there is a checkpoint before the last step, and a new engine takes that step, too.
    """
    optimizer, top, zero, flags = column
    raw = {**read_json(str(DS_CONFIGS / f"zero{stage}.json")), **top, "zero_optimization": {"stage": stage, **zero},
           **({"optimizer": optimizer} if optimizer else {})}
    run = base.run.replace(**flags, given={**base.run.given, **{name: f"--{name}" for name in flags}})
    try:
        ds, run = resolve(raw, run, base.model_config, ranks=base.data_parallel_size, total_steps=base.total_steps)
    except UserError as error:
        return {"refused": str(error)}
    prepared, live = dataclasses.replace(base, ds=ds, run=run), LiveRun()
    if stage not in RESUMED.get(name, ()):
        return trained(prepared, live, range(1, STEPS + 1))
    case = trained(prepared, live, range(1, STEPS))
    live.pending_save = checkpoint.save(live.engine, out, facts=manifest_facts(prepared, STEPS - 1, 0, 0), keep=1)
    live.finish_save()
    last = [ended(prepared, live)]
    live = LiveRun(engine=build_engine(prepared))
    checkpoint.load(live.engine, checkpoint.folder_of(out) / checkpoint.name_of(STEPS - 1))
    last.append(ended(prepared, live))
    return {**case, "lines": [*case["lines"], *last[0]["lines"]], "ended": last}


def ended(prepared: PreparedRun, live: LiveRun) -> dict:
    """The last step, and the weights after it."""
    case = trained(prepared, live, range(STEPS, STEPS + 1))
    weights = engine.full_weights(live.engine, prepared.stage)
    return {**case, "weights": {name: t.flatten().view(torch.int32).sum().item() for name, t in weights.items()}}


def trained(prepared: PreparedRun, live: LiveRun, steps: range) -> dict:
    """Some steps of a run, at the rates that the trainer's loop gives them; builds the engine if there is none."""
    live.engine = live.engine or build_engine(prepared)
    lines, run, rate, step = [], prepared.run, None, 0
    for epoch in range(run.epochs):
        plan = prepared.plan(epoch)
        wanted = range(max(0, steps.start - step - 1), min(len(plan), steps.stop - step - 1))
        batches = fetch(prepared, epoch, plan, wanted)
        for epoch_step in wanted:
            at = Position(step + epoch_step + 1, epoch, epoch_step)
            if "scheduler" not in prepared.ds:
                rate = learning_rate(progress(run, at.step, epoch, epoch_step, len(plan)), run)
                engine.set_lr(live.engine, rate)
            lines.append(train_step(prepared, live, plan, at, batches).line())
        step += len(plan)
        if step >= steps.stop - 1:
            break
    held = [{key: value for key, value in group.items() if key != "params"}
            for group in live.engine.optimizer.param_groups]
    return {"lines": lines, "held": held, "rate": rate}


def curves(world, out: pathlib.Path, which: str = "all") -> dict:
    quick = which == "quick"
    base = make_run(world, out, "dense", 0, 2, ["--max_seq_len", "64", "--pack_len", "64"], fields=SMALL)
    # DeepSpeed collects garbage for each engine at stage 3; what is loaded by now is none.
    gc.freeze()
    return {name: {stage: curve(base, stage, name, column, out) for stage in ((0, 2, 3) if quick else range(4))}
            for name, column in {"control": CONTROL, **COLUMNS}.items() if not (quick and name in COMPILED)}


def files(world, out: pathlib.Path) -> dict:
    found = {}
    for path in sorted(out.parent.glob("*.json")):
        prepared = prepared_with(path, out, ranks=world.size, rank=world.rank, dtype=None)
        found[path.stem] = {**trained(prepared, LiveRun(), range(1, 3)), "notes": prepared.notes}
    return found


def draw(rng: random.Random) -> tuple[dict, list[str]]:
    """A random DeepSpeed file and flags beside it; some contradict each other."""
    def rarely(chance: float = 0.4) -> bool:
        return rng.random() < chance

    values = {"lr": (1e-3, 2e-3), "weight_decay": (0.0, 0.3), "betas": ([0.9, 0.999], [0.8, 0.95]),
              "eps": (1e-8, 1e-6)}
    kind = rng.choice(["AdamW", "Adam", "SGD", "Adagrad", "RMSprop", "NAdam", "Muon", None, None])
    without = {"SGD": ("betas", "eps"), "Adagrad": ("betas",), "RMSprop": ("betas",)}.get(kind, ())
    params = {key: rng.choice(["auto", *choices]) for key, choices in values.items()
              if key not in without and rarely()}
    if kind in ("AdamW", "Adam") and rarely():
        params["torch_adam"] = True
    if kind == "Muon" and rarely():
        params["muon_lr"] = 0.02
    config = {"zero_optimization": {"stage": rng.choice([0, 0, 1, 2, 3])}}
    if kind:
        config["optimizer"] = {"type": kind, "params": params}
    schedule = rng.choice([None, None, "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle"])
    if schedule == "OneCycle":
        config["scheduler"] = {"type": schedule, "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}
    elif schedule:
        config["scheduler"] = {"type": schedule, "params": {"warmup_num_steps": 3} if rarely() else {}}
    if rarely():
        config["gradient_clipping"] = rng.choice([0.0, 0.5, "auto"])
    flags = []
    for name, choices in {"learning_rate": (1e-3, 4e-3), "weight_decay": (0.0, 0.2), "adam_beta1": (0.7,),
                          "adam_beta2": (0.95,), "adam_epsilon": (1e-6,), "grad_clip": (0.0, 0.5),
                          "warmup_ratio": (0.0, 0.2)}.items():
        if rarely(0.25):
            flags += [f"--{name}", str(rng.choice(choices))]
    return config, flags


def values(world, out: pathlib.Path, count: str) -> list[dict]:
    """Of random combinations: what run.yaml says, what the optimizer holds after a step, and the step's own rate."""
    rng, found = random.Random(0), []
    small = out / f"small_{world.rank}.yaml"
    small.write_text(f"model: {json.dumps(SMALL)}", encoding="utf-8")
    for _ in range(int(count)):
        config, flags = draw(rng)
        path = out / f"drawn_{world.rank}.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        case = {"config": config, "flags": flags}
        try:
            prepared = prepared_with(path, out, "--config", str(small), *flags, ranks=world.size, rank=world.rank)
        except UserError as error:
            found.append({**case, "refused": str(error)})
            continue
        done = trained(prepared, LiveRun(), range(1, 2))
        found.append({**case, **done, "run": yaml.safe_load(prepared.run.to_yaml()), "resolved": prepared.ds})
    return found


def main(out: pathlib.Path, modes: list[str]) -> None:
    world = read_world()
    engine.start(world)
    from deepspeed.runtime import compiler

    # Muon's kernels take minutes to compile on a CPU, and the compiler seconds to load.
    compiler.compile = lambda: lambda function: function
    out = out / "found"
    out.mkdir(exist_ok=True)
    for mode in modes:
        name, _, count = mode.partition(":")
        found = {"curves": curves, "files": files, "values": values}[name](world, out, *([count] if count else []))
        if world.rank == 0:
            (out / f"{name}.json").write_text(json.dumps(found, default=str), encoding="utf-8")
    dist.barrier()
    engine.stop()


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(pathlib.Path(args[0]), args[1:])
