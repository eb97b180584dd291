"""Weights out of a run, for other programs: a Hugging Face folder, or the original MiniMind's .pth.

    python launch/export.py --weight out/sft --to hf --out out/sft-hf
    python launch/export.py --weight out/sft --to minimind --out full_sft_768.pth
    python launch/export.py --weight out/sft --lora out/lora --to hf --out out/merged-hf
    python launch/export.py --lora out/lora --to minimind_lora --out lora_768.pth
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("export", sys.argv[1:]))
