"""Weights out of a run: a folder that transformers and vLLM load, or the .pth that the original MiniMind loads.

    python launch/export.py --weight out/sft --to hf --out out/sft-hf
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS, ModelConfig
from minimind_ds.config.precision import DTYPES
from minimind_ds.config.program_flags import SAMPLING
from minimind_ds.config.untrusted import shown, shown_path
from minimind_ds.convert import huggingface, minimind, weight_files
from minimind_ds.convert.vocabulary import KEY, Vocabulary, recorded
from minimind_ds.convert.weight_files import InMemory, Source
from minimind_ds.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from minimind_ds.io import write_file
from minimind_ds.model import lora as adapters

# What makes a folder that of a run, which an export must not take the place of.
OF_RUNS = ("checkpoints", "metrics.jsonl", "run.yaml")
KEPT_BY_RUNS = ("checkpoints", "best", "tokenizer")
# All that the exported folders of any release hold.
OF_EXPORTS = {"config.json", "generation_config.json", "model.safetensors", "adapter_config.json",
              "adapter_model.safetensors", *TOKENIZER_FILES}


def load(weight: Source, preset: str | None = None, lora: Source | None = None, *,
         shape: ModelConfig | None = None) -> tuple[dict[str, Tensor], ModelConfig]:
    """Weights under our names and their configuration.

    Args:
        weight: as weight_files.load_weights takes it.
        preset: the model's shape, for files that do not carry their own (.pth); its vocabulary may differ.
        lora: adapters to merge into the weights, as lora.load_adapters takes them.
        shape: instead of a preset.

    Raises:
        ValueError: what weight_files.load_weights or lora.load_adapters refuses; adapters of another base; an unknown
            preset, or none where one is needed.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    config = weight_files.read_config(weight)
    state = weight_files.read_state(weight)
    if not (carried := config is not None):
        config = PRESETS[preset] if preset else shape
        if config is None:
            raise UserError(f"{weight} does not carry its model's configuration: name a preset"
                            f"{weight_files.like_presets(state)}")
        embedding = state.get("model.embed_tokens.weight")
        if embedding is not None and embedding.dim() == 2:
            config = dataclasses.replace(config, vocab_size=embedding.shape[0])
    state = weight_files.fitted(state, config, weight, carried=carried)
    if lora is None:
        return state, config
    matrices, facts, _ = adapters.load_adapters(lora, config)
    try:
        return adapters.merge(state, facts, matrices), config
    except UserError as error:
        raise UserError(f"{lora} beside {weight}: {error}") from None


def find_tokenizer(weight: Source) -> str | None:
    """Where the tokenizer of these weights lies: the run folder's copy, or the Hugging Face folder itself."""
    if isinstance(weight, InMemory):
        return str(weight.tokenizer) if weight.tokenizer else None
    folder = Path(weight) if Path(weight).is_dir() else Path(weight).parent
    if (folder / "tokenizer").is_dir():
        return str(folder / "tokenizer")
    return str(folder) if (folder / "tokenizer.json").is_file() else None


def tokenizer_of(weight: Source, named: str | None = None, lora: Source | None = None) -> Tokenizer:
    """The tokenizer that speaks with these weights: the one named, the adapters' own, or the weights' own.

    Raises:
        ValueError: none beside them, or another than they were trained with.
    """
    own = recorded(lora) if lora else None
    path = named or (find_tokenizer(lora) if own else None) or find_tokenizer(weight)
    if path is None:
        raise UserError(f"{weight}: no tokenizer beside the weights: name one with --tokenizer (a run's "
                        "is RUN/tokenizer, MiniMind's its folder model)")
    tokenizer, own = load_tokenizer(path), own or recorded(weight)
    if own and (why := own.difference(tokenizer)):
        raise UserError(f"{weight}: these are weights of another tokenizer than {tokenizer.name}: {why}")
    return tokenizer


