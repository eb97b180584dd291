"""The optimizer and scheduler blocks of a DeepSpeed JSON: what they leave out comes from the flags, and a flag that
they have no place for is an error.

    from minimind_ds.config.deepspeed_optimizer import fill_optimizer, fill_scheduler
"""

from __future__ import annotations

import inspect
import warnings

import torch

from minimind_ds.config.deepspeed_check import quiet
from minimind_ds.config.deepspeed_keys import LARGEST, brief, limit, show, unknown
from minimind_ds.config.errors import UserError
from minimind_ds.config.run import RunConfig

# Arguments of optimizers -> the flags that own them.
OWNERS = {"lr": ("learning_rate",), "weight_decay": ("weight_decay",), "betas": ("adam_beta1", "adam_beta2"),
          "eps": ("adam_epsilon",)}
# DeepSpeed's own names; any other is a class of torch.optim, spelt as there.
OWN = ("adam", "adamw", "adagrad", "lamb", "lion", "muon", "muadam", "muadamw", "musgd")
ADAM_LIKE = ("adam", "adamw", "lamb", "muon", "NAdam", "RAdam", "Adamax")
REMOVED = ("onebitadam", "onebitlamb", "zerooneadam")
# They need a closure, or sparse gradients, or whole matrices where ZeRO has parts of a flat buffer.
NOT_HERE = {"LBFGS": "it calls the model several times a step", "SparseAdam": "gradients are dense here",
            **dict.fromkeys(("muadam", "muadamw", "musgd"), "µP needs base shapes, which these models do not carry")}
WHOLE_MATRICES = ("lamb", "Adafactor", "Muon")
# What DeepSpeed's engine takes out of `params` before it makes an Adam, and Muon's keys, which it does not check.
TAKEN_OUT = {"torch_adam": False, "adam_w_mode": True, "fp32_optimizer_states": True}
MUON = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "ns_method": "gram", "betas": (0.9, 0.95), "eps": 1e-10,
        "muon_lr": None, "adam_lr": None, "per_head_muon": False, **TAKEN_OUT}
OWN_RATES = ("muon_lr", "adam_lr")
# They say how an update is computed, not what it is.
MANNERS = ("torch_adam", "fp32_optimizer_states", "set_grad_none", "fused", "foreach", "capturable", "differentiable")
# DeepSpeed's schedulers (runtime/lr_schedules.py).  The first three take their rates from their own arguments.
WARMUPS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
SCHEDULERS = ("OneCycle", "LRRangeTest", *WARMUPS)
# Steps that a scheduler is tried for: a tenth of a second.
MOST_TRIED = 10_000


def agree(run: RunConfig, name: str, value, where: str) -> RunConfig:
    """The run with `name` = value from the JSON; an error if the flag was given with another value."""
    kind = type(getattr(run, name))
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        must = "true or false" if kind is bool else f"a number{limit(value)}"
        raise UserError(f"{run.deepspeed}: {where} is {show(value)}; it must be {must}")
    if kind is int and value != int(value):
        raise UserError(f"{run.deepspeed}: {where} is {show(value)}; it must be a whole number")
    if name in run.given and getattr(run, name) != kind(value):
        raise UserError(f"{name} is {getattr(run, name)} ({run.place(name)}) and {show(value)} in {run.deepspeed} "
                        f"({where}): give it once, or \"auto\" in the JSON")
    # A flag that agrees is still a flag that was given.
    given = run.given if by_user(run, name) else {**run.given, name: f"{where} in {run.deepspeed}"}
    return run.replace(**{name: kind(value)}, given=given)


def by_user(run: RunConfig, name: str) -> bool:
    """Whether a flag was given, on the command line or in a run YAML, and not by the JSON itself."""
    return name in run.given and not run.given[name].endswith(f" in {run.deepspeed}")


def no_place(run: RunConfig, name: str, why: str) -> RunConfig:
    """The run without a flag that means nothing to its optimizer or scheduler; an error if it was given."""
    if by_user(run, name):
        raise UserError(f"{name} ({run.place(name)}) has no effect with {run.deepspeed}: {why}; leave one out")
    return run.replace(unused=tuple(dict.fromkeys((*run.unused, name))))


