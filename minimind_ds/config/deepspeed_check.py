"""What is wrong in a DeepSpeed JSON, or has no effect here: everything DeepSpeed would refuse, in one line.

    from minimind_ds.config.deepspeed_check import check_keys, no_effect
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import netrc
import os
import pathlib
import re

from minimind_ds.config.deepspeed_keys import (
    FILLED,
    KEYS,
    LARGEST,
    NO_EFFECT,
    NUMBER,
    OLD,
    OPEN,
    POSITIVE,
    PRECISION_OF,
    REFUSED,
    SCHEMAS,
    STEPS,
    WHOLE,
    brief,
    inner_keys,
    is_comment,
    limit,
    near,
    schema_of,
    show,
    unknown,
)
from minimind_ds.config.errors import UserError

# Types that accept "auto": Hugging Face's integration drops the key, and DeepSpeed's default applies.
AUTO_FITS = (bool, POSITIVE, WHOLE, NUMBER, dict)
# DeepSpeed's ZERO_SUPPORTED_OPTIMIZERS, by the names of a file.
TESTED = ("adam", "adamw", "adagrad", "lion", "muon")


def without_comments(config):
    """A copy without the keys that are comments."""
    if isinstance(config, dict):
        return {key: without_comments(value) for key, value in config.items() if not is_comment(key)}
    return [without_comments(value) for value in config] if isinstance(config, list) else config


def check_keys(path: str, raw: dict) -> None:
    """Raises UserError on a key that is unknown, refused, or of the wrong type; what can be known from the file alone.

    Parallelism that is not built in is named before anything else.
    """
    raw = without_comments(raw)
    for key in sorted(raw, key=lambda key: key not in ("tensor_parallel", "pipeline")):
        known = KEYS.get(key)
        refuse_dots(path, key)
        if known is None:
            raise unknown(path, key, KEYS)
        if known.what == REFUSED:
            refuse_unless_off(path, key, raw[key])
    for key, value in raw.items():
        if KEYS[key].what != REFUSED:
            check_block(path, key, value)


def check_numbers(path: str, value, key: str = "") -> None:
    """Raises UserError on a number that is none, or that no counter holds, wherever it stands in a resolved file."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        check_numbers(path, part, f"{key}.{name}" if key else str(name))
    odd = isinstance(value, (int, float)) and not abs(value) < LARGEST
    if odd and not (value == math.inf and key in KEYS and fits(KEYS[key].kind, value)):
        raise UserError(f"{path}: {key[:80]} is {show(value)}; it must be a finite number below 2^63 in size")


def refuse_dots(path: str, key: str) -> None:
    """KEYS has inner keys with dots; a file has not."""
    if "." in key:
        raise UserError(f"{path}: key {show(key)} has a dot: what is after it stands in an object of its own")


def refuse_unless_off(path: str, key: str, value) -> None:
    if not switched_off(key, value):
        raise UserError(f"{path}: {key!r} is not supported: {KEYS[key].why}; leave it out")


def switched_off(key: str, value) -> bool:
    """True for false, null and blocks that say so themselves."""
    if key == "tensor_parallel" and isinstance(value, dict) and value.get("autotp_size", 0) in (0, 1):
        return True
    if key == "zero_optimization.mics_shard_size" and value in (-1, 0, 1):
        return True
    if not isinstance(value, dict):
        return value in (None, False)
    if "enabled" in value:
        return value["enabled"] is False
    # Compression: each of its parts has a switch of its own.
    parts = [part for part in value.values() if isinstance(part, dict)]
    return bool(parts) and all(switched_off(key, part) for part in parts)


def check_block(path: str, key: str, value) -> None:
    """One key of the table and everything under it."""
    known = KEYS.get(key)
    if known is not None and known.what == REFUSED:
        return refuse_unless_off(path, key, value)
    # Numbers that a flag shares are looked at where the two are put together.
    shared = known is not None and known.what == FILLED and known.kind in (POSITIVE, NUMBER, bool)
    if known is not None and known.kind is not None and not shared and not fits(known.kind, value):
        if key == "zero_optimization" and isinstance(value, bool):
            return None
        if value == "auto":
            raise UserError(f"{path}: \"auto\" at {key} cannot be filled in; write a value")
        raise UserError(f"{path}: {key} is {show(value)}; it must be {told(known.kind)}{limit(value)}")
    if not isinstance(value, dict) or key in OPEN:
        return None
    inner = inner_keys(key)
    for name, part in value.items():
        refuse_dots(path, name)
        if name not in inner and not has_schema(key) and inner:
            # What else AutoEP's block may hold is read_dims's to say.
            if key == "expert_parallel" and not near(name, inner):
                continue
            raise unknown(path, f"{key}.{name}", inner)
        check_block(path, f"{key}.{name}", part)
    return None


def has_schema(key: str) -> bool:
    return any(key == block or key.startswith(f"{block}.") for block in (*SCHEMAS, "bfloat16"))


