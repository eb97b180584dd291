"""Readers of weights: safetensors with all that their headers say, .pth files, adapters, Hugging Face folders."""

from __future__ import annotations

import collections
import functools
import io
import json
import pathlib
import random
import struct
import zipfile

import torch
from safetensors.torch import save

from minimind_ds.config.model import ModelConfig
from minimind_ds.convert import export, huggingface, minimind, vocabulary, weight_files
from minimind_ds.convert.vocabulary import Vocabulary
from minimind_ds.model import lora
from tests.fuzz import mutate
from tests.fuzz.data_targets import tokenizer
from tests.fuzz.harness import Target

TINY = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
                   intermediate_size=16)
TINY_MOE = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                       vocab_size=32, intermediate_size=16,
                       use_moe=True, num_experts=2)
ADAPTERS = lora.Lora(rank=2, alpha=4.0, targets=("q_proj", "o_proj"))
DTYPES = ("F32", "F64", "BF16", "F16", "I64", "BOOL", "F8_E4M3", "U8", "C64", "X")
NAMES = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
         "model.layers.0.mlp.experts.0.gate_proj.weight",
         "model.layers.0.self_attn.q_proj.lora.A.weight", "model.layers.9.x", "module.x", "freqs_cos", "a", "")


@functools.cache
def states() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    found = {name: {key: torch.randn(shape) * 0.02 for key, shape in minimind.expected_shapes(config).items()}
             for name, config in (("dense", TINY), ("moe", TINY_MOE))}
    return {**found, "lora": {name: torch.randn(shape) for name, shape in lora.shapes(TINY, ADAPTERS).items()}}


@functools.cache
def said_of() -> dict[str, dict[str, object]]:
    """What the metadata of each file say, taken apart."""
    words = json.loads(Vocabulary.of(tokenizer()).to_json())
    return {"dense": {"config": TINY.to_dict(), "tokenizer": words},
            "moe": {"config": TINY_MOE.to_dict(), "tokenizer": words},
            "lora": {"config": TINY.to_dict(), "lora": ADAPTERS.facts(), "tokenizer": words}}


def named(draw: random.Random, state: dict, kind: str) -> dict:
    """The tensors under some names of theirs: ours, MiniMind's, or a few changed."""
    if kind == "moe" and draw.random() < 0.5:
        state = minimind.to_minimind(state, TINY_MOE)
    state = dict(state)
    for _ in range(draw.choice((0, 0, 1, 2))):
        name = draw.choice(list(state) or ["a"])
        tensor = state.pop(name, None)
        if tensor is not None and draw.random() < 0.8:
            state[draw.choice((name, draw.choice(NAMES),
                               mutate.text(draw).encode("utf-8", "replace").decode()))] = odd(draw, tensor)
    return state


