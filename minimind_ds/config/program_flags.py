"""The flags of the programs besides sft and pretrain, whose flags are run.RunConfig's.

Here without torch, so that --help and a mistake in a flag answer at once.

    python launch/plan.py --help
"""

from __future__ import annotations

import argparse
import pathlib

from minimind_ds.config import run_flags
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS
from minimind_ds.config.run import FLAGS, PRECISIONS, value_type
from minimind_ds.config.spellings import SHAPE, OneLineParser, number, program_parser, to_bool

# How chat draws, and what an exported folder's generation_config says.
SAMPLING = {"temperature": 0.85, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0}
# Flags of preflight: default and meaning.
LIMITS = {"min_free_gib": (20.0, "least free disk in the run folder and the cache, GiB"),
          "min_gpu_free": (0.9, "least free share of a GPU's memory"),
          "max_clock_skew": (2.0, "most seconds between two nodes' clocks"),
          "min_bandwidth": (0.0, "least all-reduce bandwidth over all ranks, GB/s; 0: only shown"),
          "wait_seconds": (120.0, "how long to wait for a node to answer")}
# Flags of the training that evaluate takes, too: what an evaluation gives depends on these, besides the precision.
AS_TRAINED = ("max_seq_len", "too_long", "pack_len", "packing", "batch_size", "accumulation_steps", "on_bad_record",
              "learn", "text_markers", "seed", "kernels", "cache_dir", "num_workers")
# Flags of other programs that these have another for.
INSTEAD = {"plan": dict.fromkeys(("gpus", "num_gpus"), "write --ranks N, the GPUs of all machines together")}
# The weights that eval_llm.py takes where no --weight is named.
USUAL = "full_sft"
# What check_kernels does.
PARTS = ("correctness", "curve", "timings")
SWITCH = dict(nargs="?", const=True, type=to_bool)


def weights(p: OneLineParser) -> None:
    """The flags of chat and score that say which weights to load; inference/arguments.py reads them."""
    p.add_argument("--weight", help="run folder, its .safetensors file, RUN/checkpoints (the newest) or a checkpoint "
                                    "in it, exported folder or MiniMind .pth; a bare name as MiniMind's: full_sft is "
                                    "full_sft_768 in --save_dir")
    p.add_argument("--lora", "--lora_weight", help="LoRA adapters of these weights: run folder, .safetensors file, "
                                                   "checkpoint, MiniMind .pth or a bare name; None: none")
    p.add_argument("--tokenizer", help="another tokenizer than the one beside the weights")
    p.add_argument("--load_from", help="as MiniMind's: a Hugging Face folder, or for its own weights (--weight) the "
                                       "folder of their tokenizer")
    p.add_argument("--save_dir", default="out", help="where weights of a bare name are (default: out)")
    preset(p, "the model's shape, for a .pth, which does not carry it")
    for name, (kind, text) in SHAPE.items():
        p.add_argument(f"--{name}", type=kind, help=f"{text.partition(';')[0]}, for a .pth and for bare names")
    p.add_argument("--inference_rope_scaling", action="store_true",
                   help="positions beyond those trained (YaRN), as MiniMind's flag")
    p.add_argument("--dtype", choices=PRECISIONS, help="precision (default: that of the weights)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")


def load_from(args: argparse.Namespace) -> tuple[str, str | None]:
    """--load_from -> what --weight and --tokenizer mean with it."""
    if args.load_from is None:
        if args.weight is None:
            raise UserError("--weight is missing: name a run folder, a weights file or an exported folder")
        return args.weight, args.tokenizer
    folder = pathlib.Path(args.load_from)
    if (folder / "config.json").is_file():
        if args.weight is not None:
            raise UserError(f"--weight {args.weight} and --load_from {folder}, a Hugging Face folder, both name "
                            "weights: give one")
        return str(folder), args.tokenizer
    if folder.is_dir():
        return args.weight or USUAL, args.tokenizer or str(folder)
    if args.load_from == "model":
        return args.weight or USUAL, args.tokenizer
    raise UserError(f"--load_from {folder}: no such folder; name a Hugging Face folder, or the folder of a tokenizer "
                    "for MiniMind's own weights")


