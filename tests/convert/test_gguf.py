"""What llama.cpp's converter finds in an exported folder, asked of its own `gguf` package: docs/SERVE.md."""

import json
import re

import gguf
import pytest
import torch
from safetensors import safe_open

from minimind_ds import load_tokenizer
from minimind_ds.convert import export
from minimind_ds.data import hf_folder
from tests.convert.test_weights import CONFIGS, state_of

ARCHITECTURES = {"Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3, "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
                 "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA}
# Names that an architecture has for other kinds of its models: experts of Mixtral, tables of Llama 3's rope.
NEVER = {gguf.MODEL_TENSOR.ROPE_FREQS, gguf.MODEL_TENSOR.ATTN_ROT_EMBD}
EXPERTS = {gguf.MODEL_TENSOR.FFN_GATE_INP, gguf.MODEL_TENSOR.FFN_GATE_EXP, gguf.MODEL_TENSOR.FFN_UP_EXP,
           gguf.MODEL_TENSOR.FFN_DOWN_EXP}


def exported(name, folder, tokenizer=None):
    """The names and shapes in a folder's weights, and its config.json."""
    config = CONFIGS[name]
    export.export_hf(state_of(config), config, tokenizer or load_tokenizer(), folder, dtype=torch.float32)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["minimind-3", "untied", "top2", "minimind2"])
def test_every_exported_tensor_has_a_gguf_name_and_none_is_left_over(name, tmp_path):
    shapes, values = exported(name, tmp_path / "hf")
    [architecture] = values["architectures"]
    kind, layers = ARCHITECTURES[architecture], values["num_hidden_layers"]
    names = gguf.get_tensor_name_map(kind, layers)
    # The converter stacks an expert's matrices before it asks for their name.
    stacked = {re.sub(r"experts\.\d+\.", "experts.", key) for key in shapes}
    theirs = {key: names.get_name(key, try_suffixes=(".weight",)) for key in stacked}
    assert None not in theirs.values() and len(set(theirs.values())) == len(theirs), theirs

    wanted = set(gguf.MODEL_TENSORS[kind]) - NEVER
    if not values.get("num_experts"):
        wanted -= EXPERTS
    if values["tie_word_embeddings"]:
        wanted -= {gguf.MODEL_TENSOR.OUTPUT}
    expected = {gguf.TENSOR_NAMES[tensor].format(bid=i) + ".weight" for tensor in wanted for i in range(layers)}
    assert set(theirs.values()) == expected
    if values.get("num_experts"):
        numbers = {int(match[1]) for key in shapes if (match := re.search(r"experts\.(\d+)\.", key))}
        assert numbers == set(range(values["num_experts"]))


@pytest.mark.parametrize("name", ["minimind-3", "top2", "minimind2"])
def test_config_has_the_sizes_that_the_tensors_have(name, tmp_path):
    """The keys that the converter reads; it takes a missing head_dim, say, for hidden_size / heads."""
    shapes, values = exported(name, tmp_path / "hf")
    width, head = values["hidden_size"], values["head_dim"]
    layer = "model.layers.0."
    assert shapes["model.embed_tokens.weight"] == (values["vocab_size"], width)
    assert shapes[layer + "self_attn.q_proj.weight"] == (values["num_attention_heads"] * head, width)
    assert shapes[layer + "self_attn.k_proj.weight"] == (values["num_key_value_heads"] * head, width)
    if name == "top2":
        assert shapes[layer + "mlp.experts.0.up_proj.weight"] == (values["moe_intermediate_size"], width)
        assert shapes[layer + "mlp.gate.weight"] == (values["num_experts"], width)
        assert values["num_experts_per_tok"] == 2 and values["norm_topk_prob"] is True
    else:
        assert shapes[layer + "mlp.up_proj.weight"] == (values["intermediate_size"], width)
    config = CONFIGS[name]
    assert values["rms_norm_eps"] == config.rms_norm_eps
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == config.rope_theta
    assert values["max_position_embeddings"] == config.max_position_embeddings


def test_gguf_reads_special_tokens_merges_and_chat_template_out_of_an_exported_folder(tmp_path):
    tokenizer = load_tokenizer()
    exported("minimind-3", tmp_path / "hf", tokenizer)
    found = gguf.SpecialVocab(tmp_path / "hf", load_merges=True)
    assert found.special_token_ids == {"bos": tokenizer.special_id("<|im_start|>"),
                                       "eos": tokenizer.special_id("<|im_end|>"),
                                       "unk": tokenizer.pad_id, "pad": tokenizer.pad_id}
    # llama.cpp would put <|im_start|> before every prompt, which has its own.
    assert found.add_special_token == {"bos": False, "eos": False}
    assert found.chat_template == hf_folder.chat_template()
    assert len(found.merges) == len(json.loads((tmp_path / "hf/tokenizer.json").read_text())["model"]["merges"])
