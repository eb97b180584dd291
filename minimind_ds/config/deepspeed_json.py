"""The DeepSpeed JSON: read it, fill its "auto" values from the run's flags, refuse what is unknown or contradictory.

The file is plain DeepSpeed and may be one the user already has (Hugging Face style "auto" values included).  Each
number has one owner: a value in the JSON rules unless the flag was given too, and then both must agree.

    python -c "from minimind_ds.config.deepspeed_json import read_json; print(read_json('ds_configs/zero2.json'))"
"""

from __future__ import annotations

import copy
import difflib
import json
import pathlib

from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig, ParallelDims
from minimind_ds.config.run import RunConfig

# DeepSpeed 0.19's top-level keys (runtime/config.py, runtime/constants.py).
KNOWN = frozenset("""
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler gradient_clipping
    fp16 bf16 bfloat16 torch_autocast data_types communication_data_type seq_parallel_communication_data_type
    prescale_gradients gradient_predivide_factor gradient_allreduce_op disable_allgather zero_optimization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer aio activation_checkpointing expert_parallel
    steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc log_level timers
    flops_profiler comms_logger tensorboard wandb csv_monitor comet checkpoint compile
    use_data_before_expert_parallelism dataloader_drop_last sequence_parallel_size data_parallel_size
""".split())

# Known to DeepSpeed, but this trainer would not do what they ask for.
REFUSED = {
    "managed_gradient_accumulation": "the trainer decides where a step ends",
    "pipeline": "the models here are not cut into pipeline stages",
    "hybrid_engine": "it serves reinforcement learning",
    "autotuning": "launch/benchmark.py sweeps instead",
    "data_efficiency": "the plan of an epoch is fixed by data, seed and rows per step",
    "curriculum_learning": "the plan of an epoch is fixed by data, seed and rows per step",
    "tensor_parallel": "tensor parallelism does not pay at these sizes and is not built in",
    "weight_quantization": "weights are trained in full precision",
    "compression_training": "weights are trained in full precision",
    "elasticity": "the rows of a step are fixed; resume on another layout instead",
    "torch_autocast": "use bf16 or fp16",
    "amp": "use bf16 or fp16",
}

# JSON path -> the flag that owns the same number.
OWNERS = {
    ("train_micro_batch_size_per_gpu",): "batch_size",
    ("gradient_accumulation_steps",): "accumulation_steps",
    ("gradient_clipping",): "grad_clip",
    ("optimizer", "params", "lr"): "learning_rate",
    ("optimizer", "params", "weight_decay"): "weight_decay",
    ("optimizer", "params", "eps"): "adam_epsilon",
    ("scheduler", "params", "warmup_max_lr"): "learning_rate",
    ("compile", "enabled"): "compile",
}

# DeepSpeed's own keys for sequence and expert parallelism, which this toolkit carries out itself (parallel.py).
PARALLEL_KEYS = ("sequence_parallel_size", "data_parallel_size", "expert_parallel")

ACTIVATION_KEYS = frozenset(("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization",
                             "number_checkpoints", "synchronize_checkpoint_boundary", "profile"))


