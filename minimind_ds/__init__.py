"""minimind_ds: DeepSpeed distributed scaling for MiniMind.

    from minimind_ds import ModelConfig, PRESETS, MiniMindForCausalLM, Sample, PackedBatch
    from minimind_ds import build_sample, pack, collate, load_tokenizer
"""

from minimind_ds.config.model import PRESETS, ModelConfig
from minimind_ds.data.packing import PackedBatch, collate, pack
from minimind_ds.data.sample import Sample, build_sample
from minimind_ds.data.tokenizer import load_tokenizer
from minimind_ds.model.decoder import MiniMindForCausalLM

__all__ = ["PRESETS", "MiniMindForCausalLM", "ModelConfig", "PackedBatch", "Sample", "build_sample", "collate",
           "load_tokenizer", "pack"]