def odd(draw: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Of another kind, shape or content."""
    tensor = tensor.float()
    return draw.choice((
        lambda: tensor.to(draw.choice((torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool,
                                       torch.complex64, torch.uint8))),
        lambda: tensor.reshape(-1)[:draw.choice((0, 1, 7))], lambda: tensor.reshape(-1), lambda: tensor.unsqueeze(0),
        lambda: tensor.sum(),
        lambda: torch.full_like(tensor, draw.choice((float("nan"), float("inf"), 3e38))),
        lambda: tensor.repeat(2, *[1] * (tensor.dim() - 1)),
        lambda: tensor.new_zeros(tensor.shape)))().contiguous()


def draw_safetensors(draw: random.Random) -> tuple[str, bytes, bytes]:
    """-> (what it is, the file, a config.json beside it)."""
    kind = draw.choice(("dense", "moe", "lora"))
    state = named(draw, states()[kind], kind) if draw.random() < 0.4 else states()[kind]
    said = said_of()[kind]
    said = mutate.altered(draw, said,
                          ("config", "lora", "tokenizer", *said["config"])) if draw.random() < 0.6 else said
    said = said if isinstance(said, dict) else {"config": said}
    metadata = {key: mutate.json_text(draw, value).encode("utf-8", "replace").decode() for key, value in said.items()
                if isinstance(key, str) and key.isprintable()}
    content = in_order(save({name: tensor.clone() for name, tensor in state.items()}, metadata=metadata))
    if draw.random() < 0.4:
        content = other_header(draw, content)
    theirs = mutate.json_bytes(draw, mutate.altered(draw, huggingface.to_hf_config(TINY, torch.float32)))
    return kind, mutate.chewed(draw, content) if draw.random() < 0.2 else content, theirs


def in_order(content: bytes) -> bytes:
    """The file with its header sorted: the library writes metadata in another order each time."""
    size = struct.unpack("<Q", content[:8])[0]
    said = json.dumps(json.loads(content[8:8 + size]), sort_keys=True).encode()
    return struct.pack("<Q", len(said)) + said + content[8 + size:]


def other_header(draw: random.Random, content: bytes) -> bytes:
    """The file with its header altered as JSON: dtypes, shapes, offsets."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + size])
    tensors = [name for name in header if name != "__metadata__"]
    for _ in range(draw.choice((1, 2)) if tensors else 0):
        entry = header[draw.choice(tensors)]
        key = draw.choice(("dtype", "shape", "data_offsets"))
        entry[key] = draw.choice(DTYPES) if key == "dtype" else mutate.altered(draw, entry[key])
    if draw.random() < 0.3:
        header = mutate.altered(draw, header)
    said = mutate.json_text(draw, header).encode("utf-8", "replace")
    return struct.pack("<Q",
                       draw.choice((len(said), len(said), len(said), 0, 2**63,
                                    len(said) + 1))) + said + content[8 + size:]


def read_safetensors(case: tuple[str, bytes, bytes], folder: pathlib.Path) -> None:
    kind, content, theirs = case
    path = folder / f"{kind}.safetensors"
    path.write_bytes(content)
    if kind == "lora":
        return use_weights(path, path)
    use_weights(path, None)
    (folder / "config.json").write_bytes(theirs)
    use_weights(folder, None)
    return None


def use_weights(path: pathlib.Path, adapters: pathlib.Path | None) -> None:
    """As chat, export and --from_weight read them."""
    if adapters is not None:
        vocabulary.recorded(adapters)
        lora.load_adapters(adapters, TINY)
        export.load(weight_files.InMemory(pathlib.Path("base"), states()["dense"],
                                          {"config": json.dumps(TINY.to_dict())}), lora=adapters)
        return
    config = weight_files.read_config(path)
    vocabulary.recorded(path)
    weight_files.embedding_rows(path)
    state = weight_files.load_weights(path, TINY if config is None else config)
    assert all(tensor.is_floating_point() and torch.isfinite(tensor).all() for tensor in state.values())
    export.load(path, shape=TINY)


class Odd:
    """What a pickle may hold besides tensors; harmless."""


def draw_pth(draw: random.Random) -> tuple[str, bytes]:
    kind = draw.choice(("dense", "moe", "lora"))
    state: object = named(draw, states()[kind], kind)
    choices = [state, {"model": state, "epoch": 3}, {"model": None}, collections.OrderedDict(state), [state], (1, 2),
               "text", None, {}, {1: torch.ones(2)},
               {"a": Odd()}, {"a": {"b": state}}, {"a": torch.ones(2, device="meta")},
               {"a": torch.eye(3).to_sparse()}, {"a": torch.eye(3).to_sparse_csr()},
               {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)},
               {"a": torch.ones(1).expand(1 << 33)},
               {**state, "x": torch.nn.Parameter(torch.ones(2))}, {"model": {"a": 5}}, mutate.value(draw)]
    found = state if draw.random() < 0.5 else draw.choice(choices)
    out = io.BytesIO()
    torch.save(found, out, _use_new_zipfile_serialization=draw.random() < 0.8, pickle_protocol=draw.choice((2, 2, 4)))
    content = out.getvalue()
    if draw.random() < 0.3:
        content = other_zip(draw, content)
    elif draw.random() < 0.4:
        content = mutate.chewed(draw, content)
    return kind, content


def other_zip(draw: random.Random, content: bytes) -> bytes:
    """The archive with one of its files altered, its checksums right; or packed."""
    try:
        there = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile:
        return mutate.chewed(draw, content)
    names, out = there.namelist(), io.BytesIO()
    chosen = draw.choice(names)
    with zipfile.ZipFile(out, "w",
                         draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name in names:
            data = there.read(name)
            if name == chosen:
                data = mutate.chewed(draw, data) if draw.random() < 0.9 else b"\0" * 3_000_000
            if name != chosen or draw.random() < 0.95:
                archive.writestr(name, data)
    return out.getvalue()


def read_pth(case: tuple[str, bytes], folder: pathlib.Path) -> None:
    kind, content = case
    path = folder / f"{kind}.pth"
    path.write_bytes(content)
    if kind == "lora":
        return use_weights(path, path)
    weight_files.read_config(path)
    weight_files.embedding_rows(path)
    config = TINY_MOE if kind == "moe" else TINY
    state = weight_files.load_weights(path, config)
    assert all(tensor.is_floating_point() and torch.isfinite(tensor).all() for tensor in state.values())
    export.load(path, shape=config)


TARGETS = [
    Target("safetensors", draw_safetensors, read_safetensors, 1, (states, said_of)),
    Target("pth", draw_pth, read_pth, 0.7, (states,)),
]
