"""The command line of sft and pretrain: run.RunConfig's fields as flags, in the groups of --help.

    python launch/sft.py --help
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterable

from minimind_ds.config import spellings
from minimind_ds.config.spellings import OneLineParser, auto_or_int, program_parser, to_bool
from minimind_ds.paths import EXAMPLES

# The programs' own defaults, and what their data holds.
PROGRAMS = {
    "sft": {"data_path": str(EXAMPLES / "sft_train.jsonl"), "save_weight": "sft"},
    "pretrain": {"data_path": str(EXAMPLES / "pretrain.jsonl"), "save_weight": "pretrain",
                 "too_long": "split"},
}
KINDS = {"sft": "conversations", "pretrain": "text"}
FIRST = "most used"
# Every flag stands in one group; --config, which is no field, comes before them all.
GROUPS = {
    FIRST: ("deepspeed", "preset", "data_path", "eval_path", "from_weight", "save_dir", "epochs", "batch_size",
            "accumulation_steps", "learning_rate", "max_seq_len", "lora_rank"),
    "data": ("tokenizer", "tokenizer_mismatch", "eval_fraction", "too_long", "pack_len", "packing", "on_bad_record",
             "learn", "text_markers", "random_system_ratio", "drop_empty_think_ratio", "cache_dir", "num_workers"),
    "model": ("dropout", "grow_vocab", "moe_balance", "lora_alpha", "lora_targets", "lora_dropout",
              *spellings.SHAPE),
    "training": ("max_steps", "stop_after", "lr_schedule", "warmup_ratio", "warmup_steps", "decay_ratio",
                 "min_lr_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "grad_clip", "seed"),
    "evaluation": ("eval_interval", "keep_best", "patience"),
    "distribution and speed": ("dtype", "kernels", "gradient_checkpointing", "compile"),
    "checkpoints": ("from_resume", "save_weight", "save_interval", "keep", "keep_weights_only"),
    "faults": ("on_spike", "on_non_finite", "hang_minutes"),
    "logging": ("log_interval", "use_wandb", "wandb_project", "use_tensorboard"),
}


def parser(program: str, fields: Iterable[tuple[dataclasses.Field, type]], defaults: dict) -> OneLineParser:
    """The parser of a program; `fields` are RunConfig's, each with its type, `defaults` the program's own."""
    p = program_parser(program, allow_abbrev=False, epilog=spellings.epilog(), hints=spellings.HINTS,
                       same=spellings.SAME, usage="%(prog)s --deepspeed FILE [--flag VALUE ...]")
    p.add_argument("--config", metavar="RUN.YAML", help="YAML file with any of the flags below")
    # The launcher adds --local_rank; the rank itself is read from the environment.
    p.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    of_flag = {f.name: (f, kind) for f, kind in fields}
    grouped = {name for names in GROUPS.values() for name in names}
    for title, names in {**GROUPS, "others": tuple(sorted(of_flag.keys() - grouped))}.items():
        group = p.add_argument_group(title)
        for name in names:
            if name in spellings.SHAPE:
                kind, text = spellings.SHAPE[name]
                group.add_argument(f"--{name}", type=kind, help=text, metavar="0|1" if kind is to_bool else "N")
            else:
                add(group, *of_flag[name], defaults)
    return p


def add(group, f: dataclasses.Field, kind: type, defaults: dict) -> None:
    """One field as a flag, its default told in the help; not given, it is None."""
    default, extra = defaults.get(f.name, f.default), {"metavar": spellings.METAVARS[kind]}
    shown = f.metadata["help"]
    if default is not None and "default:" not in shown:
        shown += f" (default: {int(default) if kind is bool else default})"
    if f.metadata["choices"]:
        extra = {"choices": f.metadata["choices"]}
    if kind is bool:
        extra, kind = {**extra, "nargs": "?", "const": True}, to_bool
    if f.metadata["paths"]:
        extra = {"nargs": "+", "metavar": "PATH"}
    if f.metadata["alone"] is not None:
        extra |= {"nargs": "?", "const": f.metadata["alone"]}
    if f.name == "epochs":
        kind, extra["metavar"] = spellings.epochs, "N"
    kind = auto_or_int if f.name == "num_workers" else kind
    kind = functools.partial(spellings.meant, f.name) if f.name in spellings.VALUES else kind
    group.add_argument(f"--{f.name}", type=kind, default=None, help=shown.replace("%", "%%"), **extra)
