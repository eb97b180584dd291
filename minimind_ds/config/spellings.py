"""Flags as MiniMind, Hugging Face and others spell them: those that mean what ours mean are understood, the others are
refused with what to write instead.

    python launch/sft.py --help
"""

from __future__ import annotations

import argparse
import ast
import difflib
import math
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterable

from minimind_ds import terminal
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.config.model import PRESETS
from minimind_ds.paths import LAUNCH, at_home

# Another spelling -> our flag of the same meaning.
SAME = {
    # MiniMind's, today's and those of its first releases.
    "use_compile": "compile", "out_dir": "save_dir", "tokenizer_path": "tokenizer",
    # Hugging Face's Trainer, TRL, Axolotl, LLaMA-Factory.
    "output_dir": "save_dir", "num_train_epochs": "epochs", "num_epochs": "epochs", "lr": "learning_rate",
    "warmup_iters": "warmup_steps",
    "gradient_accumulation_steps": "accumulation_steps", "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size", "max_grad_norm": "grad_clip", "gradient_clipping": "grad_clip",
    "early_stopping_patience": "patience",
    "logging_steps": "log_interval", "save_steps": "save_interval", "eval_steps": "eval_interval",
    "save_total_limit": "keep", "torch_compile": "compile", "sample_packing": "packing",
    "train_data": "data_path", "train_file": "data_path", "eval_data": "eval_path", "validation_file": "eval_path",
    "preprocessing_num_workers": "num_workers", "dataset_num_proc": "num_workers", "lora_r": "lora_rank",
    "lora_target": "lora_targets", "lora_target_modules": "lora_targets",
}
# Other spellings of a flag's values.
VALUES = {"dtype": {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"},
          "from_resume": {"1": "auto", "0": "0"}}
ROWS = "--max_seq_len is the longest sample, --pack_len the length of a packed row"
PRECISION = "write --dtype bf16, fp16 or fp32"
SCHEDULE = ("write --lr_schedule cosine, linear, constant or wsd; the rate falls to --min_lr_ratio of its peak; a "
            "scheduler block of the DeepSpeed JSON sets another")
FILES = "write --data_path for files on this machine"
BASE = "write --from_weight for weights on this machine, --preset for a new model's size"
# Flags that have no counterpart -> what to do instead.
HINTS = {
    "device": "DeepSpeed's launcher gives each rank its device: `deepspeed --num_gpus 2 …` or `--include localhost:1` "
              "before the program choose GPUs, and DS_ACCELERATOR=cpu in the environment trains on the processor",
    **dict.fromkeys(("num_gpus", "gpus", "include", "exclude", "hostfile", "master_port"),
                    "that is the launcher's: write it before the program, `deepspeed --num_gpus 2 launch/sft.py …`"),
    "ddp": "the ranks are those that DeepSpeed's launcher starts: `deepspeed --num_gpus 2 launch/sft.py …`",
    "lora_name": "write --lora_rank 16 for adapters and --save_weight for the name of their file",
    "lora_weight": "that is chat.py's and score.py's; a run starts from whole weights, --from_weight",
    "weight": "write --from_weight for the weights to start from, --save_weight for the name of those to write",
    "load_from": "write --from_weight for the weights to start from, --tokenizer for a tokenizer",
    "deepspeed_config": "write --deepspeed FILE",
    **dict.fromkeys(("open_thinking", "historys", "max_new_tokens", "temperature", "top_p", "show_speed",
                     "inference_rope_scaling"), "that is chat.py's"),
    **dict.fromkeys(("bf16", "fp16", "fp32", "torch_dtype", "precision"), PRECISION),
    **dict.fromkeys(("max_length", "max_seq_length", "sequence_len", "cutoff_len", "block_size"), ROWS),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "lr_decay_style"), SCHEDULE),
    **dict.fromkeys(("model_name_or_path", "base_model"), BASE),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "dataset_path"), FILES),
    "tokenizer_name": "write --tokenizer for a tokenizer on this machine",
    "resume_from_checkpoint": "write --from_resume auto, none or a path",
    "train_batch_size": "write --batch_size for rows a rank and micro-batch, --accumulation_steps for micro-batches",
    "report_to": "write --use_wandb or --use_tensorboard",
    "load_best_model_at_end": "write --keep_best: the best weights lie in save_dir/best, the last ones in save_dir",
    "optim": "an optimizer block of the DeepSpeed JSON names another than AdamW",
    "attn_implementation": "write --kernels",
}
# Characters of what is said of a flag: argparse repeats its value.
MOST_SAID = 800
FLAG = re.compile(r"--([A-Za-z][\w-]*)(=.*)?", re.DOTALL)


