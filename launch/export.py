"""Weights out of a run, for other programs: a Hugging Face folder, or the original MiniMind's .pth.

    python launch/export.py --weight out/sft --to hf --out out/sft-hf
    python launch/export.py --weight out/sft --to minimind --out full_sft_768.pth
    python launch/export.py --weight out/sft --lora out/lora --to hf --out out/merged-hf
    python launch/export.py --lora out/lora --to minimind_lora --out lora_768.pth
"""

import argparse
import pathlib
import sys

# Works from a checkout that was not installed, and whatever the working directory is.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from minimind_ds.config.errors import UserError, one_line, report_bugs  # noqa: E402
from minimind_ds.config.model import PRESETS  # noqa: E402
from minimind_ds.config.precision import DTYPES  # noqa: E402
from minimind_ds.config.spellings import OneLineParser  # noqa: E402
from minimind_ds.convert import export  # noqa: E402


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight",
                        help="a run folder, its .safetensors file, a MiniMind .pth or a Hugging Face folder")
    parser.add_argument("--lora", help="LoRA adapters to merge into the weights: a run folder, its .safetensors file "
                                       "or a MiniMind LoRA .pth")
    parser.add_argument("--to", choices=["hf", "minimind", "minimind_lora"], required=True,
                        help="the format to write; minimind_lora: the adapters alone, for MiniMind's load_lora")
    parser.add_argument("--out", required=True, help="the folder (hf) or file (minimind, minimind_lora) to write")
    parser.add_argument("--dtype", choices=list(DTYPES),
                        help="precision of the weights (default: the run's own for hf, else fp16)")
    parser.add_argument("--preset", choices=list(PRESETS), help="the model's shape, needed for a .pth only")
    parser.add_argument("--tokenizer", help="a tokenizer folder or .model (default: the run's own)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    args = parser.parse_args()
    try:
        export.run(args.weight, args.to, args.out, dtype=args.dtype, preset=args.preset, tokenizer=args.tokenizer,
                   overwrite=args.overwrite, lora=args.lora)
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    report_bugs()
    sys.exit(main())