def preset(p: OneLineParser, meaning: str) -> None:
    # A usage line cannot be broken within a list of choices.
    p.add_argument("--preset", choices=tuple(PRESETS), metavar="PRESET", help=f"{meaning}: {', '.join(PRESETS)}")


def chat() -> OneLineParser:
    p = program_parser("chat")
    weights(p)
    p.add_argument("--prompt", help="ask this and leave; without it: a conversation")
    p.add_argument("--system", default="", help="system prompt (default: none)")
    p.add_argument("--history", type=int, help="earlier question-answer pairs sent along (default: 8)")
    p.add_argument("--historys", type=int, help="the same in messages, two a pair, as MiniMind's flag")
    p.add_argument("--open_thinking", default=False, help="leave the think block open for the model to fill", **SWITCH)
    p.add_argument("--show_speed", default=True,
                   help="tell each answer's tokens a second; 0: do not (default: 1)", **SWITCH)
    p.add_argument("--raw", action="store_true",
                   help="continue plain text, each by itself, as pretrained weights do; no chat format")
    p.add_argument("--temperature", type=float, default=SAMPLING["temperature"],
                   help="0: greedy (default: %(default)s)")
    p.add_argument("--top_p", type=float, default=SAMPLING["top_p"],
                   help="draw from the likeliest tokens that hold this share (default: %(default)s)")
    p.add_argument("--top_k", type=int, default=SAMPLING["top_k"],
                   help="draw from this many tokens; 0: all (default: %(default)s)")
    p.add_argument("--repetition_penalty", type=float, default=SAMPLING["repetition_penalty"],
                   help="above 1: repeats less (default: %(default)s)")
    p.add_argument("--max_new_tokens", type=int, default=512, help="longest answer in tokens (default: %(default)s)")
    p.add_argument("--seed", type=int, help="the same seed draws the same answers (default: another each time)")
    return p


def score() -> OneLineParser:
    p = program_parser("score")
    weights(p)
    p.add_argument("--data_path", nargs="+", required=True, metavar="PATH",
                   help="files, globs and folders of conversations (docs/DATA.md), each scored by itself and all "
                        "together; the last answer is expected")
    p.add_argument("--limit", type=int, default=0, help="use the first so many records of each file; 0: all (default: "
                                                        "0)")
    p.add_argument("--batch_size", type=int, default=64, help="prompts answered together (default: 64)")
    p.add_argument("--show_wrong", type=int, default=0, help="print so many wrong answers (default: 0)")
    p.add_argument("--json", action="store_true", help="print the result as one JSON line, last")
    return p


def evaluate() -> OneLineParser:
    p = program_parser("evaluate", allow_abbrev=False,
                       epilog="What is not given is as in the run.yaml beside the weights, where there is one: with "
                              "as many ranks, the training's own evaluation gives the same numbers.")
    weights(p)
    p.add_argument("--data_path", nargs="+", required=True, metavar="PATH",
                   help="data files, globs and folders (docs/DATA.md), each evaluated by itself and all together")
    p.add_argument("--kind", choices=("conversations", "text"),
                   help="what they hold (default: text for weights of a pretraining that splits texts, else "
                        "conversations)")
    p.add_argument("--out", type=pathlib.Path, metavar="FILE.json", help="write the result there")
    group = p.add_argument_group("as the training's")
    for f in FLAGS:
        if f.name in AS_TRAINED:
            run_flags.add(group, f, value_type(f), {})
    # The launcher adds it; the rank itself is read from the environment.
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return p


