"""Train a tokenizer on your own text: a SentencePiece model with MiniMind's control tokens.

Reads the same files as training does (conversations of any recognised shape, or {"text": ...}) and learns from
the text exactly as it will be tokenised, role names and tool headings included.  The same files in the same order give
the same bytes.

    python launch/train_tokenizer.py --data_path examples/pretrain.jsonl examples/sft_train.jsonl \\
        --vocab_size 2000 --out out/tokenizer.model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minimind_ds.config.errors import UserError, one_line, report_bugs  # noqa: E402
from minimind_ds.config.spellings import OneLineParser  # noqa: E402
from minimind_ds.data.conversation import file_kind, read_records  # noqa: E402
from minimind_ds.data.sample import render  # noqa: E402
from minimind_ds.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", nargs="+", required=True, help="data files (docs/DATA.md), one or more")
    parser.add_argument("--out", required=True, help="the .model file to write")
    parser.add_argument("--vocab_size", type=int, default=6400, help="pieces, control tokens included (default 6400)")
    parser.add_argument("--on_bad_record", choices=("stop", "skip"), default="stop",
                        help="a record that cannot be used: stop (default), or skip and count it")
    return parser.parse_args(argv)


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


if __name__ == "__main__":
    report_bugs()
    raise SystemExit(main())
