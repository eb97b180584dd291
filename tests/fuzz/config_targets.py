"""Readers of configuration: the run's YAML, command lines, DeepSpeed files, models, the launcher's environment."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import sys

import torch

from minimind_ds import kernels
from minimind_ds.config import deepspeed_json, program_flags
from minimind_ds.config.model import PRESETS, ModelConfig
from minimind_ds.config.run import FLAGS, NUMBERS, RunConfig, parse_run_config
from minimind_ds.convert import huggingface
from minimind_ds.distributed import rendezvous, sequence_parallel
from minimind_ds.distributed.world import read_world
from minimind_ds.inference.chat import Sampling, pairs_of
from minimind_ds.model.decoder import kernel_requirements
from minimind_ds.paths import DS_CONFIGS
from minimind_ds.plan import report
from minimind_ds.resilience import restarts
from minimind_ds.training.memory import check_size
from minimind_ds.training.prepare import PROGRAMS, choose_lora
from tests.fuzz import mutate
from tests.fuzz.harness import Target

FIELDS = tuple(f.name for f in dataclasses.fields(ModelConfig))
NAMES = tuple(f.name for f in FLAGS)
YAMLS = ["~", "", "yes", "off", "1e-4", "1e400", ".nan", "-.inf", "0x1F", "0b", "0o17", "190:20:30", "1_000",
         "2001-99-99", "2001-01-01 99:99:99",
         "2001-01-01", "!!int ''", "!!float x", "!!bool 7", "!!timestamp x", "!!binary '\xff'", "!!omap [a: b]",
         "!!set {a}", "!!python/name:os.system",
         "!!python/object/apply:os.system [touch owned]", "!x y", "*none", "&a [*a]", "&a {b: *a}", "{<<: 5}",
         "{<<: [1, {a: 2}]}", "? {a: b}\n: c",
         "'", '"\\ud800"', '"\\0"', '"\\x"', "|\n  a", ">", "[1", "{a", "@", "`", "%", "\t", "---", "...", "- a",
         "a: b: c", "=", "<<", "[]", "{}",
         "[a, b]", "{path: x, share: 2}", "[{path: x, share: -1}]", "[{path: 5}]", "9" * 5000, "-1", "0", "2", "1.5",
         "true", "debug", "q_proj,k_proj",
         "attention=sdpa", "auto", "none", "../x", "\x85", "\u2028", "\ufeff", "\x07"]


def draw_yaml(draw: random.Random) -> bytes:
    def one() -> str:
        f = draw.choice(FLAGS)
        right = (f.default if f.default is not None else draw.choice(("5", "x")), *(f.metadata["choices"] or ()), 1,
                 0.5, 16)
        value = draw.choice((draw.choice(YAMLS), mutate.json_text(draw, mutate.value(draw)),
                             json.dumps(draw.choice(right))))
        return f"{f.name}: {value}"

    lines = [one() for _ in range(draw.choice((1, 1, 2, 3)))]
    if draw.random() < 0.4:
        lines += ["model:", *(f"  {draw.choice(FIELDS)}: {draw.choice((draw.choice(YAMLS), '2', '64', '0.5', 'true'))}"
                              for _ in range(draw.choice((1, 2))))]
    if draw.random() < 0.1:
        lines += ["deepspeed:", f"  {draw.choice(('bf16', 'optimizer', 'x'))}: {draw.choice(YAMLS)}"]
    if draw.random() < 0.1:
        lines.append(f"{draw.choice(YAMLS)}: {draw.choice(YAMLS)}")
    if draw.random() < 0.01:
        names = [f"a{i}" for i in range(draw.choice((5, 9, 30)))]
        lines = ["a: &a [x, x, x, x, x, x, x, x, x]",
                 *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip(["a", *names], names))]
    content = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    return mutate.chewed(draw, content) if draw.random() < 0.15 else content


def read_yaml(case: bytes, folder: pathlib.Path) -> None:
    path = folder / "run.yaml"
    path.write_bytes(case)
    use_run(parse_run_config(["--config", str(path)], "sft", PROGRAMS["sft"]))


def use_run(run: RunConfig) -> None:
    """What prepare makes of flags before it reads any other file; numbers are finite, sizes are possible."""
    run = run.replace(preset=run.preset or "debug", dtype=run.dtype or "fp32")
    config = run.model_config(6400)
    check_size(config)
    choose_lora(run, config)
    kernels.resolve(run.kernels, torch.device("cpu"), torch.float32, kernel_requirements(config))
    run.to_yaml()
    assert all(math.isfinite(getattr(run, name) or 0) for name in NUMBERS)
    check_config(config)


def check_config(config: ModelConfig) -> None:
    for f in dataclasses.fields(ModelConfig):
        value = getattr(config, f.name)
        assert value is None or type(value).__name__ in f.type or (f.type == "float" and type(value) is int), f.name
        assert not isinstance(value, (int, float)) or (math.isfinite(value) and value >= 0), f.name


def words(draw: random.Random, names: tuple[str, ...]) -> list[str]:
    found = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        flag = "--" + (draw.choice(names) if draw.random() < 0.9 else mutate.text(draw))
        value = draw.choice((mutate.text(draw), str(draw.choice(mutate.NUMBERS[:18] + [1.5, -2.5])), "nan", "-inf",
                             "1e999", "٣", "1_0", "--", "-",
                             "auto,", "bf16"))
        flag = flag.replace("_", "-") if draw.random() < 0.2 else flag
        found += [f"{flag}={value}"] if draw.random() < 0.4 else [flag, value] if draw.random() < 0.9 else [flag]
    return found


def draw_flags(draw: random.Random) -> list[str]:
    found = words(draw, (*NAMES, "config", "local_rank", "hidden_size", "use_moe", "num_hidden_layers", "output_dir",
                         "bf16", "lr"))
    # Flags that open files are for other targets; a text of thousands of digits is no integer's.
    return [word for word in found if not word.startswith(("--h", "-h")) or word.startswith("--hid")]


def read_flags(case: list[str], folder: pathlib.Path) -> None:
    os.chdir(folder)
    use_run(parse_run_config(case, "sft", PROGRAMS["sft"]))


OTHERS = ("chat", "score", "evaluate", "export", "train_tokenizer", "preflight", "plan", "verify", "benchmark",
          "check_kernels")


@functools.cache
def parsers() -> dict:
    sys.argv[0] = "launch/x.py"
    return {name: getattr(program_flags, name)() for name in OTHERS if hasattr(program_flags, name)}


def draw_program(draw: random.Random) -> tuple[str, list[str]]:
    name = draw.choice(list(parsers()))
    flags = tuple(action.option_strings[0][2:] for action in parsers()[name]._actions
                  if action.option_strings and action.dest != "help")
    return name, [word for word in words(draw, flags) if not word.startswith(("--h", "-h"))]


def read_program(case: tuple[str, list[str]], folder: pathlib.Path) -> None:
    name, argv = case
    args, _ = parsers()[name].parse_known_args(argv)
    if name == "chat":
        pairs_of(args)
        Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                 repetition_penalty=args.repetition_penalty,
                 max_new_tokens=args.max_new_tokens)
    if name == "plan":
        report.parse(argv)


DS_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
           "optimizer", "scheduler", "type",
           "params", "lr", "betas", "eps", "weight_decay", "bf16", "bfloat16", "fp16", "enabled", "loss_scale",
           "zero_optimization", "stage",
           "offload_optimizer", "offload_param", "device", "nvme_path", "pin_memory", "reduce_bucket_size",
           "overlap_comm", "sub_group_size",
           "activation_checkpointing", "comms_logger", "flops_profiler", "compile", "sequence_parallel_size",
           "data_parallel_size",
           "expert_parallel", "autoep_size", "warmup_num_steps", "total_num_steps", "torch_adam",
           "wall_clock_breakdown", "steps_per_print",
           "tensor_parallel", "checkpoint", "data_types", "aio", "monitor_config", "wandb", "zenflow", "_comment",
           "communication_data_type")
BLOCKS = [{"type": kind, "params": {"lr": "auto", "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": "auto"}}
          for kind in
          ("AdamW", "Adam", "Muon", "OneBitAdam", "Lion", "SGD")]
SCHEDULERS = [{"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": 10}},
              {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
              {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3}},
              {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-5}}]
MORE = {"fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "activation_checkpointing": {"partition_activations": False},
        "flops_profiler": {"enabled": False}, "comms_logger": {"enabled": False}, "sequence_parallel_size": 1,
        "expert_parallel": {"enabled": False}, "wandb": {"enabled": False}, "compile": {"disable": True}}


@functools.cache
def shipped() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(DS_CONFIGS.glob("*.json"))]


def draw_deepspeed(draw: random.Random) -> tuple[bytes, int]:
    tree = dict(draw.choice(shipped()))
    if draw.random() < 0.4:
        tree["optimizer"] = draw.choice(BLOCKS)
    if draw.random() < 0.3:
        tree["scheduler"] = draw.choice(SCHEDULERS)
    if draw.random() < 0.3:
        key = draw.choice(list(MORE))
        tree[key] = MORE[key]
    # Most are near to what is accepted, so that the last checks are reached.
    tree = mutate.altered(draw, tree, DS_KEYS, draw.choice((1, 1, None))) if draw.random() < 0.9 else tree
    write = mutate.json_bytes if draw.random() < 0.2 else mutate.plain_bytes
    return write(draw, tree), draw.choice((1, 1, 2, 8))


def read_deepspeed(case: tuple[bytes, int], folder: pathlib.Path) -> None:
    content, ranks = case
    path = folder / "ds.json"
    path.write_bytes(content)
    run = dataclasses.replace(base_run(), deepspeed=str(path))
    raw = deepspeed_json.read(run)
    deepspeed_json.check_keys(run.deepspeed, raw)
    model = PRESETS["debug"]
    deepspeed_json.resolve(raw, run, model, total_steps=0, ranks=ranks)
    dims = sequence_parallel.read_dims(run.deepspeed, raw, ranks)
    config, run = deepspeed_json.resolve(raw, run, model, total_steps=100, ranks=ranks)
    deepspeed_json.notes(raw, run)
    sequence_parallel.check(dims, model, ranks=ranks, row_tokens=run.batch_size * run.row_len,
                            stage=deepspeed_json.stage_of(config),
                            path=str(path))
    deepspeed_json.describe(config, dims)
    deepspeed_json.own_settings(config, "cpu")
    json.dumps(config, allow_nan=False)


@functools.cache
def base_run() -> RunConfig:
    return parse_run_config(["--preset", "debug", "--dtype", "fp32"], "sft", PROGRAMS["sft"])


def draw_model(draw: random.Random) -> tuple[str, object]:
    config = PRESETS[draw.choice(list(PRESETS))]
    if draw.random() < 0.5:
        return "ours", mutate.altered(draw, config.to_dict(), FIELDS)
    theirs = huggingface.to_hf_config(config, torch.float32)
    return "theirs", mutate.altered(draw, theirs,
                                    (*theirs, "rope_scaling", "rope_type", "type", "factor", "use_moe",
                                     "num_local_experts"))


def read_model(case: tuple[str, object], folder: pathlib.Path) -> None:
    """As weight_files.read_config and the readers of manifests take what JSON holds."""
    kind, values = case
    if not isinstance(values, dict):
        return
    config = ModelConfig.from_dict(values) if kind == "ours" else huggingface.from_hf_config(values)
    check_config(config)
    check_size(config)
    json.dumps(huggingface.to_hf_config(config, torch.float32),
               allow_nan=False) if not config.use_moe or config.qk_norm else None


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "SLURM_PROCID", "SLURM_NTASKS",
             "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_TASKS_PER_NODE",
             "SLURM_STEP_TASKS_PER_NODE",
             "SLURM_NODEID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID",
             "SLURM_CPUS_PER_TASK", "GLOO_SOCKET_IFNAME")


def draw_environment(draw: random.Random) -> dict[str, str]:
    def one() -> str:
        return draw.choice((str(draw.choice((0, 1, 2, 3, 8))), str(draw.choice(mutate.NUMBERS)), mutate.text(draw),
                            "4(x2),3", "4(x999999),3",
                            "1" * 5000, "²", "٣", "1_0", " 1", "+1", "4(x2"))

    return {name: one().replace("\0", "") for name in draw.sample(VARIABLES, draw.choice((1, 2, 4, 7)))}


def read_environment(case: dict[str, str], folder: pathlib.Path) -> None:
    """As the start of every rank reads what its launcher says."""
    before = dict(os.environ)
    for name in VARIABLES:
        os.environ.pop(name, None)
    try:
        for name, value in case.items():
            os.environ[name] = value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
        world = read_world()
        assert 0 <= world.rank < world.size and world.local_size >= 1
        restarts.read(folder)
        restarts.automatic_restarts()
        if world.size == 1:
            rendezvous.check_interface()
    finally:
        os.environ.clear()
        os.environ.update(before)


TARGETS = [
    Target("run YAML", draw_yaml, read_yaml, 0.25),
    Target("flags", draw_flags, read_flags, 0.3),
    Target("flags of the other programs", draw_program, read_program, 8, (parsers,)),
    Target("DeepSpeed JSON", draw_deepspeed, read_deepspeed, 1, (base_run, shipped)),
    Target("model configuration", draw_model, read_model, 12),
    Target("environment", draw_environment, read_environment, 10),
]