def fill_optimizer(config: dict, run: RunConfig, device: str) -> RunConfig:
    """`optimizer` complete, its numbers in the run and the run's in it; without a block: AdamW, torch's fused one, or
    DeepSpeed's CPU Adam for offloaded states."""
    if "optimizer" not in config:
        params = dict(lr=run.learning_rate, betas=[run.adam_beta1, run.adam_beta2], eps=run.adam_epsilon,
                      weight_decay=run.weight_decay)
        if not offloads_optimizer(config):
            params |= dict(torch_adam=True, fused=True)
        config["optimizer"] = {"type": "AdamW", "params": params}
        check_params(run, config["optimizer"], {})
        return run
    block, path = config["optimizer"], run.deepspeed
    if not isinstance(block.get("type"), str):
        raise UserError(f"{path}: optimizer has no type")
    params = block.setdefault("params", {})
    if "max_grad_norm" in params:
        raise UserError(f"{path}: optimizer.params.max_grad_norm: write gradient_clipping at the top instead")
    name = own_name(block["type"])
    known = arguments(path, name, params, config, device)
    for key in params:
        if key not in known:
            raise unknown(path, f"optimizer.params.{key}", known)
    for key, flags in OWNERS.items():
        run = own(run, params, key, flags, known, name)
    for key in [key for key, value in params.items() if value == "auto"]:
        del params[key]
    if all(key in params for key in OWN_RATES):
        run = no_place(run, "learning_rate", "optimizer.params.muon_lr and adam_lr set the rates of all groups")
    check_params(run, block, known)
    return run


def own_name(kind: str) -> str:
    """DeepSpeed's names are the same in capitals; torch's are not."""
    return kind.lower() if kind.lower() in OWN else kind


def own(run: RunConfig, params: dict, key: str, flags: tuple, known: dict, name: str) -> RunConfig:
    """One argument of the optimizer and its flags."""
    where = f"optimizer.params.{key}"
    if key not in known:
        for flag in flags:
            run = no_place(run, flag, f"the optimizer {name} has no {key}")
        return run
    values = [getattr(run, flag) for flag in flags]
    fills = key in ("lr", "weight_decay") or name in ADAM_LIKE or any(by_user(run, flag) for flag in flags)
    said = params.get(key)
    if said is None and not fills:
        said = known[key]
    if said is None or said == "auto":
        params[key] = values if len(flags) > 1 else values[0]
        return run
    said = list(said) if isinstance(said, tuple) else said
    if len(flags) > 1 and not (isinstance(said, list) and len(said) == len(flags)):
        raise UserError(f"{run.deepspeed}: {where} is {show(said)}; it must be two numbers")
    params[key] = said
    for i, flag in enumerate(flags):
        run = agree(run, flag, said[i] if len(flags) > 1 else said, where + (f"[{i}]" if len(flags) > 1 else ""))
    return run


def arguments(path: str, name: str, params: dict, config: dict, device: str) -> dict:
    """The arguments that an optimizer of the installed DeepSpeed or torch takes -> their defaults.

    Raises:
        UserError: there is none of this name, or not at this stage or on this device.
    """
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if name.lower() in REMOVED:
        raise UserError(f"{path}: optimizer {name}: DeepSpeed has removed its 1-bit optimizers; use AdamW")
    made = getattr(torch.optim, name, None) if name not in OWN else None
    is_class = inspect.isclass(made) and issubclass(made, torch.optim.Optimizer) and made is not torch.optim.Optimizer
    if name not in OWN and not is_class:
        raise UserError(f"{path}: optimizer.type is {show(name)}: neither DeepSpeed nor torch.optim has it; choose "
                        "AdamW, Adam, Lion, Muon, Adagrad or SGD")
    if name in NOT_HERE:
        raise UserError(f"{path}: optimizer {name} is not supported: {NOT_HERE[name]}")
    if name in WHOLE_MATRICES and stage > 0:
        raise UserError(f"{path}: optimizer {name} needs whole matrices, and at ZeRO stage {stage} a rank updates "
                        "parts of a flat buffer; use stage 0, or another optimizer")
    if name == "muon":
        return MUON
    cls = optimizer_class(path, name, params, config, device)
    left_out = ("self", "params", "model_params", "adamw_mode", "kwargs")
    own = {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items() if key not in left_out}
    return {**own, **(TAKEN_OUT if name in ("adam", "adamw") else {})}


