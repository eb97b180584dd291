"""Every program, by its name: what launch/*.py start, and the command minimind-ds.

    minimind-ds sft --gpus 2 --deepspeed zero1 --data_path my.jsonl
    minimind-ds plan --preset minimind-3 --ranks 8 --memory 80
    python -m minimind_ds --help

Nothing here loads torch, so that --help and a mistake in a flag answer at once.
"""

from __future__ import annotations

import argparse
import codecs
import functools
import importlib
import locale
import os
import pathlib
import resource
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from minimind_ds.config.errors import UserError, first_line, one_line, report_bugs

# Before the first import of another's package, which may not be installed.
report_bugs()

from minimind_ds import __version__  # noqa: E402
from minimind_ds.config import deepspeed_file, program_flags, run, run_flags, spellings  # noqa: E402
from minimind_ds.config.deepspeed_check import check_keys  # noqa: E402
from minimind_ds.config.run import RunConfig  # noqa: E402
from minimind_ds.config.spellings import OneLineParser, instead  # noqa: E402
from minimind_ds.data import files  # noqa: E402
from minimind_ds.data.conversation import read_records  # noqa: E402
from minimind_ds.paths import LAUNCH, ROOT, is_bare  # noqa: E402
from minimind_ds.resilience.signals import Preparing  # noqa: E402
from minimind_ds.terminal import hold_streams  # noqa: E402

# What the command starts without a flag that asks for ranks, with one, and never.
ALWAYS, ASKED, NEVER = range(3)


class Program(NamedTuple):
    """A program: its line in --help, its flags, the module of its main, and when DeepSpeed's launcher starts it."""

    about: str
    flags: Callable[[], OneLineParser]
    module: str
    launcher: int = NEVER
    # Of main, before the command line.
    arguments: tuple[str, ...] = ()
    # What takes seconds to load besides PyTorch, which is then said wherever the output goes.
    loads: str = ""
    # For libraries that are loaded later.
    environment: dict[str, str] = {}
    # Whether it is a training, which leaves a report.
    trains: bool = False
    # Whose flags it takes besides its own: those of launch/sft.py, or any, which it passes over.
    more: str = ""


def trainer(name: str, about: str) -> Program:
    return Program(about, functools.partial(run.parser, name, run_flags.PROGRAMS[name]), "training.loop", ALWAYS,
                   (name,), DEEPSPEED, trains=True)


DEEPSPEED, WEIGHTS = "DeepSpeed", "the weights"
# As long as a run's end may wait for its report, in seconds.
REPORT_S = 30
# transformers must not look for anything on the network.
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Of a training, whose first record is looked at beforehand.
MOST_FILES = 16
# A rank of two holds some 40; kernels that are compiled, workers and evaluations more.
OPEN_FILES = 256
# A node that does not answer is preflight's to name; PyTorch would add its C++ stacks.
QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL"}
PROGRAMS = {
    "sft": trainer("sft", "fine-tune on conversations, whole or LoRA, under DeepSpeed"),
    "pretrain": trainer("pretrain", "pretrain on texts under DeepSpeed"),
    "chat": Program("talk to a trained model", program_flags.chat, "inference.chat", loads=WEIGHTS,
                    environment=OFFLINE),
    "score": Program("exact match on held-out conversations", program_flags.score, "inference.score",
                     loads=WEIGHTS, environment=OFFLINE),
    "evaluate": Program("loss, perplexity and token accuracy on data files", program_flags.evaluate,
                        "inference.evaluate", ASKED, loads=DEEPSPEED),
    "export": Program("weights for transformers, vLLM or MiniMind", program_flags.export, "inference.export_weights"),
    "plan": Program("memory, traffic and time of a run at every ZeRO stage", program_flags.plan, "plan.report",
                    more="sft"),
    "verify": Program("check a run's data, labels, kernels and DeepSpeed file", program_flags.verify, "verify", ASKED,
                      loads=DEEPSPEED, more="sft"),
    "benchmark": Program("throughput of the real training step", program_flags.benchmark, "bench.throughput", ASKED,
                         loads=DEEPSPEED, more="sft"),
    "preflight": Program("are all nodes alike, healthy and connected?", program_flags.preflight,
                         "resilience.preflight", ASKED, loads=DEEPSPEED, environment=QUIET, more="any"),
    "report": Program("one HTML file of a run, or of several side by side", program_flags.report, "report"),
    "train_tokenizer": Program("train a tokenizer on your text", program_flags.train_tokenizer,
                               "data.train_tokenizer"),
    "tokenize": Program("tokenise data before a run, without a GPU", program_flags.tokenize, "training.tokenize_data",
                        more="sft"),
    "check_kernels": Program("check and time the kernels on this machine", program_flags.check_kernels,
                             "bench.kernels"),
}


