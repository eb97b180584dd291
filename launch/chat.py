"""Talk to a trained model, or ask it one question.

    python launch/chat.py --weight out/sft
    python launch/chat.py --weight out/sft --prompt "What is the opposite of hot?" --temperature 0
    python launch/chat.py --weight out/pretrain --raw --prompt "The sea is"
    python launch/chat.py --load_from path/to/minimind/model --weight full_sft         # as MiniMind's eval_llm.py
"""

from __future__ import annotations

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
from minimind_ds.config.spellings import OneLineParser, to_bool  # noqa: E402
from minimind_ds.inference import arguments, chat  # noqa: E402


def parser() -> OneLineParser:
    p = OneLineParser(prog="python launch/chat.py", description=__doc__.split("\n")[0])
    arguments.add(p)
    p.add_argument("--prompt", help="ask this and leave; without it: a conversation")
    p.add_argument("--system", default="", help="system prompt (default: none)")
    p.add_argument("--history", type=int, help="earlier question-answer pairs sent along (default: 8)")
    p.add_argument("--historys", type=int, help="the same in messages, two a pair, as MiniMind's flag")
    p.add_argument("--open_thinking", nargs="?", const=True, default=False, type=to_bool,
                   help="leave the think block open for the model to fill")
    p.add_argument("--show_speed", nargs="?", const=True, default=True, type=to_bool,
                   help="tell each answer's tokens a second; 0: do not (default: 1)")
    p.add_argument("--raw", action="store_true",
                   help="continue plain text, each by itself, as pretrained weights do; no chat format")
    own = chat.Sampling()
    p.add_argument("--temperature", type=float, default=own.temperature,
                   help=f"0: greedy (default: {own.temperature})")
    p.add_argument("--top_p", type=float, default=own.top_p,
                   help=f"draw from the likeliest tokens that hold this share (default: {own.top_p})")
    p.add_argument("--top_k", type=int, default=own.top_k, help="draw from this many tokens; 0: all (default: 0)")
    p.add_argument("--repetition_penalty", type=float, default=own.repetition_penalty,
                   help=f"above 1: repeats less (default: {own.repetition_penalty})")
    p.add_argument("--max_new_tokens", type=int, default=own.max_new_tokens,
                   help=f"longest answer in tokens (default: {own.max_new_tokens})")
    p.add_argument("--seed", type=int, help="the same seed draws the same answers (default: another each time)")
    p.add_argument("--dtype", choices=tuple(DTYPES), help="precision (default: that of the weights)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    return p


def pairs_of(args) -> int:
    """--history, or MiniMind's --historys.  Raises ValueError on both, on a negative one and on half a pair."""
    if args.historys is None:
        history = 8 if args.history is None else args.history
        if history < 0:
            raise UserError(f"--history is {history}; it must be at least 0")
        return history
    if args.history is not None:
        raise UserError("--history counts pairs and --historys their messages: give one")
    if args.historys < 0 or args.historys % 2:
        raise UserError(f"--historys is {args.historys}; it must be an even number, questions and answers together")
    return args.historys // 2


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    try:
        history, chosen = pairs_of(args), arguments.choose(args)
        if chosen.pretrained and not args.raw:
            chosen.notes.append("pretrained weights continue plain text (--raw)")
            args.raw = True
        if args.raw and (args.system or args.open_thinking):
            name = "--system" if args.system else "--open_thinking"
            raise UserError(f"{name} belongs to the chat format; --raw continues plain text")
        sampling = chat.Sampling(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                                 repetition_penalty=args.repetition_penalty, max_new_tokens=args.max_new_tokens)
        dtype = DTYPES[args.dtype] if args.dtype else None
        model, tok = chat.load_model(**chosen.arguments, dtype=dtype, device=args.device)
        for note in chosen.notes:
            print(note, file=sys.stderr)
        if args.seed is not None:
            torch.manual_seed(args.seed)
        talk = chat.Chat(model, tok, sampling, args.system, history, args.open_thinking, args.raw,
                         args.show_speed)
        if args.prompt is None:
            chat.converse(talk)
        else:
            chat.answer(talk, args.prompt)
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    report_bugs()
    sys.exit(main(sys.argv[1:]))