def optimizer_class(path: str, name: str, params: dict, config: dict, device: str) -> type:
    """The class that DeepSpeed's engine makes of a name."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    offloaded = offloads_optimizer(config)
    if name in ("adam", "adamw"):
        if params.get("torch_adam") not in (None, False):
            return torch.optim.AdamW
        return DeepSpeedCPUAdam if offloaded else FusedAdam
    if name == "adagrad":
        return DeepSpeedCPUAdagrad if offloaded else torch.optim.Adagrad
    if name in ("lamb", "lion") and device == "cpu" and not (name == "lion" and offloaded):
        also = "; with zero_optimization.offload_optimizer.device \"cpu\" it has one" if name == "lion" else ""
        raise UserError(f"{path}: DeepSpeed has no optimizer {name} for this machine's processor{also}")
    if name == "lion":
        return DeepSpeedCPULion if offloaded else FusedLion
    if name == "lamb":
        return FusedLamb
    return getattr(torch.optim, name)


def check_params(run: RunConfig, block: dict, known: dict) -> None:
    """Raises UserError on a value that the optimizer cannot use: of the wrong type or out of range."""
    params, name = block["params"], own_name(block["type"])
    places = {key: [run.place(flag) for flag in flags] for key, flags in OWNERS.items()}

    def say(key: str, value, must: str, i: int = 0) -> UserError:
        where = places[key][i] if key in places else f"{run.deepspeed}: optimizer.params.{key}"
        return UserError(f"{where} is {show(value)}; it must be {must}")

    for key, value in params.items():
        default = known.get(key)
        for i, one in enumerate(value if key == "betas" else [value]):
            if key in OWNERS or key in OWN_RATES or type(default) in (int, float):
                if isinstance(one, bool) or not isinstance(one, (int, float)) or not abs(one) < LARGEST:
                    raise say(key, one, f"a number{limit(one)}", i)
                if key == "betas" and not 0 <= one < 1 or key == "momentum" and not 0 <= one < 1:
                    raise say(key, one, "at least 0 and below 1", i)
                if one < 0 and key in (*OWNERS, *OWN_RATES):
                    raise say(key, one, "at least 0", i)
            elif (isinstance(default, bool) or key in MANNERS and one is not None) and not isinstance(one, bool):
                raise say(key, one, "true or false")
            elif isinstance(default, str) and not isinstance(one, str):
                raise say(key, one, "text")
    if name == "muon" and params.get("ns_method", "gram") not in ("gram", "standard"):
        raise say("ns_method", params["ns_method"], "\"gram\" or \"standard\"")
    if params.get("amsgrad") and "set_grad_none" in known:
        raise UserError(f"{run.deepspeed}: optimizer.params.amsgrad: DeepSpeed's Adam has none; torch_adam true does")
    torch_name = "AdamW" if params.get("torch_adam") else name if name not in OWN else None
    if torch_name:
        kept = {key: value for key, value in params.items() if key not in TAKEN_OUT}
        try_optimizer(run.deepspeed, torch_name, kept)


def try_optimizer(path: str, name: str, params: dict) -> None:
    """One step of torch's optimizer on one element; what it does not like is the user's to know."""
    def step(params: dict) -> None:
        one = torch.nn.Parameter(torch.zeros(1, 1))
        one.grad = torch.zeros(1, 1)
        getattr(torch.optim, name)([one], **params).step()

    try_params(path, f"optimizer {name}", "optimizer", params, step)


def try_params(path: str, what: str, block: str, params: dict, use) -> None:
    """Raises UserError where use(params) fails; parameters without any one of which it would not are named."""
    try:
        return use(params)
    except MemoryError:
        raise
    except Exception as error:
        said = brief(error)
    found = []
    for key, value in params.items():
        try:
            use({name: other for name, other in params.items() if name != key})
        except Exception:  # noqa: BLE001  (as before without this one: it is not to blame)
            continue
        found.append(f"{block}.params.{key} is {show(value)}")
    raise UserError(f"{path}: {' and '.join(found) or what}: {said}")


def optimizer_device(config: dict) -> str:
    """Where the ZeRO block offloads optimizer states to: "cpu", "nvme" or "none"."""
    zero = config.get("zero_optimization", {})
    named = (zero.get("offload_optimizer") or {}).get("device") or "none"
    return "cpu" if named == "none" and zero.get("cpu_offload", False) else named


def offloads_optimizer(config: dict) -> bool:
    """True when the ZeRO block keeps optimizer states on the CPU or on NVMe."""
    return optimizer_device(config) != "none"


def builds_optimizer(config: dict) -> bool:
    """True where DeepSpeed compiles the optimizer at first use."""
    block = config["optimizer"]
    name = own_name(block["type"])
    if offloads_optimizer(config):
        return name in ("adam", "adamw", "adagrad", "lion", "muon") and not block["params"].get("torch_adam")
    return name in ("adam", "adamw", "lion", "lamb", "muon") and not block["params"].get("torch_adam")


def own_settings(config: dict, device: str) -> dict:
    """Of a resolved file: what its optimizer and scheduler say that no flag does and that decides an update."""
    block = config["optimizer"]
    name, params = own_name(block["type"]), block["params"]
    defaults = arguments("", name, params, config, device)
    return {"optimizer": {key: value for key, value in params.items()
                          if key not in (*OWNERS, *MANNERS) and value != defaults.get(key)},
            "scheduler": config.get("scheduler", {}).get("params", {})}


def fill_scheduler(config: dict, run: RunConfig, total_steps: int) -> RunConfig:
    """`scheduler` complete, as Hugging Face's Trainer fills its "auto" values; flags without a place in it refused."""
    if "scheduler" not in config:
        return run
    block, path = config["scheduler"], run.deepspeed
    kind = block.get("type")
    if not isinstance(kind, str):
        raise UserError(f"{path}: scheduler has no type")
    params, cls = block.setdefault("params", {}), scheduler_class(path, kind, config)
    known = {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items()
             if key not in ("self", "optimizer", "last_batch_iteration", "last_epoch", "verbose")}
    for key in params:
        if key not in known:
            raise unknown(path, f"scheduler.params.{key}", known)
    run = own_peak(run, config["optimizer"]["params"], kind, params)
    run = own_shape(run, kind, params, known, total_steps)
    for key in [key for key, value in params.items() if value == "auto"]:
        del params[key]
    for key, default in known.items():
        if default is inspect.Parameter.empty and key not in params:
            raise UserError(f"{path}: scheduler {kind} needs params.{key}")
    for key, value in params.items():
        numbers = value if isinstance(value, list) else [value]
        if kind in SCHEDULERS and key != "warmup_type" and not (value is None and known[key] is None) and not all(
                isinstance(one, (int, float)) for one in numbers):
            raise UserError(f"{path}: scheduler.params.{key} is {show(value)}; it must be a number")
    if params.get("warmup_type", "log") not in ("log", "linear"):
        raise UserError(f"{path}: scheduler.params.warmup_type is {show(params['warmup_type'])}; it must be "
                        "\"log\" or \"linear\"")
    try_scheduler(path, cls, params, [key for key in OWN_RATES if key in config["optimizer"]["params"]], total_steps)
    return run


