"""The DeepSpeed JSON: fill its "auto" values from the run's flags, refuse what is unknown or contradictory.

The file is plain DeepSpeed and may be one the user already has (Hugging Face style "auto" values included).  Each
number has one owner: a value in the JSON rules unless the flag was given too, and then both must agree.

    python -c "import minimind_ds.config.deepspeed_json as d; print(d.stage_of(d.read_json('ds_configs/zero2.json')))"
"""

from __future__ import annotations

import copy

from minimind_ds.config.deepspeed_check import (
    check_keys,
    check_numbers,
    check_rules,
    check_schema,
    check_schemas,
    check_whole,
    drop_auto,
    fits,
    no_effect,
    strip,
)
from minimind_ds.config.deepspeed_file import read, read_json
from minimind_ds.config.deepspeed_keys import KEYS, POSITIVE, limit, show
from minimind_ds.config.deepspeed_optimizer import (
    agree,
    builds_optimizer,
    by_user,
    fill_optimizer,
    fill_scheduler,
    offloads_optimizer,
    optimizer_device,
    own_name,
    own_settings,
)
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig, ParallelDims
from minimind_ds.config.run import RunConfig

__all__ = ["builds_optimizer", "check_keys", "describe", "keeps_checkpoints", "notes", "offloads_optimizer",
           "optimizer_device", "own_settings", "read", "read_json", "resolve", "stage_of"]

# Rows of a step: a batch of four million tokens has 2^16 rows of 64.
MOST_ROWS = 2**24

# DeepSpeed's keys for sequence and expert parallelism, which this toolkit carries out itself.
PARALLEL_KEYS = ("sequence_parallel_size", "data_parallel_size", "expert_parallel")


def resolve(raw: dict, run: RunConfig, model: ModelConfig, *, ranks: int, total_steps: int,
            device: str = "cpu") -> tuple[dict, RunConfig]:
    """Fill and check a DeepSpeed configuration.

    Args:
        raw: as read from the file; not changed.
        run: the flags; `run.deepspeed` names the file in messages, `run.dtype` is already chosen.
        model: gives the sizes for Hugging Face's "auto" buckets.
        ranks: data-parallel ranks: those that share a row count as one.
        total_steps: optimizer steps of the whole run, for a scheduler's "auto"; 0 where not known yet.
        device: "cpu" or "cuda": not every optimizer is for both.

    Returns:
        The configuration without any "auto", and the run with the numbers that the JSON owns.

    Raises:
        UserError: unknown or refused key, wrong type, a number given twice with two values, or anything that
            DeepSpeed would refuse.
    """
    path = run.deepspeed
    check_keys(path, raw)
    config = {key: value for key, value in strip(copy.deepcopy(raw)).items() if key not in PARALLEL_KEYS}
    if "bfloat16" in config:
        if "bf16" in config:
            raise UserError(f"{path}: bf16 and bfloat16 are one block; keep one")
        config["bf16"] = config.pop("bfloat16")
    run = own_batch(config, run, ranks)
    run = own_clip(config, run)
    run = own_compile(config, run)
    run = own_precision(config, run)
    fill_zero(path, config, model)
    run = fill_optimizer(config, run, device)
    run = fill_scheduler(config, run, total_steps)
    # Defaults that moved between DeepSpeed releases are set explicitly.
    config["gradient_clipping"] = float(run.grad_clip)
    for key in ("optimizer", "scheduler"):
        block = config.pop(key, None)
        if block is not None:
            config[key] = block
    # Where DeepSpeed's default is what "auto" means to Hugging Face's integration.
    config = {key: value for key, value in drop_auto(config).items() if value != {} or key in ("fp16", "bf16")}
    config.setdefault("steps_per_print", 10**9)
    config.setdefault("wall_clock_breakdown", False)
    config.setdefault("zero_allow_untested_optimizer", True)
    check_numbers(path, config)
    check_schemas(path, config)
    check_rules(path, config, run.dtype)
    check_muon(path, config, run)
    if not keeps_checkpoints(config) and optimizer_device(config) != "nvme" and run.save_interval:
        raise UserError(f"{path}: no checkpoints with {config['optimizer']['type']} at stage 3: DeepSpeed cannot load "
                        "them; --save_interval 0 trains without, stages 0 to 2 keep them")
    check_whole(path, config)
    return config, run


def own_clip(config: dict, run: RunConfig) -> RunConfig:
    value = config.get("gradient_clipping", "auto")
    return run if value == "auto" else agree(run, "grad_clip", value, "gradient_clipping")


