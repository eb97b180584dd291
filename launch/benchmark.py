"""Throughput, measured on the real training step.

    deepspeed --num_gpus 2 launch/benchmark.py        # the sweep: out/benchmark/results.json, .md, ...
    python launch/benchmark.py --deepspeed ds_configs/zero?.json --preset debug minimind-3 --ranks 1,2 --rows 768x1x1
    python launch/benchmark.py --compare plain                     # each ZeRO stage / PyTorch alone; padded, moe, trl
    deepspeed --num_gpus 2 launch/benchmark.py --compare ddp
    python launch/benchmark.py --profile out/profile --deepspeed ds_configs/zero2.json

A sweep goes on where it stopped.  Flags it does not know are those of launch/sft.py (data_path, dtype, tokenizer ...).
docs/BENCHMARK.md says what is measured and how.
"""

import pathlib
import sys

# Works from a checkout that was not installed, and whatever the working directory is.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from minimind_ds.bench import throughput  # noqa: E402
from minimind_ds.config.errors import report_bugs  # noqa: E402

if __name__ == "__main__":
    report_bugs()
    sys.exit(throughput.main(__doc__, sys.argv[1:]))
