"""Exact-match score of a model on held-out conversations: the share of last answers that are right word for word.

    python launch/score.py --weight out/sft --data_path examples/sft_heldout.jsonl
    python launch/score.py --weight out/sft --data_path examples/sft_heldout.jsonl --limit 50 --show_wrong 10 --json
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

# Works from a checkout that was not installed, and whatever the working directory is.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# transformers must not look for anything on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from minimind_ds.config.errors import UserError, one_line, report_bugs  # noqa: E402
from minimind_ds.config.precision import DTYPES  # noqa: E402
from minimind_ds.config.spellings import OneLineParser  # noqa: E402
from minimind_ds.inference import arguments, chat, score  # noqa: E402


def parser() -> OneLineParser:
    p = OneLineParser(prog="python launch/score.py", description=__doc__.split("\n")[0])
    arguments.add(p)
    p.add_argument("--data_path", required=True, help="conversations (docs/DATA.md); the last answer is expected")
    p.add_argument("--limit", type=int, default=0, help="use the first so many records; 0: all (default: 0)")
    p.add_argument("--batch_size", type=int, default=64, help="prompts answered together (default: 64)")
    p.add_argument("--show_wrong", type=int, default=0, help="print so many wrong answers (default: 0)")
    p.add_argument("--json", action="store_true", help="print the result as one JSON line, last")
    p.add_argument("--dtype", choices=tuple(DTYPES), help="precision (default: that of the weights)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    try:
        for name, least in (("limit", 0), ("batch_size", 1), ("show_wrong", 0)):
            if getattr(args, name) < least:
                raise UserError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
        chosen = arguments.choose(args)
        questions = score.read_questions(args.data_path, args.limit)
        dtype = DTYPES[args.dtype] if args.dtype else None
        model, tok = chat.load_model(**chosen.arguments, dtype=dtype, device=args.device)
        for note in chosen.notes:
            print(note, file=sys.stderr)
        result = score.score(model, tok, questions, batch_size=args.batch_size)
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    answers, right = result.pop("answers"), result.pop("right")
    pairs = [(q, a) for q, a, good in zip(questions, answers, right) if not good]
    for question, answer in pairs[:args.show_wrong]:
        print(f"{question.prompt.messages[-1].content!r}: expected {question.expected!r}, got {answer!r}")
    print(score.report(result))
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    report_bugs()
    sys.exit(main(sys.argv[1:]))