def start(name: str, argv: list[str]) -> int:
    """Runs a program in this process: --help and mistakes in flags first, what takes seconds to load after them."""
    hold_streams(lasting=PROGRAMS[name].trains)
    read_utf8()
    with Preparing():
        return run_program(name, argv)


def read_utf8() -> None:
    """Where the locale is of another encoding, starts the process anew in UTF-8: torch opens its own files in the
    locale's.  What is typed and shown stays in that."""
    if codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8":
        return
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def run_program(name: str, argv: list[str]) -> int:
    """What start does, once signals are heard."""
    program = PROGRAMS[name]
    check_flags(name, argv)
    allow_files()
    for variable, value in program.environment.items():
        os.environ.setdefault(variable, value)
    # Of the others, an output that another program reads gets no more than they have to tell.
    if rank() == "0" and (program.loads or sys.stderr.isatty()):
        print(f"{name}: loading PyTorch{' and ' * bool(program.loads)}{program.loads} …", file=sys.stderr, flush=True)
    try:
        importlib.import_module("torch")
    except ValueError as error:
        # Of a variable that it reads, as TORCH_LOGS.
        raise UserError(f"PyTorch cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    more = {"at_end": write_report} if program.trains else {}
    return importlib.import_module(f"minimind_ds.{program.module}").main(*program.arguments, argv, **more)


def allow_files() -> None:
    """As many open files as the programs need, where the system lets them; else ranks would look for each other until
    they give up.

    Raises:
        UserError: it does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The system's own number for no limit is below all.
    if 0 <= soft < OPEN_FILES:
        if 0 <= hard < OPEN_FILES:
            raise UserError(f"only {hard} files may be open at once here (ulimit -n), and {OPEN_FILES} are needed: "
                            f"ulimit -n {OPEN_FILES}, or whoever runs the machine, raises it")
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))


def check_flags(name: str, argv: list[str], *, here: bool = True, chooses: bool = False) -> RunConfig | None:
    """Ends with code 2 where the command line has a mistake that can be told without torch; --help ends here, too.

    here: whether the program runs on this machine, where its files must be then.
    chooses: a training's DeepSpeed file is chosen later, where none is named.
    Returns the run, of a training.
    """
    program = PROGRAMS[name]
    try:
        require_folder()
        if program.trains:
            config = run.parse_run_config(argv, name, run_flags.PROGRAMS[name])
            check_run(config, name, here, chooses)
            return config
        _, rest = program.flags().parse_known_args(argv)
        if program.more == "sft":
            training = run.parser("sft", {})
            training.others = program.flags().known()
            training.hints = {**training.hints, **program_flags.INSTEAD.get(name, {})}
            training.parse_args(spellings.translate(rest)[0])
            if name == "verify":
                check_run(run.parse_run_config(rest, "sft", run_flags.PROGRAMS["sft"]), "sft", here)
        elif not program.more:
            check_named(program.flags().parse_args(argv), here)
    except UserError as error:
        spellings.say_once(one_line(error))
        raise SystemExit(2) from None
    return None


def check_run(config: RunConfig, program: str, here: bool, chooses: bool = False) -> None:
    """Raises UserError for files of a training that are not there, for what its DeepSpeed file alone gets wrong, and
    for data whose first record is none."""
    if here and (config.deepspeed is not None or not chooses):
        check_keys(config.deepspeed, deepspeed_file.read(config))
    if here:
        check_there("" if config.from_weight == "none" else config.from_weight)
        for paths in filter(None, (config.data_path, config.eval_path)):
            for source in files.expand(paths)[:MOST_FILES if config.on_bad_record == "stop" else 0]:
                next(iter(read_records(source.path, run_flags.KINDS[program])))


def check_named(args: argparse.Namespace, here: bool) -> None:
    """Raises UserError for weights and data that another program's flags do not name, or that are not there."""
    weight = program_flags.load_from(args)[0] if hasattr(args, "load_from") else getattr(args, "weight", None)
    if here:
        for path in (weight, getattr(args, "lora", None)):
            check_there(path)
        if hasattr(args, "data_path"):
            files.expand(args.data_path)


def check_there(weights: str | None) -> None:
    """Raises UserError for a path that leads nowhere; a bare name, or none, is for later."""
    if weights and not is_bare(weights) and not os.path.lexists(weights):
        raise UserError(f"{weights}: no such file or folder{files.like(pathlib.Path(weights), '')}")


def require_folder() -> None:
    """Raises UserError where the folder worked in was deleted: no path can be told then."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the folder that this was started in: {error.strerror}; cd to another") from None


def write_report(prepared) -> None:
    """A training's report in its folder, and a line about it; never an error, and never a long wait."""
    said = [f"report: not written within {REPORT_S} s"]

    def write() -> None:
        try:
            said.append(f"report: {importlib.import_module('minimind_ds.report').of_prepared(prepared)}")
        except Exception as error:
            said.append(f"report: not written: {first_line(error)}")

    writer = threading.Thread(target=write, name="report", daemon=True)
    writer.start()
    writer.join(REPORT_S)
    print(said[-1], flush=True)


def rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def is_rank() -> bool:
    """Was this process started as one of several, by a launcher or by srun?"""
    in_step = "SLURM_STEP_ID" in os.environ or "SLURM_STEPID" in os.environ
    return "RANK" in os.environ or (in_step and os.environ.get("SLURM_NTASKS", "1") != "1")


def command(argv: list[str] | None = None) -> int:
    """minimind-ds.  Returns the exit code."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"minimind-ds {__version__}")
        return 0
    if name == "--home":
        print(ROOT)
        return 0
    name = name.replace("-", "_")
    if name not in PROGRAMS:
        meant = instead(name, PROGRAMS, {}, {}, sign="")
        print(f"error: minimind-ds has no program {name}{meant} (--help lists them)", file=sys.stderr)
        return 2
    when = PROGRAMS[name].launcher
    if when == NEVER or is_rank():
        return start(name, words)
    asked, rest = launcher_flags(words)
    config = check_flags(name, rest, here="--hostfile" not in asked, chooses=True)
    return launch(name, asked, rest, config) if asked or when == ALWAYS else start(name, rest)


def usage() -> str:
    programs = "\n".join(f"  {name:<16} {program.about}" for name, program in PROGRAMS.items())
    return f"""usage: minimind-ds PROGRAM [--flag VALUE ...]

{programs}

minimind-ds PROGRAM --help lists a program's flags.  minimind-ds --version;
--home: the folder of ds_configs, examples and launch, with the batch scripts.
sft and pretrain start DeepSpeed's launcher, as evaluate, verify, benchmark and
preflight do with one of its flags:
  --gpus N (--num_gpus)  --include HOST:0,1  --exclude HOST:0
  --hostfile FILE  --master_port PORT"""


def launcher_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """-> (flags for DeepSpeed's launcher, the program's)."""
    p = OneLineParser(add_help=False, allow_abbrev=False)
    p.add_argument("--num_gpus", "--gpus", type=int)
    p.add_argument("--master_port", type=int)
    for name in ("include", "exclude", "hostfile"):
        p.add_argument(f"--{name}")
    found, rest = p.parse_known_args(words)
    return [word for name, value in vars(found).items() if value is not None
            for word in (f"--{name}", str(value))], rest


def launch(name: str, asked: list[str], words: list[str], config: RunConfig | None) -> NoReturn:
    """Becomes DeepSpeed's launcher, with a DeepSpeed file where a training's flags and YAML name none."""
    said = ""
    if config is not None and config.deepspeed is None:
        words, said = ["--deepspeed", "zero1", *words], ", with ds_configs/zero1.json (--deepspeed names another)"
    # ninja of this environment first, for what DeepSpeed compiles.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    print(f"{name}: starting DeepSpeed's launcher{said} …", file=sys.stderr, flush=True)
    # Its lines about processes it starts would hide ours; what goes wrong it still says.
    os.execv(sys.executable, [sys.executable, "-m", "minimind_ds.distributed.launcher", "--log_level", "warning",
                              *asked, str(LAUNCH / f"{name}.py"), *words])