def fits(kind, value) -> bool:
    """Whether a value is of a type as KEYS writes it, or an "auto" that may stand for one."""
    if value == "auto" and (kind in AUTO_FITS[:4] or kind is int):
        return True
    if isinstance(kind, tuple):
        return any(value is None if k is None else fits(k, value) if isinstance(k, type)
                   else isinstance(value, str) and value.lower() == k for k in kind)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
    if kind == STEPS:
        return value == math.inf or fits(POSITIVE, value)
    if kind in (POSITIVE, WHOLE):
        return number and value == int(value) and value >= (1 if kind == POSITIVE else 0)
    if kind == NUMBER:
        return number
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def told(kind) -> str:
    names = {bool: "true or false", dict: "an object", str: "text", int: "a whole number", list: "a list"}
    if isinstance(kind, tuple):
        return " or ".join("null" if k is None else names.get(k) or f"\"{k}\"" for k in kind)
    return names.get(kind, kind)


def is_set(value) -> bool:
    """Whether a setting asks for something: a true, a number, a text, in a block that is not switched off."""
    if isinstance(value, dict):
        return value.get("enabled", True) is not False and any(map(is_set, value.values()))
    return value not in (None, False, "auto")


def no_effect(raw: dict) -> dict[str, str]:
    """The settings of a file that nothing carries out here -> why; only those that ask for something."""
    found = {}

    def look(config: dict, at: str) -> None:
        for key, value in config.items():
            known = KEYS.get(f"{at}{key}")
            if known is None:
                continue
            if known.what == NO_EFFECT and known.why and key not in SCHEMAS:
                if is_set(value):
                    found[f"{at}{key}"] = known.why
            elif known.what == REFUSED:
                if OLD in known.why:
                    found[f"{at}{key}"] = f"{OLD}, and it is switched off"
            elif isinstance(value, dict):
                look(value, f"{at}{key}.")

    raw = without_comments(raw)
    look(raw, "")
    if any(is_set(value) for key, value in raw.get("compile", {}).items() if f"compile.{key}" not in KEYS):
        found["compile"] = KEYS["compile"].why
    return found


def strip(config: dict, at: str = "") -> dict:
    """What is left for DeepSpeed: without comments, switched-off blocks, and settings that have no effect."""
    kept = {}
    for key, value in config.items():
        known = KEYS.get(f"{at}{key}")
        if is_comment(key) or known and known.what in (NO_EFFECT, REFUSED) and key != "compile":
            continue
        kept[key] = strip(value, f"{at}{key}.") if isinstance(value, dict) and f"{at}{key}" not in OPEN else value
    return kept


def drop_auto(config: dict) -> dict:
    """Without the "auto" values that DeepSpeed's schemas drop by themselves: its defaults rule."""
    return {key: drop_auto(value) if isinstance(value, dict) else value
            for key, value in config.items() if value != "auto"}


def check_schemas(path: str, config: dict) -> None:
    """DeepSpeed's own schemas, for the blocks that have one; inner ones first, which know more names."""
    for key in sorted(SCHEMAS, key=lambda key: -key.count(".")):
        block = config
        for part in key.split("."):
            block = block.get(part) or {}
        check_schema(path, key, block)