def scheduler_class(path: str, kind: str, config: dict) -> type:
    from deepspeed.runtime import lr_schedules

    if kind in SCHEDULERS:
        return getattr(lr_schedules, kind)
    cls = getattr(torch.optim.lr_scheduler, kind, None)
    if not inspect.isclass(cls) or not issubclass(cls, torch.optim.lr_scheduler.LRScheduler):
        raise UserError(f"{path}: scheduler.type is {show(kind)}; choose from {', '.join(SCHEDULERS)}")
    zero = config.get("zero_optimization", {}).get("stage", 0)
    if zero > 0 or config["bf16"]["enabled"] or config["fp16"]["enabled"]:
        raise UserError(f"{path}: scheduler {kind} is torch's, which DeepSpeed can use at stage 0 in fp32 only; "
                        f"choose from {', '.join(SCHEDULERS)}, or leave it out: --lr_schedule gives the usual ones")
    if kind == "ReduceLROnPlateau":
        raise UserError(f"{path}: scheduler {kind} waits for a loss that DeepSpeed does not give it")
    return cls


def own_peak(run: RunConfig, optimizer: dict, kind: str, params: dict) -> RunConfig:
    """The scheduler's highest rate and --learning_rate."""
    path, rates = run.deepspeed, [key for key in OWN_RATES if key in optimizer]
    if kind in ("WarmupLR", "WarmupDecayLR"):
        said = params.get("warmup_max_lr")
        if rates and (said is not None or kind == "WarmupDecayLR"):
            raise UserError(f"{path}: scheduler {kind} sets one rate for all groups, and optimizer.params.{rates[0]} "
                            "another; use WarmupLR without warmup_max_lr, or WarmupCosineLR, which keep the ratio")
        if rates:
            return run
        if said in (None, "auto"):
            params["warmup_max_lr"] = run.learning_rate
            return run
        return agree(run, "learning_rate", said, "scheduler.params.warmup_max_lr")
    if kind == "WarmupCosineLR":
        return run
    if kind in ("OneCycle", "LRRangeTest", "OneCycleLR", "CyclicLR"):
        if rates:
            raise UserError(f"{path}: scheduler {kind} sets the rates of all groups, and optimizer.params.{rates[0]} "
                            "another; leave one out")
        run = no_place(run, "learning_rate", f"scheduler {kind} sets the rate")
        if kind == "OneCycle" and params.get("cycle_momentum", True):
            for name in ("adam_beta1", "adam_beta2"):
                run = no_place(run, name, "OneCycle with cycle_momentum sets betas")
    return run


