"""Loss, perplexity and token accuracy of weights on data files, as the training's own evaluation has them.

    python launch/evaluate.py --weight out/sft --data_path examples/sft_heldout.jsonl
    python launch/evaluate.py --weight out/sft/checkpoints --data_path a.jsonl b.jsonl --out result.json
    deepspeed --num_gpus 2 launch/evaluate.py --weight out/sft --data_path held_out/ --batch_size 8
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("evaluate", sys.argv[1:]))