def check_schema(path: str, key: str, block: dict) -> None:
    """Raises UserError on what a block's schema refuses."""
    from pydantic import ValidationError

    schema = schema_of(key)
    try:
        with quiet():
            schema(**block)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([key, *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            names = list(schema.model_fields) + [f.alias for f in schema.model_fields.values() if f.alias]
            raise unknown(path, name, names) from None
        given = f" is {show(first['input'])}" if first["loc"] else ""
        raise UserError(f"{path}: {name}{given}: {first['msg']}") from None
    except (ValueError, TypeError, AssertionError, OverflowError) as error:
        raise UserError(f"{path}: {key}: {brief(error)}") from None


@contextlib.contextmanager
def quiet():
    """DeepSpeed's own warnings are not for the user: what they say is said here, or in the run."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_whole(path: str, config: dict) -> None:
    """DeepSpeed's own configuration object, made of the resolved file; the key it stumbles over is named."""
    from deepspeed.runtime.config import DeepSpeedConfig

    batch = {"train_micro_batch_size_per_gpu": 1}

    def refusal(part: dict) -> Exception | None:
        try:
            with quiet():
                DeepSpeedConfig({**batch, **part})
        except MemoryError:
            raise
        except Exception as error:
            return error
        return None

    error = refusal(config)
    if error is not None:
        for key, value in config.items():
            alone = refusal({key: value})
            if alone is not None:
                raise UserError(f"{path}: DeepSpeed refuses {key}: {brief(alone)}")
        raise UserError(f"{path}: DeepSpeed refuses it: {brief(error)}")


def check_rules(path: str, config: dict, dtype: str) -> None:
    """What DeepSpeed finds out only when ranks run, or gets wrong: combinations of settings."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {show(stage)}; it must be 0, 1, 2 or 3")
    with quiet():
        # Its values as DeepSpeed reads them: a file may have a number or a switch as text.
        settled = schema_of("zero_optimization")(**zero)
    factor = config.get("gradient_predivide_factor", 1)
    if factor <= 0:
        raise UserError(f"{path}: gradient_predivide_factor is {factor}; it must be above 0")
    for key, odd in (("prescale_gradients", config.get("prescale_gradients", False)),
                     ("gradient_predivide_factor", factor != 1)):
        if odd and stage >= 2 and settled.reduce_scatter:
            raise UserError(f"{path}: DeepSpeed has no {key} at stage {stage} with reduce-scatter; leave it out, or "
                            "set zero_optimization.reduce_scatter to false")
    if factor != 1 and stage == 3:
        # Where the factor equals the ranks, DeepSpeed 0.19.8 leaves the division in: gradients are halved on two.
        raise UserError(f"{path}: gradient_predivide_factor is not supported at stage 3, where DeepSpeed reduces "
                        "gradients wrongly with some factors; leave it out")
    if settled.allgather_bucket_size % 2 and stage in (1, 2):
        raise UserError(f"{path}: zero_optimization.allgather_bucket_size is {zero['allgather_bucket_size']}; "
                        "DeepSpeed wants an even number")
    if settled.zero_hpz_partition_size < 1:
        raise UserError(f"{path}: zero_optimization.zero_hpz_partition_size is 0; it must be at least 1")
    if not settled.compute_grad_norm:
        raise UserError(f"{path}: zero_optimization.compute_grad_norm false is not supported: metrics.jsonl and "
                        "clipping need the norm; leave it out")
    if not settled.load_from_fp32_weights:
        raise UserError(f"{path}: zero_optimization.load_from_fp32_weights false is not supported: a resume takes the "
                        "fp32 masters, to the last bit; leave it out")
    types = config.get("data_types", {})
    for key, stages in (("param_dtype", (0, 1, 2, 3)), ("grad_accum_dtype", (0, 1)), ("buffer_dtype", ())):
        said = types.get(key)
        if said is not None and said not in PRECISION_OF:
            raise UserError(f"{path}: data_types.{key} is {show(said)}; DeepSpeed wants {said.lower()!r}")
        if said is not None and PRECISION_OF[said] != dtype and stage in stages:
            raise UserError(f"{path}: data_types.{key} is {said!r}, and the run's precision is {dtype}; DeepSpeed "
                            f"wants them alike at stage {stage}; leave it out")
    patterns = types.get("keep_in_fp32_modules")
    if patterns is not None and not (isinstance(patterns, list) and all(map(is_pattern, patterns))):
        raise UserError(f"{path}: data_types.keep_in_fp32_modules is {show(patterns)}; it must be a list of patterns")
    name = config["optimizer"]["type"]
    if stage > 0 and config.get("zero_allow_untested_optimizer") is False and name.lower() not in TESTED:
        raise UserError(f"{path}: zero_allow_untested_optimizer is false, and DeepSpeed has not tested ZeRO with the "
                        f"optimizer {name}")


def is_pattern(value) -> bool:
    """Whether DeepSpeed can look for names with it."""
    with contextlib.suppress(re.error):
        return isinstance(value, str) and re.compile(value.replace("*", ".*")) is not None
    return False


def check_outputs(path: str, config: dict) -> None:
    """Raises UserError for a monitor or profiler that is switched on and cannot write where it is told to."""
    for key, name in (("tensorboard", "output_path"), ("csv_monitor", "output_path"),
                      ("flops_profiler", "output_file")):
        block = config.get(key, {})
        if not block.get("enabled", False) or not block.get(name):
            continue
        place = pathlib.Path(os.path.abspath(block[name]))
        folder = next(folder for folder in (place, *place.parents) if folder.exists())
        if name == "output_file" and folder == place:
            folder = place.parent if place.is_file() else place / "is a folder"
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{path}: {key}.{name} is {show(block[name])}, which cannot be written")


def check_packages(path: str, config: dict) -> None:
    """Raises UserError for a monitor that is switched on and cannot work on this machine."""
    check_outputs(path, config)
    needs = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
    for key, package in needs.items():
        block = config.get(key, {})
        if not block.get("enabled", False):
            continue
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{path}: {key}.enabled needs the package {package}; pip install {package}, or leave "
                            f"{key} out")
        if key == "wandb" and not wandb_key():
            raise UserError(f"{path}: wandb.enabled needs a key: run wandb login, set WANDB_API_KEY, or "
                            "WANDB_MODE=offline")
        if key == "comet" and not (block.get("api_key") or os.environ.get("COMET_API_KEY")
                                   or block.get("online") is False):
            raise UserError(f"{path}: comet.enabled needs a key: set COMET_API_KEY or comet.api_key, or comet.online "
                            "false")


def wandb_key() -> bool:
    """Whether Weights & Biases can start without asking for a key."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False

