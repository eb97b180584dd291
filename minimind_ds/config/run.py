"""What a run is: one frozen RunConfig made of a YAML file and the command line, each number with one owner.

The flags keep MiniMind's names.  `--config run.yaml` gives any of them as `name: value` (and a `model:` block of
ModelConfig fields that changes the preset); what stands in both places must agree.  RunConfig remembers where each
value was given, so that a later clash with the DeepSpeed JSON can name both places.

    python launch/sft.py --help
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import types
import typing
from dataclasses import dataclass, field

import yaml

from minimind_ds.config import rates, run_checks, run_flags, spellings, untrusted
from minimind_ds.config.deepspeed_keys import LARGEST
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS, ModelConfig
from minimind_ds.config.spellings import OneLineParser
from minimind_ds.paths import DS_CONFIGS, at_home

# The keys of precision.DTYPES; this module does without torch, so that --help need not wait for it.
PRECISIONS = ("bf16", "fp16", "fp32")
MOST_SHARE, MOST_EPOCHS = 1000, 1_000_000


def flag(default, help, *, choices=None, resume=None, paths=None, alone=None):
    """A RunConfig field: `help` ends up in --help, with its unit and default.

    alone: the value of the flag without one.
    resume: whether a resumed run "must keep" the value, "may change" it and says so, or "may grow" to a longer one;
        None: it does not matter.
    paths: one or more files; "shares": each with a share, in YAML.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "resume": resume, "paths": paths,
                                            "alone": alone})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a training run, besides the DeepSpeed JSON.  None means: chosen by the program."""

    deepspeed: str | None = flag(None, "DeepSpeed JSON file, or a shipped one by its name: zero1 (required); in a "
                                       "YAML also the block itself")
    preset: str | None = flag(None, "model size; default: the one that fits the machine", choices=tuple(PRESETS),
                              resume="must keep")
    tokenizer: str | None = flag(None, "Hugging Face tokenizer folder or SentencePiece .model; default: "
                                       "--from_weight's own, or else the embedded one")
    tokenizer_mismatch: str = flag("refuse", "what another tokenizer than --from_weight's does",
                                   choices=("refuse", "allow"))
    data_path: str | list | None = flag(None, "training data: files (JSON lines, JSON, these as .gz, Parquet, Arrow), "
                                              "globs and folders, one or more; in YAML also a list of {path, share}; "
                                              "default: the bundled sample", paths="shares")
    eval_path: str | list | None = flag(None, "held-out data, as data_path's", paths="plain")
    eval_fraction: float = flag(0.0, "share of the training samples to hold out when there is no eval_path, 0 to 0.5",
                                resume="must keep")
    eval_interval: int = flag(0, "optimizer steps between evaluations, of which the last is at the end; 0: at the "
                                 "end of each epoch")
    keep_best: bool = flag(False, "keep the weights with the lowest evaluation loss in save_dir/best, as best.json "
                                   "tells")
    patience: int = flag(0, "evaluations in a row without a lower loss after which the run ends; 0: off",
                         resume="may change")
    max_seq_len: int = flag(768, "longest sample, in tokens", resume="must keep")
    too_long: str = flag("cut", "what happens to longer samples; split is for texts, pretrain.py's default",
                         choices=("split", "cut", "drop"), resume="must keep")
    pack_len: int = flag(4096, "length of a packed row, in tokens", resume="must keep")
    packing: bool = flag(True, "pack samples into rows; off: one sample a row, padded", resume="must keep")
    batch_size: int = flag(1, "rows per rank and micro-batch")
    accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    epochs: float = flag(2, "passes over the data; 1.5 ends half-way through the second", resume="may grow")
    max_steps: int = flag(0, "optimizer steps after which the run ends; 0: run all epochs", resume="may grow")
    stop_after: int = flag(0, "steps of this start after which it stops with a checkpoint, its schedule as it "
                                 "was; 0: none")
    learning_rate: float | None = flag(None, "peak learning rate; default: 5e-4, 1e-5 for full SFT that starts from "
                                             "weights, 1e-4 for LoRA", resume="must keep")
    min_lr_ratio: float = flag(0.1, "last learning rate as a share of the peak", resume="must keep")
    warmup_ratio: float = flag(0.03, "share of the run in which the learning rate rises from 0", resume="must keep")
    warmup_steps: int = flag(0, "steps in which it does, in place of warmup_ratio; 0: the ratio", resume="must keep")
    lr_schedule: str = flag("cosine", "the learning rate after warm-up falls to min_lr_ratio in a cosine or a line, "
                                      "stays, or stays and falls at the end (wsd: warm-up, stable, decay)",
                            choices=("cosine", "linear", "constant", "wsd"), resume="must keep")
    decay_ratio: float = flag(0.1, "share of the run at its end in which wsd falls", resume="must keep")
    weight_decay: float = flag(0.01, "AdamW's decoupled weight decay", resume="must keep")
    adam_beta1: float = flag(0.9, "AdamW's decay of the first moment", resume="must keep")
    adam_beta2: float = flag(0.999, "AdamW's decay of the second moment", resume="must keep")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", resume="must keep")
    grad_clip: float = flag(1.0, "largest global gradient norm; 0: no clipping", resume="must keep")
    from_weight: str = flag("none", "weights to start from: none, run folder, checkpoint, .safetensors, .pth, HF "
                                    "folder; a bare name as MiniMind's: pretrain is pretrain_768.pth in save_dir or "
                                    "out")
    grow_vocab: int = flag(0, "adds rows to --from_weight's for the ids they lack, up to a multiple of this number "
                              "if one is given, for example 64; 0: off", alone=1)
    lora_rank: int = flag(0, "train adapters of this rank beside frozen --from_weight; 0: train all weights")
    lora_alpha: float | None = flag(None, "the adapters' output is scaled by lora_alpha / lora_rank; default: "
                                          "lora_rank, a factor of 1 as MiniMind's")
    lora_targets: str | None = flag(None, "comma list of projections to adapt, for example q_proj,k_proj,v_proj; "
                                          "default: the square ones as MiniMind, q_proj,o_proj in MiniMind-3")
    lora_dropout: float = flag(0.0, "dropout probability on the adapters' input")
    from_resume: str = flag("auto", "auto: the newest whole checkpoint of save_dir, if any; none: start over; PATH; "
                                    "0: start, unless save_dir holds checkpoints")
    save_dir: str = flag("out", "run folder")
    save_weight: str | None = flag(None, "name of the weights file; default: the program's (sft or pretrain)")
    save_interval: int = flag(100, "optimizer steps between checkpoints, of which the last is at the end; 0: none")
    keep: int = flag(2, "checkpoints to keep")
    keep_weights_only: bool = flag(False, "delete the checkpoints once the run has finished, its weights written")
    log_interval: int = flag(10, "optimizer steps between printed lines where there is no terminal for the bar")
    seed: int = flag(42, "seed of the weights, the order of the data and dropout", resume="must keep")
    dtype: str | None = flag(None, "precision; default: bf16 where the machine has it, else fp32", choices=PRECISIONS)
    kernels: str = flag("auto", "auto, a backend's name, or one per operation: attention=sdpa,moe=reference")
    dropout: float | None = flag(None, "dropout probability; default: the preset's (0)")
    moe_balance: str = flag("row", "tokens over which the experts' load is balanced",
                            choices=("row", "batch", "document", "global"), resume="must keep")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = flag(False, "torch.compile the model's layers")
    on_spike: str = flag("log", "what a loss does that is 6 standard deviations above the last 128 steps'",
                         choices=("log", "skip", "stop"), resume="may change")
    on_non_finite: str = flag("stop", "what a loss that is NaN or infinite does", choices=("stop", "skip"),
                              resume="may change")
    hang_minutes: float = flag(30.0, "minutes in one phase of a step after which a rank dumps its stacks and ends")
    on_bad_record: str = flag("stop", "what a malformed line does", choices=("stop", "skip"))
    learn: str = flag("all", "assistant turns that are learnt: all, or the last of each conversation",
                      choices=("all", "last"), resume="must keep")
    text_markers: str = flag("literal", "control tokens spelled in pretraining text: literal, or read as control "
                                        "tokens", choices=("literal", "control"), resume="must keep")
    random_system_ratio: float = flag(0.0, "share of conversations given a random system prompt (MiniMind: 0.2)",
                                      resume="must keep")
    drop_empty_think_ratio: float = flag(0.0, "share of empty think blocks removed (MiniMind: 0.8)",
                                         resume="must keep")
    cache_dir: str | None = flag(None, "where tokenised data is kept; default: ~/.cache/minimind_ds")
    num_workers: int | None = flag(None, "processes that tokenise; auto: one for each core this process may use, 0: "
                                         "none beside it; default: auto")
    use_wandb: bool = flag(False, "log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = flag("minimind_ds", "Weights & Biases project")
    use_tensorboard: bool = flag(False, "write TensorBoard files under save_dir/tensorboard")
    # Not flags: fields of ModelConfig that change the preset (YAML `model:`), where each value was given, flags that
    # this run's optimizer and scheduler have no place for, and a YAML's DeepSpeed block.
    model: dict = field(default_factory=dict)
    given: dict = field(default_factory=dict, compare=False)
    unused: tuple = field(default=(), compare=False)
    deepspeed_block: dict | None = field(default=None, compare=False)

    def __post_init__(self):
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and not abs(value) < LARGEST:
                finite = isinstance(value, int) or math.isfinite(value)
                what = f"below {LARGEST:.1e}" if finite else "a finite number"
                raise UserError(f"{self.place(name)} is {untrusted.shown(value)}; it must be {what}")
        at_least = dict(max_seq_len=2, pack_len=2, batch_size=1, accumulation_steps=1, max_steps=0, keep=1,
                        log_interval=1, save_interval=0, eval_interval=0, num_workers=0, grad_clip=0, weight_decay=0,
                        learning_rate=0, seed=0, lora_rank=0, grow_vocab=0, warmup_steps=0, patience=0, stop_after=0,
                        hang_minutes=0.01)
        for name, least in at_least.items():
            if getattr(self, name) is not None and not getattr(self, name) >= least:
                raise UserError(f"{self.place(name)} is {untrusted.shown(getattr(self, name))}; it must be at least "
                                f"{least}")
        for name in ("min_lr_ratio", "warmup_ratio", "decay_ratio", "eval_fraction", "random_system_ratio",
                     "drop_empty_think_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{self.place(name)} is {untrusted.shown(getattr(self, name))}; it must be between 0 "
                                "and 1")
        if not 0 < self.epochs <= MOST_EPOCHS:
            raise UserError(f"{self.place('epochs')} is {self.epochs}; it must be above 0, at most {MOST_EPOCHS}")
        run_checks.check(self)
        if self.save_weight is not None and not re.fullmatch(r"[\w][\w.+ -]{0,99}", self.save_weight):
            raise UserError(f"{self.place('save_weight')} is {untrusted.shown(self.save_weight)}; it must be a plain "
                            "file name, without folders, at most 100 characters")
        if self.eval_fraction > 0.5:
            raise UserError(f"{self.place('eval_fraction')} is {self.eval_fraction}; more than half is not training")
        if self.packing and self.pack_len < self.max_seq_len:
            raise UserError(f"a sample may be {self.max_seq_len} tokens long (max_seq_len) and the row holds "
                             f"{self.pack_len} (pack_len): raise pack_len or lower max_seq_len")

    def place(self, name: str) -> str:
        """Where a value comes from, for messages: '--epochs', 'epochs in run.yaml' or '--epochs (default)'."""
        return self.given.get(name, f"--{name} (default)")

    @property
    def epochs_begun(self) -> int:
        """Epochs of which the run takes at least a step."""
        return math.ceil(self.epochs)

    @property
    def row_len(self) -> int:
        """Tokens in a row: pack_len, or max_seq_len where samples are padded one by one."""
        return self.pack_len if self.packing else self.max_seq_len

    @property
    def data_names(self) -> str:
        """The last part of each path, for tables."""
        entries = self.data_path if isinstance(self.data_path, list) else [self.data_path]
        return ", ".join(pathlib.Path(e["path"] if isinstance(e, dict) else e).name for e in entries)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The preset with the run's changes and the tokenizer's vocabulary.

        Raises:
            ValueError: an unknown or impossible field in the YAML's `model:` block.
        """
        changes = dict(self.model)
        if self.dropout is not None:
            changes["dropout"] = self.dropout
        values = PRESETS[self.preset].to_dict()
        # Sizes that were derived from others are derived again when those change.
        for derived, sources in DERIVED.items():
            if derived not in changes and any(s in changes for s in sources):
                values[derived] = None
        config = ModelConfig.from_dict({**values, "vocab_size": vocab_size, **changes})
        if config.vocab_size < vocab_size:
            raise UserError(f"vocab_size {config.vocab_size} in the model block is smaller than the tokenizer's "
                             f"{vocab_size}")
        return config

    def replace(self, **changes) -> RunConfig:
        return dataclasses.replace(self, **changes)

    def to_yaml(self) -> str:
        """The run as a YAML that --config reads back from any folder, without the flags that had no place in it."""
        left_out = ("given", "unused", "deepspeed_block", *self.unused)
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
        for name in PATHS - set(self.unused):
            values[name] = of_paths(os.path.abspath, values[name])
        if self.from_weight != "none":
            values["from_weight"] = os.path.abspath(self.from_weight)
        if self.deepspeed_block is not None:
            values["deepspeed"] = self.deepspeed_block
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