def read_json(path: str) -> dict:
    """A DeepSpeed JSON file -> dict.

    Raises:
        ValueError: not there, not JSON (with the line), not an object, or a key written twice.
    """
    def no_doubles(pairs):
        keys = [k for k, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: key {key!r} stands there twice")
        return dict(pairs)

    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the DeepSpeed file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the DeepSpeed file {path} is not UTF-8") from None
    try:
        config = json.loads(text, object_pairs_hook=no_doubles)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed file holds one JSON object")
    return config


def resolve(raw: dict, run: RunConfig, model: ModelConfig, *, ranks: int, total_steps: int) -> tuple[dict, RunConfig]:
    """Fill and check a DeepSpeed configuration.

    Args:
        raw: as read from the file; not changed.
        run: the flags; `run.deepspeed` names the file in messages, `run.dtype` is already chosen.
        model: gives the sizes for Hugging Face's "auto" buckets.
        ranks: data-parallel ranks: those that share a row count as one.
        total_steps: optimizer steps of the whole run, for a scheduler's "auto"; 0 where not known yet.

    Returns:
        The configuration without any "auto", and the run with the numbers that the JSON owns.

    Raises:
        ValueError: unknown or refused key, wrong type, or a number given twice with two values.
    """
    path = run.deepspeed
    check_keys(path, raw)
    config = {key: value for key, value in copy.deepcopy(raw).items() if key not in PARALLEL_KEYS}
    if "bfloat16" in config:
        if "bf16" in config:
            raise UserError(f"{path}: bf16 and bfloat16 are one block; keep one")
        config["bf16"] = config.pop("bfloat16")
    run = own_batch(config, run, ranks)
    for keys, name in OWNERS.items():
        run = own(config, keys, name, run)
    run = own_betas(config, run)
    run = own_precision(config, run)
    fill_optimizer(config, run)
    fill_scheduler(config, run, total_steps)
    fill_buckets(config, model)
    # Defaults that moved between DeepSpeed releases are set explicitly.
    config["gradient_clipping"] = float(run.grad_clip)
    config.setdefault("steps_per_print", 10**9)
    if config["steps_per_print"] == "auto":
        config["steps_per_print"] = 10**9
    config.setdefault("wall_clock_breakdown", False)
    config.setdefault("zero_allow_untested_optimizer", True)
    left = find_auto(config)
    if left:
        raise UserError(f"{path}: \"auto\" at {left} cannot be filled in; write a value")
    check_zero(path, config)
    return config, run


def check_keys(path: str, raw: dict) -> None:
    for key in raw:
        if key in REFUSED:
            raise UserError(f"{path}: {key!r} is not supported: {REFUSED[key]}")
        if key not in KNOWN:
            close = difflib.get_close_matches(key, KNOWN, n=1)
            raise UserError(f"{path}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    blocks = {"optimizer": {"type", "params", "legacy_fusion"}, "scheduler": {"type", "params"},
              "activation_checkpointing": ACTIVATION_KEYS}
    for key, allowed in blocks.items():
        block = raw.get(key, {})
        if not isinstance(block, dict):
            raise UserError(f"{path}: {key} is {block!r}; it must be an object")
        for name in block:
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                raise UserError(f"{path}: unknown key {key}.{name}"
                                 + (f"; did you mean {close[0]!r}?" if close else ""))
    for key in ("zero_optimization", "fp16", "bf16", "bfloat16", "checkpoint", "data_types", "aio", "compile"):
        if not isinstance(raw.get(key, {}), dict):
            raise UserError(f"{path}: {key} is {raw[key]!r}; it must be an object")


def lookup(config: dict, keys: tuple):
    for key in keys:
        if not isinstance(config, dict) or key not in config:
            return None
        config = config[key]
    return config


def assign(config: dict, keys: tuple, value) -> None:
    for key in keys[:-1]:
        config = config[key]
    config[keys[-1]] = value


def agree(run: RunConfig, name: str, value, where: str) -> RunConfig:
    """The run with `name` = value from the JSON; an error if the flag was given with another value."""
    kind = type(getattr(run, name))
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float)):
        raise UserError(f"{run.deepspeed}: {where} is {value!r}; it must be a {'flag' if kind is bool else 'number'}")
    if kind is int and value != int(value):
        raise UserError(f"{run.deepspeed}: {where} is {value!r}; it must be a whole number")
    if name in run.given and getattr(run, name) != kind(value):
        raise UserError(f"{name} is {getattr(run, name)} ({run.place(name)}) and {value} in {run.deepspeed} "
                         f"({where}): give it once, or \"auto\" in the JSON")
    return run.replace(**{name: kind(value)}, given={**run.given, name: f"{where} in {run.deepspeed}"})


def own(config: dict, keys: tuple, name: str, run: RunConfig) -> RunConfig:
    value = lookup(config, keys)
    if value is None:
        return run
    if value == "auto":
        assign(config, keys, getattr(run, name))
        return run
    return agree(run, name, value, ".".join(keys))