def export() -> OneLineParser:
    p = program_parser("export")
    p.add_argument("--weight", help="a run folder, its .safetensors file, RUN/checkpoints (the newest) or a "
                                    "checkpoint in it, a MiniMind .pth or a Hugging Face folder")
    p.add_argument("--lora", help="LoRA adapters to merge into the weights: a run folder, its .safetensors file, a "
                                  "checkpoint or a MiniMind LoRA .pth")
    p.add_argument("--to", choices=["hf", "peft", "minimind", "minimind_lora"], required=True,
                   help="the format to write; the adapters alone are peft, for Hugging Face's PEFT, and "
                        "minimind_lora, for MiniMind's load_lora")
    p.add_argument("--out", required=True, help="the folder (hf, peft) or file (minimind, minimind_lora) to write")
    p.add_argument("--dtype", choices=PRECISIONS,
                   help="precision of the weights (default: as stored for hf and peft, which is fp32 for a run's "
                        "weights and checkpoints; fp16 for MiniMind's)")
    preset(p, "the model's shape, needed for a .pth only")
    p.add_argument("--tokenizer", help="a tokenizer folder or .model (default: the run's own)")
    p.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    return p


def report() -> OneLineParser:
    p = program_parser("report")
    p.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN", help="run folders (--save_dir of a training)")
    p.add_argument("--out", type=pathlib.Path, metavar="FILE",
                   help="the file to write (default: report.html in the run's folder; of several runs, here)")
    return p


def train_tokenizer() -> OneLineParser:
    p = program_parser("train_tokenizer")
    p.add_argument("--data_path", nargs="+", required=True, metavar="PATH",
                   help="data files (docs/DATA.md), one or more")
    p.add_argument("--out", required=True, help="the .model file to write")
    p.add_argument("--vocab_size", type=int, default=6400, help="pieces, control tokens included (default: 6400)")
    p.add_argument("--on_bad_record", choices=("stop", "skip"), default="stop",
                   help="a record that cannot be used: stop (default), or skip and count it")
    return p


def tokenize() -> OneLineParser:
    p = program_parser("tokenize", "tokenize_data.py", allow_abbrev=False,
                       epilog="Every flag of the training is taken, too, and means what it means there: --data_path "
                              "--eval_path --tokenizer --max_seq_len --pack_len --cache_dir --config ...")
    p.add_argument("--program", choices=("sft", "pretrain"), help="the training that will read it (default: sft)")
    p.add_argument("--kind", choices=("conversations", "text"),
                   help="the same by the data: conversations are sft's, texts pretrain's")
    return p


def preflight() -> OneLineParser:
    p = program_parser("preflight", allow_abbrev=False)
    p.add_argument("--save_dir", default="out", help="the run folder (default: %(default)s)")
    p.add_argument("--cache_dir", help="where tokenised data is kept; default: ~/.cache/minimind_ds")
    for name, (value, meaning) in LIMITS.items():
        p.add_argument(f"--{name}", type=number, default=value, help=meaning + " (default: %(default)s)")
    return p


def plan() -> OneLineParser:
    p = program_parser("plan", allow_abbrev=False,
                       epilog="The flags of launch/sft.py that decide memory are taken, too: --preset --config "
                              "--tokenizer --deepspeed --dtype --pack_len --batch_size --accumulation_steps --kernels "
                              "--gradient_checkpointing --lora_rank ...")
    p.add_argument("--ranks", type=int, default=1, help="GPUs of the run, all machines together (default: 1)")
    p.add_argument("--memory", type=float, default=0,
                   help="GiB of a device; 0: this machine's GPU, or 80 where there is none (default: 0)")
    p.add_argument("--labelled", type=float, default=0.5, help="share of tokens with a label, 0 to 1 (default: 0.5)")
    p.add_argument("--gpu", help="plan for this GPU, with its memory and in bf16 unless told otherwise: H200, H100, "
                                 "A100 or 4090 (default: this machine's, or that nearest to --memory; else this CPU)")
    p.add_argument("--network", type=float,
                   help="GB/s that a rank sends (default: the links within a machine of such GPUs, or this CPU's)")
    p.add_argument("--document", type=float, default=300,
                   help="mean tokens of a document, which attention's time depends on (default: 300)")
    p.add_argument("--tokens", type=float, help="tokens to train, for example 4.5e9: shows the hours it takes")
    p.add_argument("--price", type=float, help="of one GPU's hour: shows what --tokens cost on all ranks")
    p.add_argument("--json", action="store_true", help="print the plan as one JSON line, last")
    p.add_argument("--measure", action="store_true",
                   help="run a step of each file on --ranks processes here, and print how far off the plan is")
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p