def own_shape(run: RunConfig, kind: str, params: dict, known: dict, total_steps: int) -> RunConfig:
    """Warm-up, length and end of a schedule, and the flags that say them where it does not."""
    if kind in WARMUPS and params.get("warmup_num_steps", "auto") == "auto":
        params["warmup_num_steps"] = run.warmup_steps or max(1, round(run.warmup_ratio * total_steps))
    else:
        for name in ("warmup_ratio", "warmup_steps"):
            run = no_place(run, name, f"scheduler {kind} sets its own steps")
    for name in ("lr_schedule", "decay_ratio"):
        run = no_place(run, name, f"scheduler {kind} is the schedule")
    if kind == "WarmupCosineLR":
        if params.get("cos_min_ratio", "auto") == "auto":
            params["cos_min_ratio"] = run.min_lr_ratio
        else:
            run = agree(run, "min_lr_ratio", params["cos_min_ratio"], "scheduler.params.cos_min_ratio")
    else:
        run = no_place(run, "min_lr_ratio", f"scheduler {kind} sets where the rate ends")
    if "total_num_steps" in known and params.get("total_num_steps", "auto") == "auto":
        params["total_num_steps"] = total_steps
    return run


def try_scheduler(path: str, cls: type, params: dict, rates: list[str], total_steps: int) -> None:
    """The scheduler over a small optimizer, for as many steps as the run has, up to MOST_TRIED."""
    def walk(params: dict) -> None:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in rates or "1"]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            schedule = cls(optimizer, **params)
            optimizer.step()
            for _ in range(min(total_steps or 1, MOST_TRIED)):
                check_groups(optimizer.param_groups)
                schedule.step()
            check_groups(optimizer.param_groups)

    try_params(path, f"scheduler {cls.__name__}", "scheduler", params, walk)


def check_groups(groups: list[dict]) -> None:
    """Raises ValueError for a rate or a beta that a scheduler made impossible."""
    for group in groups:
        # -1e-12: the rounding of a cosine.
        if not -1e-12 <= group["lr"] < LARGEST:
            raise ValueError(f"the rate becomes {group['lr']}")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas become {group['betas']}")
