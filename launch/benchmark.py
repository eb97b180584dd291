"""Throughput, measured on the real training step; prints a table and, last, one JSON document.

    deepspeed launch/benchmark.py --compare padded
    deepspeed launch/benchmark.py --compare padded --preset minimind-3 --data_path sft_gsm8k.jsonl --tokenizer FOLDER

Flags it does not know are those of launch/sft.py (data, preset, pack_len, kernels ...).
"""

import argparse
import pathlib
import sys

# Works from a checkout that was not installed, and whatever the working directory is.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from minimind_ds import benchmark, engine  # noqa: E402
from minimind_ds.train import user_error  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", choices=["padded"], required=True, help="what to measure against")
    parser.add_argument("--dtypes", default="fp32,bf16", help="precisions, comma-separated (default: %(default)s)")
    parser.add_argument("--padded_rows", type=int, default=8, help="rows of the padded batch (default: %(default)s)")
    parser.add_argument("--warm_up", type=int, default=1, help="rounds that are not counted (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="rounds that are counted (default: %(default)s)")
    parser.add_argument("--out", help="also write the JSON document to this file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if "--deepspeed" not in flags:
        flags += ["--deepspeed", str(pathlib.Path(__file__).resolve().parents[1] / "ds_configs" / "zero0.json")]
    layout = engine.read_layout()
    try:
        result = benchmark.compare_padded(flags, dtypes=args.dtypes.split(","), padded_rows=args.padded_rows,
                                          warm_up=args.warm_up, steps=args.steps,
                                          say=lambda text: print(text, flush=True))
    except ValueError as error:
        return user_error(error, layout)
    print("\n" + benchmark.table(result) + "\n")
    benchmark.write(result, args.out)
    engine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