def verify() -> OneLineParser:
    p = program_parser("verify", allow_abbrev=False,
                       epilog="Every flag of launch/sft.py is taken, too, and means what it means there.")
    p.add_argument("--samples", type=int, default=10, help="samples to show (default: 10)")
    p.add_argument("--color", action="store_true", help="colours even where there is no terminal")
    p.add_argument("--tokens", type=int, default=0,
                   help="tokens of a law's step, about; 0: what fits a minute here (default: 0)")
    p.add_argument("--sensitivity", action="store_true",
                   help="instead: how small a deliberate error may be that each law still finds, in fp32 and bf16")
    return p


def benchmark() -> OneLineParser:
    # argparse breaks no line within alternatives.
    p = program_parser("benchmark", allow_abbrev=False, usage="%(prog)s [--compare WHAT] [--flag VALUE ...]")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--compare", choices=["padded", "plain", "ddp", "moe", "trl"],
                      help="ratios, in turns in one process")
    what.add_argument("--profile", type=pathlib.Path, metavar="FOLDER", help="a torch profiler trace and its summary")
    what.add_argument("--report", action="store_true", help="table, CSV and plots of --out again, measuring nothing")
    what.add_argument("--append", type=pathlib.Path, metavar="RESULTS.JSON",
                      help="every started process is a rank of one cell (srun, torchrun, deepspeed --hostfile)")
    what.add_argument("--cell", type=pathlib.Path, help=argparse.SUPPRESS)
    p.add_argument("--deepspeed", nargs="+", type=commas, metavar="FILE", help="default: zero0 to zero3.json")
    p.add_argument("--preset", nargs="+", type=commas, metavar="PRESET",
                   help="default: debug, minimind-3; on a GPU minimind-3, minimind-3-moe")
    p.add_argument("--rows", nargs="+", type=commas, metavar="LENGTHxROWSxACCUMULATION",
                   help="per rank; default: 768x1x1, on a GPU 4096x8x1")
    p.add_argument("--kernels", nargs="+", metavar="SPEC", help="as launch/sft.py's, several (default: auto)")
    p.add_argument("--ranks", nargs="+", type=commas, metavar="N",
                   help="default: 1 and as many as there are GPUs, were launched, or 2")
    p.add_argument("--warm_up", type=int, help="steps that are not counted (default: 2; --compare: 1)")
    p.add_argument("--steps", type=int, help="steps that are counted (default: 5; --compare: 3; --profile: 2)")
    p.add_argument("--out", type=pathlib.Path, help="folder of the sweep (default: out/benchmark); with --compare: "
                                                    "also write the JSON document to this file")
    p.add_argument("--timeout", type=number, default=900, help="seconds a cell may take (default: %(default)s)")
    p.add_argument("--retry", action="store_true", help="run cells again that are recorded without a result")
    p.add_argument("--dtypes", default="fp32,bf16", help="of --compare padded (default: %(default)s)")
    p.add_argument("--padded_rows", type=int, default=8, help="rows of the padded batch (default: %(default)s)")
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return p


def commas(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def check_kernels() -> OneLineParser:
    p = program_parser("check_kernels")
    p.add_argument("out", nargs="?", type=pathlib.Path, help="folder for the JSON files")
    p.add_argument("--parts", default=",".join(PARTS), help="which, comma-separated (default: %(default)s)")
    p.add_argument("--groups", help="only groups whose name begins with one of these, comma-separated")
    p.add_argument("--small", action="store_true", help="tiny sizes; chosen by itself where there is no GPU")
    p.add_argument("--no_pytest", action="store_true", help="do not run the test files that compare on a GPU")
    p.add_argument("--without", default="", help="contenders to leave out: parts of names, comma-separated")
    p.add_argument("--cpu_ratios", type=pathlib.Path, metavar="OUT.json",
                   help="instead: this project's operations against MiniMind's own way on the CPU")
    p.add_argument("--lengths", default="2048,8192", help="tokens, for --cpu_ratios (default: %(default)s)")
    p.add_argument("--pairs", type=int, default=5, help="timed pairs, for --cpu_ratios (default: %(default)s)")
    # How this program starts itself.
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p
