"""Throughput, measured on the real training step.

    deepspeed --num_gpus 2 launch/benchmark.py        # the sweep: out/benchmark/results.json, .md, ...
    python launch/benchmark.py --deepspeed ds_configs/zero?.json --preset debug minimind-3 --ranks 1,2 --rows 768x1x1
    python launch/benchmark.py --compare plain                     # each ZeRO stage / PyTorch alone; padded, moe, trl
    deepspeed --num_gpus 2 launch/benchmark.py --compare ddp
    python launch/benchmark.py --profile out/profile --deepspeed ds_configs/zero1.json

A sweep goes on where it stopped.  Flags it does not know are those of launch/sft.py (data_path, dtype, tokenizer ...).
docs/BENCHMARK.md says what is measured and how.
"""

import pathlib
import sys

# The folder that holds the package, of a checkout or of an installed wheel; needs no installation.
sys.path.insert(0, str(next(p for p in pathlib.Path(__file__).resolve().parents if (p / "minimind_ds").is_dir())))

from minimind_ds.programs import start  # noqa: E402

if __name__ == "__main__":
    sys.exit(start("benchmark", sys.argv[1:]))
