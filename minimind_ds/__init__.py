"""minimind_ds: DeepSpeed distributed scaling for MiniMind.

    from minimind_ds import ModelConfig, PRESETS, MiniMindForCausalLM, Sample, PackedBatch
    from minimind_ds import build_sample, pack, collate, load_tokenizer
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minimind_ds.config.model import PRESETS, ModelConfig
    from minimind_ds.data.packing import PackedBatch, collate, pack
    from minimind_ds.data.sample import Sample, build_sample
    from minimind_ds.data.tokenizer import load_tokenizer
    from minimind_ds.model.decoder import MiniMindForCausalLM, ModelOutput

# setup.py reads this line.
__version__ = "0.1.0"
__all__ = ["PRESETS", "MiniMindForCausalLM", "ModelConfig", "ModelOutput", "PackedBatch", "Sample", "build_sample",
           "collate", "load_tokenizer", "pack"]
WHERE = {"PRESETS": "config.model", "ModelConfig": "config.model", "PackedBatch": "data.packing",
         "collate": "data.packing", "pack": "data.packing", "Sample": "data.sample", "build_sample": "data.sample",
         "load_tokenizer": "data.tokenizer", "MiniMindForCausalLM": "model.decoder",
         "ModelOutput": "model.decoder"}


def __getattr__(name: str):
    """Imports what is asked for: --help and `minimind-ds` need not wait for torch."""
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{WHERE[name]}"), name)
    return value
