"""Exact-match score of a model on held-out conversations: the share of last answers that are right word for word.

    python launch/score.py --weight out/sft --data_path examples/sft_heldout.jsonl
    python launch/score.py --weight out/sft --data_path examples/sft_heldout.jsonl --limit 50 --show_wrong 10 --json
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("score", sys.argv[1:]))