def own_compile(config: dict, run: RunConfig) -> RunConfig:
    """compile.enabled, a key of old releases, is --compile; DeepSpeed's own block has no effect here."""
    block = config.get("compile", {})
    value = block.pop("enabled", "auto")
    if value != "auto":
        run = agree(run, "compile", value, "compile.enabled")
    for key in [key for key in block if f"compile.{key}" in KEYS]:
        del block[key]
    return run


def own_batch(config: dict, run: RunConfig, ranks: int) -> RunConfig:
    """train_batch_size = rows per micro-batch × accumulation × ranks; two of the three decide the third."""
    micro, steps = (config.get(k) for k in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
    total = config.pop("train_batch_size", None)
    where = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    for value, key, name in ((micro, where[0], "batch_size"), (steps, where[1], "accumulation_steps")):
        if value not in (None, "auto"):
            run = agree(run, name, value, key)
    if total not in (None, "auto"):
        if not fits(POSITIVE, total):
            raise UserError(f"{run.deepspeed}: train_batch_size is {show(total)}; it must be a positive whole "
                            f"number{limit(total)}")
        total = int(total)
        rows = run.batch_size * ranks
        if "batch_size" in run.given and "accumulation_steps" not in run.given and total % rows == 0:
            run = agree(run, "accumulation_steps", total // rows, "train_batch_size")
        elif "batch_size" not in run.given and total % (run.accumulation_steps * ranks) == 0:
            run = agree(run, "batch_size", total // (run.accumulation_steps * ranks), "train_batch_size")
        if total != run.batch_size * run.accumulation_steps * ranks:
            raise UserError(f"{run.deepspeed}: train_batch_size is {show(total)}, but batch_size {run.batch_size} × "
                             f"accumulation_steps {run.accumulation_steps} × {ranks} ranks is "
                             f"{run.batch_size * run.accumulation_steps * ranks}")
    if run.batch_size * run.accumulation_steps * ranks > MOST_ROWS:
        raise UserError(f"{run.deepspeed}: a step of {show(run.batch_size)} rows a micro-batch "
                        f"({run.place('batch_size')}) x {show(run.accumulation_steps)} micro-batches "
                        f"({run.place('accumulation_steps')}) x {ranks} ranks is more than {MOST_ROWS:,} rows")
    config["train_micro_batch_size_per_gpu"] = run.batch_size
    config["gradient_accumulation_steps"] = run.accumulation_steps
    return run


def own_precision(config: dict, run: RunConfig) -> RunConfig:
    """fp16.enabled / bf16.enabled <-> --dtype.  A block that is off and no other means fp32, as to DeepSpeed."""
    said, path = {}, run.deepspeed
    for name in ("fp16", "bf16"):
        if name in config:
            said[name] = config[name].get("enabled", False)
            if not isinstance(said[name], bool) and said[name] != "auto":
                raise UserError(f"{path}: {name}.enabled is {show(said[name])}; it must be true, false or \"auto\"")
    if [said.get(name) for name in ("fp16", "bf16")] == [True, True]:
        raise UserError(f"{path}: fp16 and bf16 are both enabled; keep one")
    named = next((name for name in said if said[name] is True), None)
    if named is None and said and "auto" not in said.values():
        named = "fp32"
    if named is None and said.get(run.dtype) is False:
        if by_user(run, "dtype"):
            raise UserError(f"dtype is {run.dtype} ({run.place('dtype')}) and {run.dtype}.enabled is false in {path}: "
                            "give it once, or \"auto\" in the JSON")
        named = "fp32"
    if named is not None:
        if by_user(run, "dtype") and run.dtype != named:
            raise UserError(f"dtype is {run.dtype} ({run.place('dtype')}) and {named} in {path}: "
                            "give it once, or \"auto\" in the JSON")
        run = run.replace(dtype=named, given={**run.given, "dtype": f"{named} in {path}"})
    for name in ("fp16", "bf16"):
        config.setdefault(name, {})["enabled"] = run.dtype == name
    if run.dtype == "bf16":
        # The norm tells of a gradient that is not finite (engine.take_norms); DeepSpeed would look at each by itself.
        config["bf16"].setdefault("check_grad_overflow", False)
    return run


def fill_zero(path: str, config: dict, model: ModelConfig) -> None:
    """Hugging Face's rules for "auto" buckets (transformers/integrations/deepspeed.py), and forms of old releases."""
    zero = config.get("zero_optimization", {})
    if isinstance(zero, bool):
        # Releases before 0.3 had true for stage 1.
        zero = {"stage": 1} if zero else {}
        config["zero_optimization"] = zero
    square = model.hidden_size * model.hidden_size
    auto = {"reduce_bucket_size": square, "stage3_prefetch_bucket_size": int(0.9 * square),
            "stage3_param_persistence_threshold": 10 * model.hidden_size, "allgather_bucket_size": square}
    for key, value in zero.items():
        if value == "auto" and key in auto:
            zero[key] = auto[key]
    stage = zero.get("stage", 0)
    if stage == "auto":
        raise UserError(f"{path}: \"auto\" at zero_optimization.stage cannot be filled in; write 0, 1, 2 or 3")
    if isinstance(stage, bool) or not isinstance(stage, (int, float)) or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {show(stage)}; it must be 0, 1, 2 or 3")
    for block in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(block, {}), (dict, type(None))):
            raise UserError(f"{path}: zero_optimization.{block} is {show(zero[block])}; it must be an object such as "
                            "{\"device\": \"cpu\"}")
        # Stage 3's alone, and an optimizer's from stage 1 on: below, DeepSpeed would half obey.
        if stage < (3 if block == "offload_param" else 1):
            check_schema(path, f"zero_optimization.{block}", drop_auto(zero.pop(block, None) or {}))


def check_muon(path: str, config: dict, run: RunConfig) -> None:
    """At stages 1 to 3 DeepSpeed clips Muon's update, not the gradient; stage 3 wants whole gradients."""
    stage = stage_of(config)
    if own_name(config["optimizer"]["type"]) != "muon" or stage == 0:
        return
    if run.grad_clip > 0:
        of_file = "grad_clip" in run.given and not by_user(run, "grad_clip")
        raise UserError(f"{path}: optimizer Muon with gradient clipping {run.grad_clip:g} at stage {stage}: DeepSpeed "
                        "would clip the orthogonal update, not the gradient; "
                        f"{'gradient_clipping 0' if of_file else '--grad_clip 0'}, or stage 0")
    if stage == 3 and config["zero_optimization"].get("reduce_scatter", True):
        raise UserError(f"{path}: optimizer Muon at stage 3 needs zero_optimization.reduce_scatter false")


def keeps_checkpoints(config: dict) -> bool:
    """False where DeepSpeed could not go on from a checkpoint: it forgets moments on NVMe, and torch's Adagrad has its
    parameters twice at stage 3."""
    device, name = optimizer_device(config), own_name(config["optimizer"]["type"])
    return device != "nvme" and not (name == "adagrad" and device == "none" and stage_of(config) == 3)


def notes(raw: dict, run: RunConfig) -> list[str]:
    """What of a file has no effect, and who decided what it leaves open; a line each, for the start."""
    lines = [f"{run.deepspeed}: {key} has no effect: {why}" for key, why in no_effect(raw).items()]
    zero = raw.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if isinstance(zero, bool):
        lines.append(f"{run.deepspeed}: zero_optimization {str(zero).lower()} is an old form of stage {int(zero)}")
        zero = {}
    for block, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if (zero.get(block) or {}).get("device") in ("cpu", "nvme") and stage < least:
            lines.append(f"{run.deepspeed}: zero_optimization.{block} has no effect: it begins with stage {least}")
    if own_name(raw.get("optimizer", {}).get("type", "")) == "muon" and stage > 0:
        lines.append(f"{run.deepspeed}: with Muon at stage {stage} grad_norm is null: DeepSpeed has the update's only")
    params = raw.get("optimizer", {}).get("params", {})
    for key, flag, what in (("lr", "learning_rate", "the rates"), ("betas", "adam_beta1", "betas")):
        if flag in run.unused and params.get(key, "auto") != "auto":
            lines.append(f"{run.deepspeed}: optimizer.params.{key} has no effect: {what} are set elsewhere")
    if not {"fp16", "bf16", "bfloat16"} & set(raw):
        lines.append(f"{run.deepspeed} names no precision: {run.dtype}, from {run.place('dtype')}")
    return lines


def stage_of(config: dict) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def describe(config: dict, dims: ParallelDims) -> str:
    """One line for the log: stage, offload, parallelism, precision, optimizer."""
    zero = config.get("zero_optimization", {})
    parts = [f"ZeRO stage {stage_of(config)}"]
    parts += [f"{what} on {zero[f'offload_{what}']['device']}" for what in ("optimizer", "param")
              if (zero.get(f"offload_{what}") or {}).get("device", "none") not in (None, "none")]
    parts += [f"rows over {dims.sequence} ranks"] if dims.sequence > 1 else []
    parts += [f"experts over {dims.experts} ranks"] if dims.experts > 1 else []
    parts += [next((name for name in ("bf16", "fp16") if config[name]["enabled"]), "fp32")]
    parts += [config["optimizer"]["type"]]
    return ", ".join(parts)

