"""Checkpoints of many layouts beside the weights that the engine itself gives, for tests/checkpoint/test_weights.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/speak.py OUT_DIR cases whole
    deepspeed --num_gpus 2 tests/distributed/ranks/speak.py OUT_DIR whole adapters
    (these two with OUT_DIR/held/one.jsonl and other.jsonl to evaluate)

`cases`: each a run folder OUT_DIR/<case> with a checkpoint after two steps; rank 0 writes the engine's weights to
OUT_DIR/<case>.safetensors.  `whole`, `adapters`: the trainer trains OUT_DIR/whole, all weights in bf16 at
stage 3, and OUT_DIR/adapters, LoRA in fp32 at stage 2, each to its end, with evaluations.
"""

import pathlib
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds import checkpoint  # noqa: E402
from minimind_ds.convert import minimind, weight_files  # noqa: E402
from minimind_ds.convert.vocabulary import Vocabulary  # noqa: E402
from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.training import loop  # noqa: E402
from minimind_ds.training.build import build_engine  # noqa: E402
from minimind_ds.training.live import LiveRun  # noqa: E402
from minimind_ds.training.prepare import prepare  # noqa: E402
from minimind_ds.training.resume import ResumePoint, find_resume_point, manifest_facts  # noqa: E402
from minimind_ds.training.step import Position, fetch, train_step  # noqa: E402
from tests.distributed.ranks.layouts import make_run  # noqa: E402

STEPS = 2
LORA = ["--lora_rank", "2", "--lora_alpha", "3", "--lora_targets", "q_proj,v_proj"]
EXPERTS = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
MUON = {"optimizer": {"type": "Muon", "params": {"lr": "auto", "weight_decay": "auto"}}}
# name -> (model, precision, ZeRO stage, keys of the DeepSpeed file, flags)
CASES = {
    "fp32_0": ("dense", "fp32", 0, {}, []),
    **{f"bf16_{stage}": ("dense", "bf16", stage, {}, []) for stage in range(4)},
    "moe_3": ("moe", "bf16", 3, {}, []),
    **{f"experts_{stage}": ("moe", "bf16", stage, EXPERTS, []) for stage in (1, 2, 3)},
    "muon_1": ("dense", "bf16", 1, MUON, ["--grad_clip", "0"]),
    "round_robin": ("dense", "bf16", 2, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, []),
    "sub_groups": ("dense", "fp32", 3, {"zero_optimization": {"stage": 3, "sub_group_size": 5000}}, []),
    "rows": ("dense", "bf16", 2, {"sequence_parallel_size": 2}, []),
    **{f"lora_{stage}": ("dense", "bf16", stage, {}, LORA) for stage in range(4)},
}


def base(out: pathlib.Path, prepared) -> pathlib.Path:
    """The weights that adapters stand beside."""
    path = out / "base" / "sft_48.safetensors"
    if prepared.world.rank == 0:
        path.parent.mkdir(exist_ok=True)
        torch.manual_seed(1)
        state = dict(minimind.fresh(prepared.model_config))
        weight_files.save_safetensors(path, state, prepared.model_config, Vocabulary.of(prepared.tokenizer).to_json())
        prepared.tokenizer.save(path.parent / "tokenizer")
    dist.barrier()
    return path


def case(world, out: pathlib.Path, name: str, start: pathlib.Path | None) -> None:
    model, dtype, stage, keys, flags = CASES[name]
    flags = [*flags, "--save_dir", str(out / name), *(["--from_weight", str(start)] if "--lora_rank" in flags else [])]
    prepared = make_run(world, out, model, stage, 1, flags, dtype=dtype, keys=keys)
    live, plan = LiveRun(engine=build_engine(prepared)), prepared.first_plan
    batches = fetch(prepared, 0, plan, range(STEPS))
    for step in range(STEPS):
        train_step(prepared, live, plan, Position(step + 1, 0, step), batches)
    if world.rank == 0:
        loop.write_run_folder(prepared, ResumePoint())
    dist.barrier()
    checkpoint.save(live.engine, prepared.folder, facts=manifest_facts(prepared, STEPS, 0, STEPS), keep=1).finish()
    weights = engine.full_weights(live.engine, stage)
    if world.rank == 0:
        save_file(weights, out / f"{name}.safetensors")


def train(world, out: pathlib.Path, name: str, start: pathlib.Path) -> None:
    """What launch/sft.py does, evaluating and saving after the last step too."""
    stage, flags = {"whole": (3, ["--dtype", "bf16"]),
                    "adapters": (2, ["--dtype", "fp32", "--from_weight", str(start), *LORA])}[name]
    held = [str(out / "held" / name) for name in ("one.jsonl", "other.jsonl")]
    words = ["--config", str(out / f"dense_{world.rank}.yaml"), "--deepspeed", f"ds_configs/zero{stage}.json",
             "--data_path", str(out / "few.jsonl"), "--eval_path", *held, "--save_dir", str(out / name), "--cache_dir",
             str(out / "cache"), "--max_seq_len", "128", "--pack_len", "256", "--batch_size", "2", "--max_steps", "4",
             "--save_interval", "2", "--learning_rate", "1e-2", *flags]
    prepared, live = prepare("sft", words, world), LiveRun()
    loop.train(prepared, live, find_resume_point(prepared, live))


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    folder, *parts = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    out, world = pathlib.Path(folder), read_world()
    engine.start(world)
    from deepspeed.runtime import compiler

    # Muon's kernels take a minute to compile on a CPU; here it is its layout that counts.
    compiler.compile = lambda: lambda function: function
    start = base(out, make_run(world, out, "dense", 0, 1, []))
    for part in parts:
        if part == "cases":
            for name in CASES:
                case(world, out, name, start)
        else:
            train(world, out, part, start)
    engine.stop()
