"""Tokenise data before a run, into the cache that the run then finds; tells what the run would tell of the data.

    python launch/tokenize_data.py --data_path my.jsonl --max_seq_len 768          # conversations, for sft
    python launch/tokenize_data.py --program pretrain --data_path texts.jsonl --tokenizer path/to/model
    python launch/tokenize_data.py --config run.yaml --kind conversations

Needs no GPU and starts no ranks.  The flags are those of the training, so that the same ones make the same cache.
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("tokenize", sys.argv[1:]))