def token_ids(tokenizer: Tokenizer) -> dict:
    """What config.json and generation_config.json say of special tokens: several end a text where the tokenizer's eos
    is not the <|im_end|> that conversations end with."""
    stops = tokenizer.stop_ids
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else stops[0],
            "pad_token_id": tokenizer.pad_id}


def generation(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """What transformers' GenerationConfig has to know of the tokenizer; ids beyond it are never drawn."""
    beyond = list(range(tokenizer.vocab_size, vocab_size))
    return token_ids(tokenizer) | ({"suppress_tokens": beyond} if beyond else {})


def write_companions(folder: Path, config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype):
    """All of a Hugging Face folder but the weights.

    Raises:
        ValueError: a model without a counterpart in transformers.
    """
    write_json(folder / "config.json", huggingface.to_hf_config(config, dtype) | token_ids(tokenizer))
    write_json(folder / "generation_config.json",
               {"do_sample": True, **SAMPLING, **generation(tokenizer, config.vocab_size)})
    tokenizer.save_hf(folder)


def export_hf(state: dict[str, Tensor], config: ModelConfig, tokenizer: Tokenizer, out: str | Path, *,
              dtype: torch.dtype, overwrite: bool = False):
    """A Hugging Face folder: config.json, generation_config.json, model.safetensors, tokenizer and chat template.

    The folder appears whole or not at all.

    Raises:
        ValueError: a folder that is there already, a tokenizer larger than the vocabulary, or a model without a
            counterpart in transformers.
    """
    out = Path(out)
    # What cannot work is found before anything is written.
    huggingface.to_hf_config(config, dtype)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    named = minimind.to_minimind(state, config)
    if config.tie_word_embeddings:
        del named["lm_head.weight"]
    named = {name: tensor.to(dtype).contiguous() for name, tensor in named.items()}
    with new_folder(out, overwrite) as temporary:
        write_companions(temporary, config, tokenizer, dtype)
        save_file(named, temporary / "model.safetensors",
                  metadata={"format": "pt", KEY: Vocabulary.of(tokenizer).to_json()})


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` when all is written; who may read it, the umask says."""
    check_free(out, overwrite)
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        # mkdtemp's own folder, and safetensors' files, are their owner's alone.
        folder = aside / out.name
        folder.mkdir()
        yield folder
        for file in folder.iterdir():
            file.chmod(folder.stat().st_mode & 0o666)
        if out.exists():
            # Behind a link is another's folder; without one, check_free has seen what it holds.
            out.unlink() if out.is_symlink() else shutil.rmtree(out)
        os.replace(folder, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_peft(lora: Source, out: str | Path, *, base: str, tokenizer: Tokenizer | None, dtype: torch.dtype | None,
                overwrite: bool = False):
    """A folder that Hugging Face's PEFT loads beside the exported base: adapter_config.json and
    adapter_model.safetensors, with the tokenizer where there is one.

    Args:
        base: what adapter_config.json names as the base's folder; "" leaves it to be named where it is loaded.
        dtype: None keeps the adapters' own.

    Raises:
        ValueError: what lora.load_adapters or lora.to_peft refuses, or a folder that is there already.
    """
    matrices, facts, config = adapters.load_adapters(lora)
    named, settings = adapters.to_peft(matrices, facts)
    huggingface.to_hf_config(config, torch.float32)
    with new_folder(Path(out), overwrite) as folder:
        write_json(folder / "adapter_config.json", {**settings, "base_model_name_or_path": base or None})
        save_file({name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in named.items()},
                  folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_hf(folder)


def export_minimind(state: dict[str, Tensor], config: ModelConfig, out: str | Path, *, dtype: torch.dtype,
                    overwrite: bool = False):
    """A .pth that the original MiniMind loads with strict=True: its names, its shapes, a state dict and no more.

    Without qk_norm the keys are those of MiniMind2's time, which today's original no longer takes.

    Raises:
        ValueError: a file that is there already.
    """
    named = {name: tensor.to(dtype).contiguous().clone()
             for name, tensor in minimind.to_minimind(state, config).items()}
    if config.tie_word_embeddings:
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    write_pth(Path(out), named, overwrite)


def export_minimind_lora(lora: Source, out: str | Path, *, dtype: torch.dtype, overwrite: bool = False):
    """A .pth that the original's load_lora takes after its apply_lora(model): see lora.to_minimind.

    Raises:
        ValueError: what lora.load_adapters or lora.to_minimind refuses, or a file that is there already.
    """
    named = adapters.to_minimind(*adapters.load_adapters(lora))
    write_pth(Path(out), {name: tensor.to(dtype) for name, tensor in named.items()}, overwrite)


def write_pth(out: Path, named: dict[str, Tensor], overwrite: bool):
    check_free(out, overwrite, (".pth", ".pt", ".bin"))
    content = io.BytesIO()
    torch.save(named, content)
    write_file(out, content.getbuffer())


def check_free(out: Path, overwrite: bool, endings: tuple[str, ...] = ()):
    """Raises ValueError unless `out` may be written: nothing but an earlier export is ever replaced.

    endings: of the file that is written; none: it is a folder.
    """
    name = shown_path(out)
    check_no_run(out, name)
    if not out.exists():
        pass
    elif endings:
        if not out.is_file() or out.suffix not in endings:
            raise UserError(f"{name} exists and is no {' or '.join(endings)} file: name another --out")
    elif not out.is_dir():
        raise UserError(f"{name} is a file, and a folder is written: name another --out")
    elif others := sorted({entry.name for entry in out.iterdir()} - OF_EXPORTS):
        raise UserError(f"{name} holds what no export writes, {shown(others[0])}: it is not replaced; name another "
                        "--out")
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{name} exists already (replace it with --overwrite)")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: {out.parent} is not writable")


def check_no_run(out: Path, name: str):
    """Raises ValueError for a run's folder, and for what a run keeps in it."""
    place = out.resolve()
    if place.is_dir() and any((place / of_run).exists() for of_run in OF_RUNS):
        raise UserError(f"{name} is a run folder, with its checkpoints and metrics: export into another")
    for folder in place.parents:
        inside = place.relative_to(folder).parts[0]
        if any((folder / of_run).exists() for of_run in OF_RUNS) and inside in KEPT_BY_RUNS:
            raise UserError(f"{name} is a run's own, of {shown_path(folder)}: export into another")


def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run(weight: Source | None, to: str, out: str, *, dtype: str | None, preset: str | None, tokenizer: str | None,
        overwrite: bool, lora: Source | None = None):
    """What launch/export.py does.  Raises ValueError: a user's mistake."""
    if to == "minimind_lora":
        if lora is None:
            raise UserError("--to minimind_lora writes adapters: name them with --lora")
        export_minimind_lora(lora, out, dtype=DTYPES[dtype or "fp16"], overwrite=overwrite)
        return
    if to == "peft":
        if lora is None:
            raise UserError("--to peft writes adapters: name them with --lora, and their exported base with --weight, "
                            "if PEFT is to find it by itself")
        if weight is not None and (isinstance(weight, InMemory) or not (Path(weight) / "config.json").is_file()):
            raise UserError(f"--weight {weight}: with --to peft it is the folder that PEFT loads the base from: "
                            "export the base with --to hf, or leave it out")
        own = load_tokenizer(path) if (path := tokenizer or find_tokenizer(lora)) else None
        export_peft(lora, out, base=str(weight or ""), tokenizer=own, dtype=DTYPES.get(dtype), overwrite=overwrite)
        return
    if weight is None:
        raise UserError(f"--to {to} writes a whole model: name its weights with --weight")
    state, config = load(weight, preset, lora)
    if to == "minimind":
        export_minimind(state, config, out, dtype=DTYPES[dtype or "fp16"], overwrite=overwrite)
        return
    own = tokenizer_of(weight, tokenizer, lora)
    # Weights keep the precision they were trained in, unless told otherwise.
    kept = state["model.embed_tokens.weight"].dtype
    export_hf(state, config, own, out, dtype=DTYPES[dtype] if dtype else kept, overwrite=overwrite)
