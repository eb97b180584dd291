"""Checkpoints written on one layout and resumed on others, for tests/checkpoint/test_reshape.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/reshape.py OUT_DIR "write MODELS" "program write STAGE"
    deepspeed --num_gpus 1 tests/distributed/ranks/reshape.py OUT_DIR \
        "resume MODELS RANKS_THAT_WROTE STAGES_FURTHER [offload]"
    deepspeed --num_gpus 2 tests/distributed/ranks/reshape.py OUT_DIR compiled
    deepspeed --num_gpus 2 tests/distributed/ranks/reshape.py OUT_DIR shared

`write`: at every stage BEFORE steps, a checkpoint, and AFTER more without a break.  `resume`: each of those at stages
(stage + s) % 4 for s of STAGES_FURTHER, and the AFTER steps; with `offload` the optimizer is on the CPU where the
stage can.  `compiled`: DeepSpeed's own Adams.  `shared`: experts and rows over ranks.  `program`, last: the trainer's
own main writes or resumes.  Lists are comma-separated.  Rank 0 writes losses and what it found to
OUT_DIR/<what>_<ranks>.json.
"""

import json
import pathlib
import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds import checkpoint  # noqa: E402
from minimind_ds.checkpoint import reshape  # noqa: E402
from minimind_ds.distributed import deepspeed_compat, engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.model.decoder import MiniMindForCausalLM  # noqa: E402
from minimind_ds.training.build import build_engine  # noqa: E402
from minimind_ds.training.live import LiveRun  # noqa: E402
from minimind_ds.training.loop import main  # noqa: E402
from minimind_ds.training.resume import layout_facts, load_checkpoint, look_for_resume_point, manifest_facts  # noqa: E402
from minimind_ds.training.step import Position, fetch, train_step  # noqa: E402
from tests.distributed.ranks.layouts import make_run  # noqa: E402

BEFORE, AFTER = 2, 3
# ranks -> (rows of a micro-batch, micro-batches): 8 rows a step always, split otherwise after the resume.
SPLITS = {"write": {1: (2, 4), 2: (2, 2), 4: (2, 1)}, "resume": {1: (4, 2), 2: (1, 4), 4: (1, 2)}}
DTYPES = {"dense": "fp32", "frozen": "fp32", "moe": "bf16"}
# Adam and AdamW of DeepSpeed's own: in C++ for states on the CPU, and fused.
COMPILED = {"offload 2": ("dense", 2), "offload 3": ("dense", 3), "fused 0": ("moe", 0), "fused 1": ("dense", 1)}


def run_of(world, out: pathlib.Path, half: str, model: str, stage: int, *, adam: str = "torch",
           resume: str = "none", dtype: str | None = None):
    """The MoE trains under a scheduler of DeepSpeed's, the others at the trainer's own constant rate."""
    config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    if model == "moe":
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto",
                                                              "warmup_num_steps": 8}}
    if "offload" in adam and stage > 0:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if "experts" in adam and stage > 0:
        config["expert_parallel"] = {"enabled": True, "autoep_size": 2}
    if "rows" in adam:
        config["sequence_parallel_size"] = 2
    if adam == "offload":
        del config["optimizer"]
    elif adam == "fused":
        del config["optimizer"]["params"]["torch_adam"], config["optimizer"]["params"]["fused"]
    # make_job writes a plain one under another name.
    path = out / f"reshape_{world.rank}.json"
    path.write_text(json.dumps(config))
    rows, accumulation = SPLITS[half][1 if "rows" in adam else world.size]
    return make_run(world, out, "moe" if model == "moe" else "dense", stage, accumulation,
                    ["--batch_size", str(rows), "--deepspeed", str(path), "--from_resume", resume],
                    dtype or DTYPES[model])