class Store(argparse.Action):
    """argparse's own, but for a list given twice, of which the first would be lost."""

    def __call__(self, parser, namespace, values, flag=None):
        if flag and self.nargs == "+" and getattr(namespace, self.dest) is not self.default:
            parser.error(f"{flag} is given twice; name all after one, separated by spaces")
        setattr(namespace, self.dest, values)


class OneLineParser(argparse.ArgumentParser):
    """argparse that takes - for _ in flags, and whose error is a single line with a guess at what was meant."""

    def __init__(self, *args, hints: dict[str, str] | None = None, same: dict[str, str] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.register("action", None, Store)
        self.hints, self.same = hints or {}, same or {}
        # Names of flags that are taken elsewhere on the same command line.
        self.others: list[str] = []

    def add_argument(self, *names, **options):
        if names[0].startswith("--") and not options.keys() & {"action", "choices", "metavar"}:
            options["metavar"] = METAVARS.get(options.get("type", str), "TEXT")
        return super().add_argument(*names, **options)

    def known(self) -> list[str]:
        """All flags, where --help has a shorter line."""
        self.usage = None
        return re.findall(r"--(\w+)", self.format_usage())

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        for word in words:
            # argparse takes it for the end of the flags, even after = .
            if word == "--" or re.fullmatch(r"--[\w-]+=--", word):
                self.error(f"{word}: -- is neither a flag nor a value")
        return super().parse_known_args([respelt(word, {}) for word in words], namespace)

    def parse_args(self, args=None, namespace=None):
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [found[1] for found in map(FLAG.fullmatch, rest) if found]
            known = [*self.others, *self.known()]
            said = instead(flags[0].replace("-", "_"), known, self.hints, self.same) if flags else of_a_flag(
                rest[0], known)
            self.error(f"unrecognized arguments: {' '.join(rest)}{said}")
        return parsed

    def error(self, message):
        long = len(message) > MOST_SAID
        message = f"{message[:MOST_SAID - 200]} ... {message[-195:]}" if long else message
        say_once(one_line(f"{message} (--help lists the flags)"))
        raise SystemExit(2)


def say_once(line: str) -> None:
    """Every rank parses the same command line; one of a machine says what is wrong with it."""
    if "0" in (os.environ.get("RANK"), os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))):
        print(line, file=sys.stderr, flush=True)