DERIVED = {"head_dim": ("hidden_size", "num_attention_heads"), "intermediate_size": ("hidden_size",),
           "moe_intermediate_size": ("hidden_size", "intermediate_size")}
FLAGS = [f for f in dataclasses.fields(RunConfig) if f.metadata]
DEFAULTS = {f.name: f.default for f in FLAGS}
MAY_GROW = tuple(f.name for f in FLAGS if f.metadata["resume"] == "may grow")
MUST_STAY = tuple(f.name for f in FLAGS if f.metadata["resume"] == "must keep")
PATHS = {"deepspeed", "tokenizer", "data_path", "eval_path", "save_dir", "cache_dir"}
MAY_CHANGE = tuple(f.name for f in FLAGS if f.metadata["resume"] == "may change")


def of_paths(change, value: str | dict | list | None):
    """change(path) of one path, a source with its share, or a list of either."""
    if isinstance(value, list):
        return [of_paths(change, entry) for entry in value]
    if isinstance(value, dict):
        return {**value, "path": change(value["path"])} if isinstance(value.get("path"), str) else value
    return change(value) if isinstance(value, str) else value


# 30 ms: once.
HINTS = typing.get_type_hints(RunConfig)


def value_type(f: dataclasses.Field) -> type:
    """int, float, str or bool of a field written `int` or `int | None`."""
    hint = HINTS[f.name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


NUMBERS = tuple(f.name for f in FLAGS if value_type(f) in (int, float))


def parser(program: str, defaults: dict) -> OneLineParser:
    """The command line of 'sft' or 'pretrain', with that program's own defaults, by field name."""
    return run_flags.parser(program, [(f, value_type(f)) for f in FLAGS], defaults)


def parse_run_config(argv: list[str], program: str, defaults: dict) -> RunConfig:
    """Command line (and the YAML it names) -> RunConfig.

    Args:
        argv: the command line without the program's name.
        program: 'sft' or 'pretrain', for --help.
        defaults: the program's own defaults, by field name.

    Raises:
        ValueError: unknown YAML key, wrong type, or a value given twice with two values.
        SystemExit: argparse's, code 2, after one line on stderr.
    """
    words, written = spellings.translate(argv)
    args = vars(parser(program, defaults).parse_args(words))
    args.pop("local_rank")
    shape = {name: args.pop(name) for name in spellings.SHAPE}
    values, given = read_yaml(yaml_path) if (yaml_path := args.pop("config")) else ({}, {})
    for name, value in args.items():
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if value is None:
            continue
        if name == "deepspeed":
            value = find_shipped(value, pathlib.Path())
        if name in values and values[name] != value and not (name in PATHS and of_paths(
                os.path.abspath, values[name]) == of_paths(os.path.abspath, value)):
            one, other = (untrusted.shown(" ".join(said) if isinstance(said, list) else said)
                          for said in (value, values[name]))
            raise UserError(f"{name} is {one} on the command line and {other} in {yaml_path}: give it once: leave "
                            f"{written[name]} out, or change or delete that line of the file")
        values[name], given[name] = value, written[name]
    for name in (PATHS | {"from_weight", "from_resume"}) & values.keys():
        if not values[name]:
            raise UserError(f"{given[name]} is empty: name a path, or leave it out")
        values[name] = of_paths(at_home, values[name])
    spellings.choose_model({name: value for name, value in shape.items() if value is not None}, values, given)
    run = RunConfig(**{**defaults, **values}, given=given)
    run_checks.check_config(run, yaml_path)
    if run.learning_rate is None:
        run = run.replace(learning_rate=rates.usual(program, run.from_weight, run.lora_rank))
    return run


def find_shipped(name: str, folder: pathlib.Path) -> str:
    """The file that --deepspeed names: a path from `folder`, or the bare name of a shipped file, as zero2."""
    # Names too long for a file are os.path's to ask about: pathlib raises.
    shipped, there = DS_CONFIGS / f"{name}.json", os.path.exists(folder / name)
    if pathlib.PurePath(name).name == name and not there and os.path.isfile(shipped):
        return str(shipped)
    # As the other paths of a YAML, from where the command is started, too.
    return name if not there and os.path.exists(name) else str(folder / name)


def read_yaml(path: str) -> tuple[dict, dict]:
    """A run YAML -> (values by field, where each was given)."""
    values = untrusted.yaml_mapping(untrusted.read_text(path), path)
    by_name, read = {f.name: f for f in FLAGS}, {}
    for key, value in values.items():
        name = spellings.ours(str(key))
        if name in read:
            raise UserError(f"{path}: {key} is {name}, which stands there too: give it once")
        if name in spellings.SHAPE:
            raise UserError(f"{path}: {name} belongs in the block `model:`")
        if name == "model":
            if not isinstance(value, dict):
                raise UserError(f"{path}: model is not a block of `field: value` lines")
        elif name not in by_name:
            raise UserError(f"{path}: unknown key {untrusted.shown(key)}{spellings.instead(name, by_name, sign='')}")
        elif name != "deepspeed" or not isinstance(value, dict):
            value = check_type(path, by_name[name], value)
        read[name] = value
    # A null leaves the choice to the program, as leaving the line out does.
    values = {name: value for name, value in read.items() if value is not None}
    given = {name: f"{name} in {path}" for name in values}
    values |= {name: of_paths(at_home, values[name])
               for name in values.keys() & {*PATHS, "from_weight", "from_resume"}}
    if isinstance(values.get("deepspeed"), dict):
        values |= {"deepspeed": given["deepspeed"], "deepspeed_block": values["deepspeed"]}
    elif "deepspeed" in values:
        values["deepspeed"] = find_shipped(at_home(values["deepspeed"]), pathlib.Path(path).parent)
    return values, given


def check_type(path: str, f: dataclasses.Field, value):
    kind, value = value_type(f), spellings.meant(f.name, value)
    if (value is None and f.default is None) or (f.name == "num_workers" and value == "auto"):
        return None
    if f.metadata["paths"]:
        return check_paths(path, f, value)
    value = as_float(value) if kind is float else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{path}: {f.name} is {untrusted.shown(value)}; it must be {kind.__name__}")
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise UserError(f"{path}: {f.name} is {untrusted.shown(value)}; choose from "
                        f"{', '.join(f.metadata['choices'])}")
    return spellings.epochs(value) if f.name == "epochs" else value


def as_float(value):
    """YAML reads 1e-4 (without a dot) as text; the other way round, 1 is a fine float."""
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return value


def check_paths(path: str, f: dataclasses.Field, value) -> str | list:
    """A path, or a list of paths and {path, share}; a list of one plain path is that path."""
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if isinstance(entry, dict) and f.metadata["paths"] == "shares":
            share = as_float(entry.get("share", 1))
            if not isinstance(entry.get("path"), str) or set(entry) - {"path", "share"}:
                raise UserError(f"{path}: {f.name} holds {str(entry)[:200]!r}; an entry is a path, or {{path, share}}")
            if not isinstance(share, float) or not 0 < share <= MOST_SHARE:
                raise UserError(f"{path}: the share of {entry['path']} is {str(share)[:40]!r}; it must be a number "
                                f"above 0, at most {MOST_SHARE}: how often a sample is seen in an epoch")
            entry["share"] = share
        elif not isinstance(entry, str):
            raise UserError(f"{path}: {f.name} holds {str(entry)[:200]!r}, not a path")
    if not entries:
        raise UserError(f"{path}: {f.name} is an empty list")
    return entries[0] if len(entries) == 1 and isinstance(entries[0], str) else entries