def build(prepared, model: str, half: str):
    """build_engine, or a model of which a part is frozen, with a buffer; `resume` builds them unlike."""
    if model != "frozen":
        return build_engine(prepared)
    torch.manual_seed(prepared.run.seed)
    net = MiniMindForCausalLM(prepared.model_config, kernels=prepared.run.kernels)
    net.model.register_buffer("notes", torch.arange(5.0))
    for name, p in net.named_parameters():
        # 4608 elements, which the optimizer's order has in its midst, and 48.
        p.requires_grad_(name not in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"))
    if half == "write":
        with torch.no_grad():
            for t in [net.model.notes, *(p for p in net.parameters() if not p.requires_grad)]:
                t.mul_(1.5)
    return engine.initialize(net, prepared.ds)


def steps(prepared, ds_engine, first: int, last: int) -> list[dict]:
    batches, live = fetch(prepared, 0, prepared.first_plan, range(first, last)), LiveRun(engine=ds_engine)
    lines = [train_step(prepared, live, prepared.first_plan, Position(step + 1, 0, step), batches).line()
             for step in range(first, last)]
    return [{key: line[key] for key in ("loss", "aux_loss", "grad_norm", "lr")} for line in lines]


def fused_moments(ds_engine) -> dict:
    """Parameter -> Adam's moments, where DeepSpeed keeps those of all parameters in one flat tensor at stage 0."""
    moments = {}
    for i, flat in enumerate(getattr(ds_engine.optimizer, "fp32_groups_flat", [])):
        for key in ("exp_avg", "exp_avg_sq"):
            parts = torch._utils._unflatten_dense_tensors(ds_engine.basic_optimizer.state[flat][key],
                                                          ds_engine.optimizer.fp16_groups[i])
            for p, part in zip(ds_engine.optimizer.fp16_groups[i], parts):
                moments.setdefault(p, {})[key] = part
    return moments


def full_state(ds_engine) -> dict[str, torch.Tensor]:
    """Collective: masters, Adam's moments and the weights in use, as DeepSpeed's own accessors give them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage, state = ds_engine.zero_optimization_stage(), {}
    if stage in (1, 2):
        # Its accessors find the moments only after this, which the first update would do, for its first group.
        ds_engine.optimizer._hp_optimizer_states_linked = False
        ds_engine.optimizer._lazy_init_hp_params_optimizer_state()
    masters, fused = deepspeed_compat.stage_zero_masters(ds_engine) or {}, fused_moments(ds_engine)
    state["buffers"] = torch.cat([torch.zeros(1), *(b.flatten() for b in ds_engine.module.buffers())])
    for name, p in ds_engine.module.named_parameters():
        if not p.requires_grad:
            parts = {}
        elif stage == 0:
            master = masters.get(p, p)
            parts = {"fp32": master, **(fused[p] if fused else ds_engine.basic_optimizer.state[master])}
        else:
            parts = {"fp32": safe_get_full_fp32_param(p),
                     **{key: safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")}}
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            state[f"{name} weight"] = p.detach().clone()
        state |= {f"{name} {key}": parts[key].detach().clone() for key in ("fp32", "exp_avg", "exp_avg_sq") if parts}
        for key in [key for key in state if key.startswith(f"{name} ")]:
            state[key] = all_experts(p, state[key])
    state["step"] = torch.tensor(sorted({int(s["step"]) for s in ds_engine.basic_optimizer.state.values()}))
    counters = [getattr(ds_engine, name) for name in ("global_steps", "global_samples", "skipped_steps")]
    return {**{key: value.cpu().contiguous() for key, value in state.items()}, "counters": torch.tensor(counters)}


def all_experts(p, tensor: torch.Tensor) -> torch.Tensor:
    """Collective: what this rank holds of a parameter, and what those it shares the experts with hold."""
    if reshape.expert_ranks(p) == 1:
        return tensor
    from minimind_ds.distributed.expert_parallel import whole

    return whole(p, tensor)


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]


def save(prepared, ds_engine, folder: pathlib.Path, step: int) -> pathlib.Path:
    checkpoint.save(ds_engine, folder, facts=manifest_facts(prepared, step, 0, step), keep=1).finish()
    return checkpoint.folder_of(folder) / checkpoint.name_of(step)


def write(world, out: pathlib.Path, models: str) -> dict:
    curves = {}
    for model in models.split(","):
        for stage in range(4):
            name = f"{model}_{stage}_{world.size}"
            prepared = run_of(world, out, "write", model, stage)
            ds_engine = build(prepared, model, "write")
            steps(prepared, ds_engine, 0, BEFORE)
            save(prepared, ds_engine, out / name, BEFORE)
            state = full_state(ds_engine)
            if world.rank == 0:
                save_file(state, out / f"{name}.safetensors")
            curves[name] = steps(prepared, ds_engine, BEFORE, BEFORE + AFTER)
    return curves


def load(prepared, ds_engine):
    """As loop.train does."""
    start = look_for_resume_point(prepared)
    assert start.step == start.epoch_step == BEFORE
    load_checkpoint(prepared, ds_engine, start)
    return start


def resume(world, out: pathlib.Path, models: str, wrote: str, further: str, where: str = "") -> dict:
    found = {}
    for model in models.split(","):
        for source in [f"{model}_{stage}_{ranks}" for ranks in wrote.split(",") for stage in range(4)]:
            state = load_file(out / f"{source}.safetensors")
            for target in [(int(source.split("_")[1]) + int(s)) % 4 for s in further.split(",")]:
                prepared = run_of(world, out, "resume", model, target, adam=f"torch {where}", resume=str(out / source))
                ds_engine = build(prepared, model, "resume")
                start = load(prepared, ds_engine)
                seeds = [None] * world.size
                dist.all_gather_object(seeds, torch.initial_seed())
                found[f"{source} -> {target}_{world.size}"] = {
                    "wrong": differing(full_state(ds_engine), state), "seeds": seeds,
                    "note": reshape.note(start.layout, layout_facts(prepared)),
                    "curve": steps(prepared, ds_engine, BEFORE, BEFORE + AFTER)}
    return found


def compiled(world, out: pathlib.Path) -> dict:
    """The same layout again, and the same checkpoint under torch's Adam at another stage."""
    found = {}
    for case, (model, stage) in COMPILED.items():
        adam = case.split()[0]
        prepared = run_of(world, out, "write", model, stage, adam=adam)
        ds_engine = build_engine(prepared)
        steps(prepared, ds_engine, 0, BEFORE)
        path = save(prepared, ds_engine, out / case, BEFORE)
        state = full_state(ds_engine)
        found[case] = facts = {"adam": type(ds_engine.basic_optimizer).__name__,
                               "whole": steps(prepared, ds_engine, BEFORE, BEFORE + AFTER)}
        ended = full_state(ds_engine)
        prepared = run_of(world, out, "write", model, stage, adam=adam, resume=str(path))
        ds_engine = build_engine(prepared)
        load(prepared, ds_engine)
        facts["wrong"] = differing(full_state(ds_engine), state)
        facts["again"] = steps(prepared, ds_engine, BEFORE, BEFORE + AFTER)
        facts["wrong at the end"] = differing(full_state(ds_engine), ended)
        for other, name in ((adam, "there"), ("torch", "torch")):
            prepared = run_of(world, out, "resume", model, 5 - stage if stage > 1 else 1 - stage, adam=other,
                         resume=str(path))
            ds_engine = build_engine(prepared)
            load(prepared, ds_engine)
            facts[f"wrong {name}"] = differing(full_state(ds_engine), state)
            facts[f"curve {name}"] = steps(prepared, ds_engine, BEFORE, BEFORE + AFTER)
    return found


def shared(world, out: pathlib.Path) -> dict:
    """Experts shared out over both ranks, or rows, and neither: each written, resumed on the same and as the next."""
    found, ways = {}, ("torch experts", "torch", "torch rows", "torch rows experts")
    for stage in (1, 2, 3):
        for i, way in enumerate(ways):
            name, after = f"{way} {stage}", ways[(i + 1) % len(ways)]
            prepared = run_of(world, out, "write", "moe", stage, adam=way)
            ds_engine = build_engine(prepared)
            steps(prepared, ds_engine, 0, BEFORE)
            path = save(prepared, ds_engine, out / name.replace(" ", "_"), BEFORE)
            state = full_state(ds_engine)
            found[name] = facts = {"whole": steps(prepared, ds_engine, BEFORE, BEFORE + AFTER)}
            for key, how, at in (("again", way, stage), ("next", after, stage % 3 + 1)):
                prepared = run_of(world, out, "write" if key == "again" else "resume", "moe", at, adam=how,
                             resume=str(path))
                ds_engine = build_engine(prepared)
                start = load(prepared, ds_engine)
                facts[f"wrong {key}"] = differing(full_state(ds_engine), state)
                facts[key] = steps(prepared, ds_engine, BEFORE, BEFORE + AFTER)
            facts["note"] = reshape.note(start.layout, layout_facts(prepared))
    return found


def program(world, out: pathlib.Path, half: str, stage: str) -> None:
    """The main of launch/sft.py: five steps on one layout; on the other from step 2 on, into another folder."""
    rows, accumulation = SPLITS[half][world.size]
    yaml = out / f"program_{world.rank}.yaml"
    yaml.write_text("preset: debug\nmodel: {hidden_size: 48, num_hidden_layers: 2}")
    begin = "none" if half == "write" else str(out / "program_write" / "checkpoints" / "step_00000002")
    assert main("sft", ["--config", str(yaml), "--deepspeed", f"ds_configs/zero{stage}.json",
                        "--save_dir", str(out / f"program_{half}"), "--cache_dir", str(out / "cache"),
                        "--dtype", "fp32", "--max_seq_len", "128", "--pack_len", "128", "--batch_size", str(rows),
                        "--accumulation_steps", str(accumulation), "--max_steps", "5", "--save_interval", "2",
                        "--keep", "3", "--from_resume", begin]) == 0


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    folder, *commands = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    out, world = pathlib.Path(folder), read_world()
    engine.start(world)
    for what, *words in map(str.split, commands):
        if what == "program":
            program(world, out, *words)
            break
        found = {"write": write, "resume": resume, "compiled": compiled, "shared": shared}[what](world, out, *words)
        if world.rank == 0:
            (out / f"{what}_{world.size}.json").write_text(json.dumps(found))
        dist.barrier()
    engine.stop()
