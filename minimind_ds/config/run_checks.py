"""Flags of a run that say nothing without others, or contradict each other: each is refused in one line.

    python launch/sft.py --deepspeed zero2 --decay_ratio 0.2
"""

from __future__ import annotations

import math
import os

import yaml

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError

# Of a micro-batch: their logits alone would take more than a terabyte.
MOST_TOKENS = 2**26
# Micro-batches that may be empty for all that: a small file is tried with a large one's flags.
MOST_SMALL = 64


def check(run) -> None:
    """Raises UserError for the first flag of a RunConfig that its others leave without a meaning."""
    check_lora(run)
    check_schedule(run)
    if run.batch_size * run.row_len > MOST_TOKENS:
        raise UserError(f"{run.place('batch_size')} is {run.batch_size}, of rows of {run.row_len} tokens: no device "
                        f"holds more than {MOST_TOKENS:,} tokens at once; lower it, or "
                        f"{run.place('pack_len' if run.packing else 'max_seq_len')}")
    if not run.eval_path and not run.eval_fraction:
        without(run, {"keep_best": False, "patience": 0},
                "and nothing is held out to evaluate: name --eval_path or --eval_fraction")


def check_config(run, path: str | None) -> None:
    """Raises UserError where the run's own run.yaml would take the place of the --config that somebody wrote."""
    if path is None or os.path.realpath(path) != os.path.realpath(os.path.join(run.save_dir, "run.yaml")):
        return
    text = untrusted.read_text(path)
    if yaml.safe_dump(untrusted.yaml_mapping(text, path), sort_keys=False, allow_unicode=True) != text:
        raise UserError(f"{path} is a file that the run itself writes: its comments would be lost; move it, or name "
                        "another --save_dir")


def check_step(run, ranks: int, rows: int) -> None:
    """Raises UserError where most micro-batches of a step would be empty, an epoch having so few rows."""
    needed = math.ceil(rows / (ranks * run.batch_size))
    if run.accumulation_steps >= max(2 * needed, MOST_SMALL):
        raise UserError(f"{run.place('accumulation_steps')} is {run.accumulation_steps:,}, and an epoch has {rows:,} "
                        f"rows, {needed:,} micro-batches a rank: the others of each step would be empty; lower it")


def without(run, names: dict, why: str) -> None:
    """Raises UserError for the first of `names` (each with its value that means off) that is not off."""
    for name, off in names.items():
        if getattr(run, name) != off:
            raise UserError(f"{run.place(name)} is {untrusted.shown(getattr(run, name))} {why}")


def check_lora(run) -> None:
    """A LoRA flag without its rank, adapters without a base, a number out of range."""
    if run.lora_rank == 0:
        without(run, {"lora_alpha": None, "lora_targets": None, "lora_dropout": 0},
                "without --lora_rank: name a rank, for example 16")
        return
    if run.from_weight == "none":
        raise UserError(f"{run.place('lora_rank')} is {run.lora_rank}: adapters stand beside a trained model; "
                        "name its weights with --from_weight")
    if run.lora_alpha is not None and not 0 < run.lora_alpha < float("inf"):
        raise UserError(f"{run.place('lora_alpha')} is {run.lora_alpha}; it must be above 0")
    if not 0 <= run.lora_dropout < 1:
        raise UserError(f"{run.place('lora_dropout')} is {run.lora_dropout}; it must be at least 0 and below 1")


def check_schedule(run) -> None:
    """Two lengths of one warm-up, a number of another schedule, phases longer than the run."""
    defaults = {name: field.default for name, field in type(run).__dataclass_fields__.items()}
    if run.warmup_steps and run.warmup_ratio != defaults["warmup_ratio"]:
        raise UserError(f"{run.place('warmup_steps')} is {run.warmup_steps} and {run.place('warmup_ratio')} is "
                        f"{run.warmup_ratio}: both say how long the learning rate rises; give one")
    if run.lr_schedule != "wsd":
        without(run, {"decay_ratio": defaults["decay_ratio"]},
                f"and {run.place('lr_schedule')} is {run.lr_schedule}: it is wsd's; leave one out")
    if run.lr_schedule == "constant":
        without(run, {"min_lr_ratio": defaults["min_lr_ratio"]},
                f"and {run.place('lr_schedule')} is constant: the rate does not fall; leave one out")
    if run.lr_schedule == "wsd" and not run.warmup_steps and run.warmup_ratio + run.decay_ratio > 1:
        raise UserError(f"{run.place('warmup_ratio')} is {run.warmup_ratio} and {run.place('decay_ratio')} is "
                        f"{run.decay_ratio}: together they are more than the run")
