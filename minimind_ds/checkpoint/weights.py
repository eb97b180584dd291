"""A checkpoint as weights: what speaks, is exported or begins another run, while the run goes on or after it.

Written at any ZeRO stage, on any number of ranks, with experts over ranks, of all weights or LoRA: the fp32 masters
are put together on one process, the files verified first.

    python launch/chat.py --weight out/sft/checkpoints                        # the newest
    python launch/export.py --weight out/sft/checkpoints/step_00000100 --to hf --out hf_folder
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from minimind_ds.checkpoint import reading
from minimind_ds.checkpoint.folder import STEP, TOKENIZER, listed, verify
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig
from minimind_ds.convert.minimind import expected_shapes
from minimind_ds.convert.vocabulary import KEY, Vocabulary
from minimind_ds.convert.weight_files import InMemory, Source, check_tensor
from minimind_ds.data.tokenizer import load_tokenizer
from minimind_ds.distributed import deepspeed_compat
from minimind_ds.model import lora


def is_checkpoint(path: Path) -> bool:
    """Whether a path names a checkpoint, or the folder of a run's checkpoints, there or not."""
    return bool((path / "manifest.sha256").is_file() or path.name == "checkpoints" or listed(path)
                or STEP.fullmatch(path.name) and path.parent.name == "checkpoints")


def find(path: Path) -> Path:
    """The checkpoint that is_checkpoint's path means: itself, or the newest in it.

    Raises:
        ValueError: it is not there, or there is none.
    """
    if path.is_dir() and (STEP.fullmatch(path.name) or (path / "manifest.sha256").is_file()):
        return path
    home = path.parent if STEP.fullmatch(path.name) else path
    there = listed(home)
    if home is path and there:
        return there[0]
    names = ", ".join(one.name for one in there)
    raise UserError(f"{path}: no such checkpoint; {f'in {home} there is {names}' if there else f'{home} holds none'}")


def opened(source: Source | None) -> Source | None:
    """A checkpoint's weights in memory; any other source, or none, as it is.

    Raises:
        ValueError: a checkpoint that is not there any more, damaged, or without what makes it a model.
    """
    if source is None or isinstance(source, InMemory) or not is_checkpoint(path := Path(source)):
        return source
    while True:
        found = find(path)
        try:
            return read(found)
        except (UserError, OSError) as error:
            if found.is_dir():
                raise UserError(str(error)) from None
            # Deleted meanwhile: its run has a newer one.
            if found == path:
                raise UserError(f"{found} was deleted while it was read: its run goes on, and keeps only the newest "
                                f"(--keep); {found.parent} names the newest") from None


def read(path: Path) -> InMemory:
    """Raises ValueError as opened; OSError where a file cannot be read."""
    manifest, wrong = verify(path)
    if manifest is None:
        raise UserError(wrong)
    with reading.as_written(path):
        facts = manifest["identity"]
        config = ModelConfig.from_dict({name.removeprefix("model."): value for name, value in facts.items()
                                        if name.startswith("model.")})
        adapters = facts.get("LoRA") and lora.read_facts(json.dumps(facts_of_lora(path, manifest)))
        shapes = lora.shapes(config, adapters) if adapters else expected_shapes(config)
        deepspeed_compat.choose_accelerator(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        reading.check_layout(path, manifest["layout"])
        state = reading.read_weights(path, manifest["layout"], shapes={n: torch.Size(s) for n, s in shapes.items()})
        tokenizer, named = find_tokenizer(path, facts["tokenizer"])
        for name, tensor in state.items():
            check_tensor(tensor, f"{path}: {name}")
    metadata = {"config": json.dumps(config.to_dict()), **({KEY: named} if named else {}),
                **({"lora": json.dumps(adapters.facts())} if adapters else {})}
    return InMemory(path, {name: tensor.float() for name, tensor in state.items()}, metadata, tokenizer)


def facts_of_lora(path: Path, manifest: dict) -> dict:
    if "lora" not in manifest:
        raise UserError(f"{path}: an earlier release wrote it, which did not say enough of its adapters; the run's "
                        "next checkpoint does")
    return manifest["lora"]


def find_tokenizer(path: Path, fingerprint: str) -> tuple[Path | None, str | None]:
    """The tokenizer that a checkpoint was trained with, and what safetensors say of it; None where it is not there.

    The run folder's comes first: that one stays when the checkpoint goes.
    """
    for folder in (path.parent.parent / TOKENIZER, path / TOKENIZER):
        if folder.is_dir() and (tokenizer := load_tokenizer(folder)).fingerprint == fingerprint:
            return folder, Vocabulary.of(tokenizer).to_json()
    return None, None
