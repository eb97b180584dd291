"""Talk to a trained model, or ask it one question.

    python launch/chat.py --weight out/sft
    python launch/chat.py --weight out/sft --prompt "What is the opposite of hot?" --temperature 0
    python launch/chat.py --weight out/pretrain --raw --prompt "The sea is"
    python launch/chat.py --load_from path/to/minimind/model --weight full_sft         # as MiniMind's eval_llm.py
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("chat", sys.argv[1:]))
