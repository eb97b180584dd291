"""What tokenising, opening and planning cost at scale: conversations made of the bundled ones, varied, none kept.

Seconds are of this program's processors, workers included, which a busy machine hardly changes; memory is what the
process and its workers hold in RAM above what they held before the first record.

    python -m tests.data.scale --conversations 400000 --tokenizer ../shared/minimind_tokenizer
"""

import argparse
import json
import pathlib
import random
import resource
import tempfile
import threading
import time

import psutil

from minimind_ds.paths import EXAMPLES

MEAN_BYTES = 650


def make(path: pathlib.Path, conversations: int, sources: list[pathlib.Path], seed: int = 0) -> None:
    """A file of about MEAN_BYTES a conversation: turns of several given ones, with numbers that make each new."""
    dice = random.Random(seed)
    bundled = [json.loads(line)["conversations"] for source in sources for line in source.open(encoding="utf-8")]
    bundled = [turns for turns in bundled if {turn["role"] for turn in turns} <= {"user", "assistant"}]
    with path.open("w", encoding="utf-8") as file:
        for number in range(conversations):
            turns, size = [], 0
            wanted = dice.uniform(0, 1.8) * MEAN_BYTES
            while size < wanted or len(turns) < 2:
                for turn in dice.choice(bundled):
                    content = f"{turn['content']} ({number * 7919 % 1_000_003})"
                    turns.append({"role": turn["role"], "content": content})
                    size += len(content.encode()) + 40
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def long_lines(path: pathlib.Path, lines: int) -> None:
    """Lines of 1 MB."""
    text = (EXAMPLES / "pretrain.jsonl").read_text(encoding="utf-8")[:1_000_000]
    text = (text * (1 + 1_000_000 // len(text)))[:1_000_000]
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            turns = [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def cpu_seconds() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


class Memory(threading.Thread):
    """The most memory that this process and its children held together; pages they share count once (PSS)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.me, self.done, self.most, self.most_rss = psutil.Process(), threading.Event(), 0, 0
        self.start_at = self.now()
        self.start_rss = self.me.memory_info().rss
        self.start()

    def now(self) -> int:
        total = 0
        for process in (self.me, *self.me.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total

    def run(self):
        while not self.done.wait(0.5):
            self.most, self.most_rss = max(self.most, self.now()), max(self.most_rss, self.me.memory_info().rss)


def measure(path: pathlib.Path, cache: pathlib.Path, tokenizer: str | None, workers: int | None) -> dict:
    # Here, since workers import this module as a program's: like launch/sft.py, it costs them nothing.
    from minimind_ds.data.loader import epoch_plan
    from minimind_ds.data.store import open_or_build
    from minimind_ds.data.tokenizer import load_tokenizer

    tok = load_tokenizer(tokenizer)
    common = dict(kind="conversations", max_seq_len=768, cache_dir=cache)
    memory, began = Memory(), cpu_seconds()
    store = open_or_build(path, tok, **common, workers=workers, progress=True)
    spent = cpu_seconds() - began
    memory.done.set()
    memory.join()
    opened, at = cpu_seconds(), time.perf_counter()
    store = open_or_build(path, tok, **common)
    open_s, open_wall = cpu_seconds() - opened, time.perf_counter() - at
    at = cpu_seconds()
    plan = epoch_plan(store.lengths, store.labelled, pack_len=4096, rows_per_step=64, seed=0, epoch=0)
    plan_s, at = cpu_seconds() - at, cpu_seconds()
    for block in range(len(store.blocks.checked)):
        store.blocks.sound(block)
    check_s = cpu_seconds() - at
    size = path.stat().st_size / 1e6
    return {"file_mb": size, "records": store.stats["records"], "tokens": store.stats["tokens"], "rows": plan.n_rows,
            "fill": plan.fill, "mb_per_cpu_second": size / spent, "cpu_seconds": spent,
            "memory_over_start_mib": (memory.most - memory.start_at) / 2**20,
            "own_rss_over_start_mib": (memory.most_rss - memory.start_rss) / 2**20, "open_cpu_s": open_s,
            "open_wall_s": open_wall, "plan_cpu_s": plan_s, "check_all_blocks_cpu_s": check_s,
            "token_mb": store.tokens.nbytes / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--conversations", type=int, default=400_000)
    parser.add_argument("--long_lines", type=int, default=0, help="lines of 1 MB instead")
    parser.add_argument("--sources", nargs="+", type=pathlib.Path, default=[EXAMPLES / "sft_train.jsonl"],
                        help="conversations to vary (default: the bundled ones)")
    parser.add_argument("--tokenizer")
    parser.add_argument("--workers", type=int, help="default: as a run chooses")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "conversations.jsonl"
        long_lines(path, args.long_lines) if args.long_lines else make(path, args.conversations, args.sources)
        print(json.dumps(measure(path, pathlib.Path(folder) / "cache", args.tokenizer, args.workers), indent=1))


if __name__ == "__main__":
    main()
