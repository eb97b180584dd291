"""A tokenizer trained on the text as training renders it; launch/train_tokenizer.py's main.

    python launch/train_tokenizer.py --data_path my.jsonl --vocab_size 6400 --out tokenizer.model
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.data.conversation import file_kind, read_records
from minimind_ds.data.sample import render
from minimind_ds.data.tokenizer import Tokenizer, train_tokenizer


def main(argv: list[str]) -> int:
    """The whole of launch/train_tokenizer.py.  Returns the exit code."""
    args = program_flags.train_tokenizer().parse_args(argv)
    try:
        if os.path.isfile(args.out) and not args.out.endswith(".model"):
            raise UserError(f"--out {args.out} exists and is no .model file: name another")
        counts: dict[str, int] = {}
        tok = train_tokenizer(texts(args.data_path, args.on_bad_record, counts), vocab_size=args.vocab_size,
                              out=args.out)
        print(report(tok, args, counts))
    except UserError as err:
        print(one_line(err), file=sys.stderr)
        return 2
    except OSError as err:
        print(f"error: cannot write {args.out}: {err.strerror}", file=sys.stderr)
        return 2
    return 0


def texts(paths: list[str], on_bad_record: str, counts: dict[str, int]) -> Iterator[str]:
    """Every text the tokenizer will meet in these files; fills `counts` with records, skipped and characters."""
    counts.update(records=0, skipped=0, characters=0)
    # Before anything is read, so that a misspelt last path does not cost the time of the first.
    readers = [read_records(path, file_kind(path), on_bad_record) for path in paths]
    for records in readers:
        for _, item in records:
            pieces = [item] if isinstance(item, str) else [piece.text for piece in render(item) if not piece.control]
            counts["characters"] += sum(map(len, pieces))
            yield from pieces
        counts["records"] += records.read
        counts["skipped"] += records.skipped


def report(tok: Tokenizer, args: argparse.Namespace, counts: dict[str, int]) -> str:
    ignored: dict[str, int] = {}
    tokens = sum(map(len, tok.encode_batch(list(texts(args.data_path, args.on_bad_record, ignored)))))
    return (f"{args.out}: {tok.vocab_size} pieces from {counts['records']} records ({counts['skipped']} skipped), "
            f"{counts['characters'] / tokens:.2f} characters per token, fingerprint {tok.fingerprint[:12]}")