def own_batch(config: dict, run: RunConfig, ranks: int) -> RunConfig:
    """train_batch_size = rows per micro-batch × accumulation × ranks; two of the three decide the third."""
    micro, steps = (lookup(config, (k,)) for k in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
    total = config.pop("train_batch_size", None)
    where = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    for value, key, name in ((micro, where[0], "batch_size"), (steps, where[1], "accumulation_steps")):
        if value not in (None, "auto"):
            run = agree(run, name, value, key)
    if total not in (None, "auto"):
        if not isinstance(total, int) or isinstance(total, bool) or total < 1:
            raise UserError(f"{run.deepspeed}: train_batch_size is {total!r}; it must be a positive whole number")
        rows = run.batch_size * ranks
        if "batch_size" in run.given and "accumulation_steps" not in run.given and total % rows == 0:
            run = agree(run, "accumulation_steps", total // rows, "train_batch_size")
        elif "batch_size" not in run.given and total % (run.accumulation_steps * ranks) == 0:
            run = agree(run, "batch_size", total // (run.accumulation_steps * ranks), "train_batch_size")
        if total != run.batch_size * run.accumulation_steps * ranks:
            raise UserError(f"{run.deepspeed}: train_batch_size is {total}, but batch_size {run.batch_size} × "
                             f"accumulation_steps {run.accumulation_steps} × {ranks} ranks is "
                             f"{run.batch_size * run.accumulation_steps * ranks}")
    config["train_micro_batch_size_per_gpu"] = run.batch_size
    config["gradient_accumulation_steps"] = run.accumulation_steps
    return run


def own_betas(config: dict, run: RunConfig) -> RunConfig:
    betas = lookup(config, ("optimizer", "params", "betas"))
    if betas is None:
        return run
    if betas == "auto":
        config["optimizer"]["params"]["betas"] = [run.adam_beta1, run.adam_beta2]
        return run
    if not isinstance(betas, list) or len(betas) != 2:
        raise UserError(f"{run.deepspeed}: optimizer.params.betas is {betas!r}; it must be two numbers")
    for i, name in enumerate(("adam_beta1", "adam_beta2")):
        run = agree(run, name, betas[i], f"optimizer.params.betas[{i}]")
    return run


def own_precision(config: dict, run: RunConfig) -> RunConfig:
    """fp16.enabled / bf16.enabled <-> --dtype."""
    said = {}
    for name in ("fp16", "bf16"):
        block = config.setdefault(name, {"enabled": "auto"})
        enabled = block.get("enabled", False)
        if enabled not in (True, False, "auto"):
            raise UserError(f"{run.deepspeed}: {name}.enabled is {enabled!r}; it must be true, false or \"auto\"")
        said[name] = enabled
    if said["fp16"] is True and said["bf16"] is True:
        raise UserError(f"{run.deepspeed}: fp16 and bf16 are both enabled; keep one")
    named = next((name for name in said if said[name] is True), None)
    # Neither block says "auto" and neither is enabled: the file asks for fp32.
    if named is None and "auto" not in said.values():
        named = "fp32"
    if named is None and said.get(run.dtype) is False:
        raise UserError(f"--dtype {run.dtype} ({run.place('dtype')}) and {run.dtype}.enabled false in "
                         f"{run.deepspeed}: give it once, or \"auto\" in the JSON")
    if named is not None:
        if "dtype" in run.given and run.dtype != named:
            raise UserError(f"dtype is {run.dtype} ({run.place('dtype')}) and {named} in {run.deepspeed}: "
                             "give it once, or \"auto\" in the JSON")
        run = run.replace(dtype=named, given={**run.given, "dtype": f"{named} in {run.deepspeed}"})
    hf_defaults = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
                   "min_loss_scale": 1}
    for name in ("fp16", "bf16"):
        block = config[name]
        block["enabled"] = run.dtype == name
        for key, value in block.items():
            if value == "auto" and key in hf_defaults:
                block[key] = hf_defaults[key]
        if block.get("auto_cast") == "auto":
            block["auto_cast"] = False
    if run.dtype == "bf16":
        config["bf16"].setdefault("check_grad_overflow", True)
    return run


def fill_optimizer(config: dict, run: RunConfig) -> None:
    """Without an optimizer in the JSON: AdamW, torch's fused one, or DeepSpeed's CPU Adam for offloaded states."""
    if "optimizer" in config:
        if not isinstance(config["optimizer"].get("type"), str):
            raise UserError(f"{run.deepspeed}: optimizer has no type")
        config["optimizer"].setdefault("params", {})
        # A JSON without lr leaves it to the flag.
        config["optimizer"]["params"].setdefault("lr", run.learning_rate)
        return
    params = dict(lr=run.learning_rate, betas=[run.adam_beta1, run.adam_beta2], eps=run.adam_epsilon,
                  weight_decay=run.weight_decay)
    if not offloads_optimizer(config):
        params |= dict(torch_adam=True, fused=True)
    config["optimizer"] = {"type": "AdamW", "params": params}


def optimizer_device(config: dict) -> str:
    """Where the ZeRO block offloads optimizer states to: "cpu", "nvme" or "none"."""
    zero = config.get("zero_optimization", {})
    named = (zero.get("offload_optimizer") or {}).get("device") or "none"
    return "cpu" if named == "none" and zero.get("cpu_offload", False) else named


def offloads_optimizer(config: dict) -> bool:
    """True when the ZeRO block keeps optimizer states on the CPU or on NVMe."""
    return optimizer_device(config) != "none"


def fill_scheduler(config: dict, run: RunConfig, total_steps: int) -> None:
    """A scheduler in the JSON is honoured; its "auto" values come from the flags, as in Hugging Face's Trainer."""
    if "scheduler" not in config:
        return
    params = config["scheduler"].setdefault("params", {})
    auto = {"total_num_steps": total_steps, "warmup_num_steps": max(1, round(run.warmup_ratio * total_steps)),
            "warmup_min_lr": 0.0, "warmup_max_lr": run.learning_rate, "cos_min_ratio": run.min_lr_ratio}
    for key, value in params.items():
        if value == "auto" and key in auto:
            params[key] = auto[key]


def fill_buckets(config: dict, model: ModelConfig) -> None:
    """Hugging Face's rules for "auto" buckets (transformers/integrations/deepspeed.py)."""
    zero = config.get("zero_optimization", {})
    square = model.hidden_size * model.hidden_size
    auto = {"reduce_bucket_size": square, "stage3_prefetch_bucket_size": int(0.9 * square),
            "stage3_param_persistence_threshold": 10 * model.hidden_size,
            "stage3_gather_16bit_weights_on_model_save": False, "allgather_bucket_size": square}
    for key, value in zero.items():
        if value == "auto" and key in auto:
            zero[key] = auto[key]
    for block in ("offload_optimizer", "offload_param"):
        if (zero.get(block) or {}).get("device") == "auto":
            zero[block]["device"] = "none"


def find_auto(config, at: str = "") -> str | None:
    """Where an "auto" is left, as a dotted path, or None."""
    if config == "auto":
        return at
    if isinstance(config, dict):
        for key, value in config.items():
            found = find_auto(value, f"{at}.{key}" if at else key)
            if found:
                return found
    return None


def check_zero(path: str, config: dict) -> None:
    """DeepSpeed's own schemas for the blocks that have one."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    schemas = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for key, schema in schemas.items():
        try:
            schema(**config.get(key, {}))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                close = difflib.get_close_matches(name.split(".")[-1], schema.model_fields, n=1)
                raise UserError(f"{path}: unknown key {key}.{name}"
                                 + (f"; did you mean {close[0]!r}?" if close else "")) from None
            raise UserError(f"{path}: {key}.{name}: {first['msg']}") from None
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if config.get("zero_optimization", {}).get("contiguous_gradients") is False and stage == 2:
        raise UserError(f"{path}: zero_optimization.contiguous_gradients false gave wrong gradients at stage 2 in "
                         "DeepSpeed up to 0.19.6; leave it out")


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

