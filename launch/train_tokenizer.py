"""Train a tokenizer on your own text: a SentencePiece model with MiniMind's control tokens.

Reads the same files as training does (conversations of any recognised shape, or {"text": ...}) and learns from
the text exactly as it will be tokenised, role names and tool headings included.  The same files in the same order give
the same bytes.

    python launch/train_tokenizer.py --data_path examples/pretrain.jsonl examples/sft_train.jsonl \\
        --vocab_size 2000 --out out/tokenizer.model
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("train_tokenizer", sys.argv[1:]))
