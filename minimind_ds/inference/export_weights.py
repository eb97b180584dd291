"""The program that writes weights for others: what convert/export.py does, with a checkpoint for weights too.

    python launch/export.py --weight out/sft --to hf --out out/sft-hf
    python launch/export.py --weight out/sft/checkpoints --to hf --out out/so-far-hf
"""

from __future__ import annotations

import sys

from minimind_ds.checkpoint.weights import opened
from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.convert import export


def main(argv: list[str]) -> int:
    """The whole of launch/export.py.  Returns the exit code."""
    args = program_flags.export().parse_args(argv)
    try:
        export.run(opened(args.weight), args.to, args.out, dtype=args.dtype, preset=args.preset,
                   tokenizer=args.tokenizer, overwrite=args.overwrite, lora=opened(args.lora))
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0
