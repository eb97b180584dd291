"""LoRA under every ZeRO stage, for test_lora_stages.py: the real training step, checkpoints and the final file.

    deepspeed --num_gpus 2 tests/distributed/ranks/lora.py OUT_DIR ACCUMULATION STAGES

STAGES is a word such as 0123.  Rank 0 writes OUT_DIR/facts.json, and with two ranks a whole run into OUT_DIR/run.
"""

import json
import pathlib
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds import checkpoint  # noqa: E402
from minimind_ds.convert import minimind, weight_files  # noqa: E402
from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.training import loop, resume  # noqa: E402
from minimind_ds.training.live import LiveRun  # noqa: E402
from minimind_ds.training.step import Position, fetch, train_step  # noqa: E402
from tests.distributed.ranks.layouts import MODELS, few, fresh_engine, make_run  # noqa: E402
from tests.routes import watched_routes  # noqa: E402

STEPS, HALF = 4, 2
# Of the samples whose tokens, in these steps, all stand clear of a second expert.
FIRST = 2400
# The dense model's every projection; of the mixture of experts what the program chooses by itself.
FLAGS = {"dense": ["--lora_rank", "4", "--lora_alpha", "8", "--lora_targets",
                   "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"],
         "moe": ["--lora_rank", "3"]}


def write_base(world, out: pathlib.Path, model: str) -> list[str]:
    """A base's weights in a file; the flags of a LoRA run on it."""
    path = out / f"base_{model}.safetensors"
    if world.rank == 0:
        config = make_run(world, out, model, 0, 1, []).model_config
        torch.manual_seed(1)
        # Large enough for attention and routing to matter.
        state = {name: tensor if tensor.dim() == 1 else 3 * tensor for name, tensor in minimind.fresh(config)}
        weight_files.save_safetensors(path, state, config)
    dist.barrier()
    return ["--from_weight", str(path), *FLAGS[model]]


def gathered(ds_engine, stage: int) -> dict[str, torch.Tensor]:
    """Collective: every parameter, frozen ones too, as the model computes with it."""
    import deepspeed

    state = {}
    for name, p in ds_engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if stage == 3 else nullcontext():
            state[name] = p.detach().cpu().clone()
    return state


def optimizer_numbers(ds_engine) -> int:
    """Adam's moments on this rank, in numbers."""
    return sum(value.numel() for state in ds_engine.basic_optimizer.state.values() for value in state.values()
               if torch.is_tensor(value) and value.dim())


def run_steps(prepared, ds_engine, first: int, last: int) -> list[dict]:
    batches, live = fetch(prepared, 0, prepared.first_plan, range(first, last)), LiveRun(engine=ds_engine)
    return [train_step(prepared, live, prepared.first_plan, Position(step + 1, 0, step), batches).line()
            for step in range(first, last)]


def case(prepared, out: pathlib.Path, resume: bool) -> dict:
    """What one model at one stage does; the same on every rank."""
    base = prepared.start_weights
    ds_engine = fresh_engine(prepared)
    before = gathered(ds_engine, prepared.stage)
    lines = run_steps(prepared, ds_engine, 0, HALF)
    if resume:
        folder = out / f"checkpoint_{prepared.run.dtype}_{prepared.stage}_{prepared.model_config.use_moe}"
        folder.mkdir(exist_ok=True)
        checkpoint.save(ds_engine, folder, facts={"step": HALF}, keep=1).finish()
        path = checkpoint.folder_of(folder) / checkpoint.name_of(HALF)
    lines += run_steps(prepared, ds_engine, HALF, STEPS)
    after = gathered(ds_engine, prepared.stage)
    adapters = {name: tensor for name, tensor in after.items() if ".lora." in name}
    final = engine.full_weights(ds_engine, prepared.stage)
    facts = {"loss": [line["loss"] for line in lines], "aux": [line["aux_loss"] for line in lines],
             "norm": [line["grad_norm"] for line in lines], "numbers": optimizer_numbers(ds_engine),
             "adapters": sum(tensor.numel() for tensor in adapters.values()),
             "all": sum(tensor.numel() for tensor in after.values()),
             "base kept": all(torch.equal(after[name], tensor.to(after[name].dtype)) for name, tensor in base.items())
             and base.keys() == after.keys() - adapters.keys(),
             "unmoved adapters": [name for name in adapters if torch.equal(before[name], after[name])],
             "written": sorted(final) == sorted(adapters) or prepared.world.rank > 0}
    if resume:
        again = fresh_engine(prepared)
        checkpoint.load(again, path)
        second = run_steps(prepared, again, HALF, STEPS)
        ours = gathered(again, prepared.stage)
        facts["resumed alike"] = (all(torch.equal(ours[name], tensor) for name, tensor in after.items())
                                  and [line["loss"] for line in second] == facts["loss"][HALF:])
    return facts


def refusals(world, out: pathlib.Path, flags: list[str]) -> list[str]:
    """What a full run says to a LoRA run's checkpoint, and a LoRA run to a full one's and to another rank's."""
    full, ours = (make_run(world, out, "dense", 2, 1, extra) for extra in (flags[:2], flags))
    other = make_run(world, out, "dense", 2, 1, [*flags[:2], "--lora_rank", "2"])
    said = []
    for then, now in ((ours, full), (full, ours), (ours, other)):
        try:
            resume.refuse_changes(resume.identity(then), resume.identity(now), "CHECKPOINT")
        except ValueError as error:
            said.append(str(error))
    return said


def main(out: pathlib.Path, accumulation: int, stages: list[int]) -> None:
    world = read_world()
    engine.start(world)
    # make_run takes them.
    few(out, world.rank, FIRST)
    facts = {}
    for model in MODELS:
        flags = write_base(world, out, model)
        for stage in stages:
            prepared = make_run(world, out, model, stage, accumulation, flags)
            with watched_routes() as gaps:
                found = case(prepared, out, resume=world.size > 1)
            facts[f"{model}_{stage}"] = {**found, "gaps": gaps}
        if world.size > 1 and model == "dense":
            for stage in stages:
                prepared = make_run(world, out, model, stage, accumulation, flags, dtype="bf16")
                facts[f"bf16_{stage}"] = case(prepared, out, resume=True)
            facts["refusals"] = refusals(world, out, flags)
    if world.size > 1:
        prepared = make_run(world, out, "moe", 3, accumulation, [*flags, "--max_steps", "3", "--save_interval", "0"])
        live = LiveRun()
        loop.train(prepared, live, resume.find_resume_point(prepared, live))
    if world.rank == 0:
        (out / "facts.json").write_text(json.dumps(facts))
    dist.barrier()
    engine.stop()


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(pathlib.Path(args[0]), int(args[1]), [int(stage) for stage in args[2]])
