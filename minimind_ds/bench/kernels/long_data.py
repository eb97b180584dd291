"""Conversations of about 300 tokens made of the bundled ones, which have 30: for measuring throughput.

Turns of neighbouring conversations are joined, system prompts left out, in several random orders.

    python -m minimind_ds.bench.kernels.long_data OUT.jsonl
"""

from __future__ import annotations

import json
import pathlib
import random
import sys

from .curve import DATA

# Joined conversations, and characters of each (the bundled text has about a token a character).
COUNT, CHARACTERS = 3000, 250


def joined(lines: list[str], seed: int) -> list[dict]:
    """COUNT conversations of log-normally spread length."""
    generator = random.Random(seed)
    turns = [[turn for turn in json.loads(line)["conversations"] if turn["role"] != "system"] for line in lines]
    conversations, at = [], len(turns)
    while len(conversations) < COUNT:
        wanted, messages = CHARACTERS * generator.lognormvariate(-0.18, 0.6), []
        while sum(len(message["content"]) for message in messages) < wanted:
            if at == len(turns):
                generator.shuffle(turns)
                at = 0
            messages += turns[at]
            at += 1
        conversations.append({"conversations": messages})
    return conversations


def main(path: str) -> None:
    lines = DATA.read_text(encoding="utf-8").splitlines()
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in joined(lines, seed=0))
    pathlib.Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
