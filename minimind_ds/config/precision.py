"""The precisions' names, as flags have them, and torch's dtypes."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