def program_parser(name: str, file: str | None = None, epilog: str = "", **options) -> OneLineParser:
    """The parser of `minimind-ds NAME` and of launch/NAME.py (or `file`), described by that file's docstring."""
    file = file or f"{name}.py"
    text = ast.get_docstring(ast.parse((LAUNCH / file).read_text(encoding="utf-8")), clean=False).rstrip()
    by_command = pathlib.Path(sys.argv[0]).name in ("minimind-ds", "__main__.py")
    if by_command:
        # Examples that run away from a checkout.
        text = re.sub(rf"(?:python|deepspeed)( --num_gpus \d+)? launch/{file}", rf"minimind-ds {name}\1", text)
        text = re.sub(r"ds_configs/(\w+)\.json", r"\1", text)
    return OneLineParser(prog=f"minimind-ds {name}" if by_command else f"launch/{file}",
                         description=fitted(text), epilog=fitted(epilog),
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def fitted(text: str) -> str:
    """Paragraphs and indented commands that fit the terminal; a comment that does not stands above its command."""
    size, blocks = min(terminal.width(), 100) - 2, []
    for block in text.split("\n\n"):
        if not block.startswith(" "):
            blocks.append(textwrap.fill(" ".join(block.split()), size))
            continue
        lines = []
        for line in block.split("\n"):
            command, _, comment = line.partition("  # ")
            if comment and len(line) > size:
                lines, line = [*lines, *textwrap.wrap(f"# {comment}", size, initial_indent="    ",
                                                      subsequent_indent="    # ")], command.rstrip()
            lines.append(" \\\n".join(textwrap.wrap(line, size - 2, subsequent_indent="        ",
                                                    break_long_words=False, break_on_hyphens=False))
                         if len(line) > size else line)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def instead(name: str, known: Iterable[str], hints: dict[str, str] = HINTS, same: dict[str, str] = SAME,
            sign: str = "--") -> str:
    """What to say of a flag that nobody knows: '; write --dtype bf16', '; did you mean --epochs?', or nothing."""
    if name in hints:
        return f"; {hints[name]}"
    close = difflib.get_close_matches(name, [*known, *same], n=1)
    return f"; did you mean {sign}{same.get(close[0], close[0])}?" if close else ""


def of_a_flag(value: str, known: Iterable[str]) -> str:
    """What to say of a path that stands without its flag: '; did you mean --weight out/sft?', or nothing."""
    name = next((name for name in ("weight", "data_path") if name in known), None)
    return f"; did you mean --{name} {value}?" if name and os.path.exists(value) else ""


def ours(name: str, same: dict[str, str] = SAME) -> str:
    """A flag's name in our spelling."""
    name = name.replace("-", "_")
    return same.get(name, name)


def respelt(word: str, same: dict[str, str]) -> str:
    """A word of a command line; a flag in our spelling."""
    found = FLAG.fullmatch(word)
    return f"--{ours(found[1], same)}{found[2] or ''}" if found else word


def translate(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """-> (the command line in our spelling, each flag as it was written, by our name).

    Raises:
        UserError: one flag in two spellings.
    """
    written = {}
    for word in filter(FLAG.fullmatch, argv):
        flag = word.partition("=")[0]
        name = ours(flag[2:])
        if ours(written.setdefault(name, flag)[2:], {}) != ours(flag[2:], {}):
            raise UserError(f"{written[name]} and {flag} are one flag: give it once")
    return [of_home(respelt(word, SAME)) for word in argv], written


def of_home(word: str) -> str:
    """--save_dir=~/x with the home folder in it: the shell puts it there only where a word begins with ~."""
    name, equals, value = word.partition("=")
    return f"{name}={at_home(value)}" if equals and value.startswith("~") and FLAG.fullmatch(word) else word


def meant(name: str, value):
    """A flag's value in our spelling."""
    return VALUES.get(name, {}).get(str(value), value)


def epilog() -> str:
    """For --help, in one paragraph."""
    others = ", ".join(f"--{theirs} ({flag})" for theirs, flag in SAME.items())
    return ("Also understood: - for _ in flags, --dtype bfloat16, float16 and float32, --from_resume 1 (auto), "
            f"{others}.")


def choose_model(told: dict, values: dict, given: dict) -> None:
    """MiniMind's --hidden_size, --num_hidden_layers and --use_moe, as the preset and its changes.

    Without a preset they change MiniMind's own default, minimind-3 or minimind-3-moe.

    Args:
        told: the flags that were given, by name.
        values, given: the run's, so far; changed.

    Raises:
        UserError: a flag that differs from the preset or from the YAML's `model:` block.
    """
    if not told:
        return
    block, preset = values.get("model", {}), values.get("preset")
    for name, value in told.items():
        said, where = value, ""
        if name in block:
            said, where = block[name], given["model"]
        elif preset is not None:
            said, where = getattr(PRESETS[preset], name), f"preset {preset} ({given['preset']})"
        if said != value:
            raise UserError(f"{name} is {value} (--{name}) and {said} in {where}: give it once")
    if preset is None:
        values["preset"] = "minimind-3-moe" if told.get("use_moe", block.get("use_moe")) else "minimind-3"
        given["preset"] = f"--{next(iter(told))}"
        base = PRESETS[values["preset"]]
        changed = {name: value for name, value in told.items() if getattr(base, name) != value}
        values["model"] = {**block, **changed}


def auto_or_int(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number") from None


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is no finite number")


def epochs(text: str | float) -> int | float:
    """A number, 2 for 2.0."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def to_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


# What --help calls a value of each type.
METAVARS = {int: "N", float: "X", number: "X", str: "TEXT", bool: "0|1", to_bool: "0|1", pathlib.Path: "PATH"}


# MiniMind's flags for a model's shape -> fields of ModelConfig.
SHAPE = {"hidden_size": (int, "width of the model, as MiniMind's flag; default: the preset's"),
         "num_hidden_layers": (int, "layers of the model, as MiniMind's flag; default: the preset's"),
         "use_moe": (to_bool, "1: the mixture of experts, as MiniMind's flag; default: the preset's")}
