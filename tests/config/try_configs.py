"""What prepare() says to every DeepSpeed JSON under some folders: accepted, refused with its line, or crashed.

    python -m tests.config.try_configs FOLDER [...] [--flags "--dtype bf16"]

Nothing is trained.  Files without any of DeepSpeed's keys are passed over.  The last line is a JSON object of counts.
"""

import argparse
import collections
import json
import os
import pathlib
import sys
import tempfile
import traceback

import torch

from minimind_ds.config.deepspeed_keys import KEYS
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.distributed.world import World
from minimind_ds.training.prepare import PreparedRun, prepare

RECORD = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]}


def is_deepspeed(path: pathlib.Path) -> bool:
    """Whether a file has any of the keys by which a DeepSpeed configuration is known."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return any(f'"{key}"' in text for key in KEYS if key.startswith(("train_", "zero_optimization", "gradient_acc",
                                                                      "optimizer", "bf16", "fp16")) and "." not in key)


def prepared_with(config: pathlib.Path, folder: pathlib.Path, *flags: str, ranks: int = 1, rank: int = 0,
                  dtype: str | None = "fp32") -> PreparedRun:
    """prepare() for a small run on a file, without any rank but this one; dtype None: the machine chooses."""
    data = folder / "data.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(RECORD) + "\n" for _ in range(40)), encoding="utf-8")
    world = World(rank=rank, size=ranks, local_rank=rank, local_size=ranks, device=torch.device("cpu"))
    return prepare("sft", ["--deepspeed", str(config), "--preset", "debug", "--data_path", str(data),
                           "--save_interval", "0", "--save_dir", str(folder / "run"),
                           "--cache_dir", str(folder / "cache"), "--max_seq_len", "32", "--pack_len", "32",
                           *(["--dtype", dtype] if dtype else []), *flags], world)


def verdict(config: pathlib.Path, folder: pathlib.Path, flags: list[str]) -> tuple[str, str]:
    """("accepted", notes), ("refused", the line) or ("crashed", the traceback's last line)."""
    try:
        prepared = prepared_with(config, folder, *flags, dtype=None)
    except UserError as error:
        return "refused", one_line(error)
    except Exception as error:
        traceback.print_exc()
        return "crashed", f"{type(error).__name__}: {error}"
    return "accepted", "; ".join(note for note in prepared.notes if str(config) in note)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--flags", default="", help="further flags of the run, as one text")
    options = parser.parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        for top in options.folders:
            for path in sorted(p for p in top.rglob("*.json") if p.is_file() and is_deepspeed(p)):
                what, why = verdict(path, pathlib.Path(scratch), options.flags.split())
                counts[what] += 1
                print(f"{what}  {path.relative_to(top)}  {why.replace(str(path), path.name)}", flush=True)
    print(json.dumps(counts))
    return 1 if counts["crashed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
