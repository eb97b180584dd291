"""What prepare() says to every DeepSpeed JSON under some folders: accepted, refused with its line, or crashed.

    python -m tests.config.try_configs FOLDER [...] [--flags "--dtype bf16"] [--train 12]

Of each refused file it says whether the installed DeepSpeed takes it: whether a model of two layers makes a step.
--train N: the N accepted files that differ most train two steps on two ranks, each by `deepspeed launch/sft.py`.
Files without any of DeepSpeed's keys are passed over.  The last line is a JSON object of counts.
"""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback

import hjson
import torch

from minimind_ds.config.deepspeed_check import drop_auto, without_comments
from minimind_ds.config.deepspeed_keys import KEYS, brief
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.distributed import engine
from minimind_ds.distributed.world import World
from minimind_ds.paths import ROOT
from minimind_ds.training.prepare import PreparedRun, prepare
from tests.conftest import deepspeed_command, environment, free_port

RECORD = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]}


def is_deepspeed(path: pathlib.Path) -> bool:
    """Whether a file has any of the keys by which a DeepSpeed configuration is known, at its top if it can be read."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        there = hjson.loads(text)
    except ValueError:
        there = [key for key in KEYS if f'"{key}"' in text]
    return any(key.startswith(("train_", "zero_opt", "gradient_", "optimizer", "bf", "fp16")) and key in there
               for key in KEYS if "." not in key)


def run_flags(config: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """A small run on a file; its data are written into the folder."""
    data = folder / "data.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(RECORD) + "\n" for _ in range(40)), encoding="utf-8")
    return ["--deepspeed", str(config), "--preset", "debug", "--data_path", str(data), "--save_interval", "0",
            "--save_dir", str(folder / "run"), "--cache_dir", str(folder / "cache"), "--max_seq_len", "32",
            "--pack_len", "32"]


def prepared_with(config: pathlib.Path, folder: pathlib.Path, *flags: str, ranks: int = 1, rank: int = 0,
                  dtype: str | None = "fp32") -> PreparedRun:
    """prepare() for a small run on a file, without any rank but this one; dtype None: the machine chooses."""
    world = World(rank=rank, size=ranks, local_rank=rank, local_size=ranks, device=torch.device("cpu"))
    return prepare("sft", [*run_flags(config, folder), *(["--dtype", dtype] if dtype else []), *flags], world)


def verdict(config: pathlib.Path, folder: pathlib.Path, flags: list[str], ranks: int = 1) -> tuple[str, str]:
    """("accepted", notes), ("refused", the line) or ("crashed", the traceback's last line)."""
    try:
        prepared = prepared_with(config, folder, *flags, dtype=None, ranks=ranks)
    except UserError as error:
        return "refused", one_line(error)
    except Exception as error:
        traceback.print_exc()
        return "crashed", f"{type(error).__name__}: {error}"
    return "accepted", "; ".join(note for note in prepared.notes if str(config) in note)


def deepspeeds_word(path: pathlib.Path) -> str | None:
    """What the installed DeepSpeed says against a file whose batch fits one rank; None: it takes a step."""
    import deepspeed

    made = None
    try:
        config = drop_auto(without_comments(hjson.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=dict)))
        if "nvme_path" in path.read_text(encoding="utf-8-sig"):
            return "not tried: it would write to the disk that the file names"
        for key in ("train_batch_size", "gradient_accumulation_steps"):
            config.pop(key, None)
        config["train_micro_batch_size_per_gpu"] = 1
        config.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        made, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
        made.backward(made(torch.ones(1, 8, dtype=next(model.parameters()).dtype)).float().sum())
        made.step()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {brief(error)}"
    finally:
        if made is not None:
            made.destroy()
    return None


def settings(path: pathlib.Path) -> set[str]:
    """A file's settings as texts, for telling how much two files have in common."""
    def walk(value, at: str) -> list[str]:
        if not isinstance(value, dict):
            return [f"{at} {value}"]
        return [part for key, inner in value.items() for part in walk(inner, f"{at}.{key}")]

    return set(walk(hjson.loads(path.read_text(encoding="utf-8-sig")), ""))


def most_different(paths: list[pathlib.Path], count: int) -> list[pathlib.Path]:
    """The longest file, then always the one that has least in common with the nearest of those chosen."""
    facts, chosen = {path: settings(path) for path in paths}, []
    while len(chosen) < min(count, len(paths)):
        chosen.append(max((path for path in paths if path not in chosen), key=lambda path: (
            min((1 - len(facts[path] & facts[c]) / len(facts[path] | facts[c]) for c in chosen), default=1),
            len(facts[path]))))
    return chosen


def train(path: pathlib.Path, folder: pathlib.Path) -> tuple[bool, str]:
    """Two steps on two ranks: (whether they were made, losses or the last lines)."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        words = [*run_flags(path, pathlib.Path(own)), "--max_steps", "2"]
        done = subprocess.run(deepspeed_command(2, "launch/sft.py", *words), cwd=ROOT, env=environment(), text=True,
                              capture_output=True)
        metrics = pathlib.Path(own) / "run" / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        losses = [f"{line['loss']:.4f}" for line in lines if "loss" in line]
    good = done.returncode == 0 and len(losses) == 2
    return good, ", ".join(losses) if good else " | ".join((done.stdout + done.stderr).splitlines()[-5:])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--flags", default="", help="further flags of the run, as one text")
    parser.add_argument("--train", type=int, default=0, help="how many of the accepted files train two steps")
    options = parser.parse_args(argv)
    os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1", MASTER_PORT=str(free_port()))
    counts, accepted = collections.Counter(), []
    engine.start(World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for top in options.folders:
            for path in sorted(p for p in top.rglob("*.json") if p.is_file() and is_deepspeed(p)):
                what, why = verdict(path, folder, options.flags.split())
                counts[what] += 1
                if what == "accepted":
                    accepted.append(path)
                else:
                    word = deepspeeds_word(path)
                    counts["refused, and DeepSpeed takes it"] += what == "refused" and word is None
                    why += f"  [DeepSpeed: {word or 'takes it'}]"
                print(f"{what}  {path.relative_to(top)}  {why.replace(str(path), path.name)}", flush=True)
        on_two = [path for path in accepted if options.train and verdict(path, folder, [], ranks=2)[0] == "accepted"]
        for path in most_different(on_two, options.train):
            good, said = train(path, folder)
            counts["trained" if good else "did not train"] += 1
            print(f"{'trained' if good else 'did not train'}  {path}  {said}", flush=True)
    print(json.dumps(counts))
    return 1 if counts["crashed"] or counts["did not train"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
