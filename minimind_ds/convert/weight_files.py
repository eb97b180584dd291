"""Files of weights, found, read and written: safetensors, MiniMind's .pth, Hugging Face folders.

Nothing is loaded that could run code: safetensors, or torch.load(weights_only=True).

    python -m pytest tests/convert/test_weights.py
"""

from __future__ import annotations

import glob
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.model import ModelConfig
from minimind_ds.convert import huggingface, minimind
from minimind_ds.io import write_file

# Fields that may differ between the configuration of a file and the one it is loaded into: they change no weight and
# no logit on texts that both can read.
FREE_FIELDS = {"dropout", "router_aux_loss_coef", "max_position_embeddings", "bos_token_id", "eos_token_id",
               "inference_rope_scaling", "rope_scaling"}
MOE_FIELDS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}


@dataclass(frozen=True)
class InMemory:
    """Weights that were put together from something else, a checkpoint; every function here takes them for a path.

    path: what they are called.  state: under our names, on the CPU.  metadata: what a .safetensors file of ours would
    say of them.  tokenizer: the folder of theirs, None where there is none.
    """

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, str]
    tokenizer: Path | None = None
    suffix: ClassVar[str] = ".safetensors"

    def __str__(self) -> str:
        return str(self.path)


# Where weights are.
Source = str | Path | InMemory


def file_name(save_weight: str, config: ModelConfig) -> str:
    """The name of a run's final weights, as MiniMind names its own."""
    return f"{save_weight}_{config.hidden_size}{'_moe' if config.use_moe else ''}.safetensors"


def find_bare(flag: str, names: Sequence[str], folders: Sequence[str | Path], config: ModelConfig) -> Path:
    """The weights that MiniMind means by a name: full_sft is full_sft_768.pth, full_sft_768_moe.pth for experts; ours
    end in .safetensors, and come first.

    Args:
        flag: where the name was given, for the message.
        names: what was given, then what it may stand for.
        folders: looked through in this order.
        config: of the model; its sizes are part of the files' names.

    Raises:
        ValueError: none of them holds such weights; the line names those of other sizes.
    """
    folders = list(dict.fromkeys(map(Path, folders)))
    wanted = [Path(file_name(name, config)).with_suffix(end) for name in names for end in (".safetensors", ".pth")]
    for path in (folder / file for folder in folders for file in wanted):
        if path.is_file():
            return path
    others = [path for folder in folders for path in sorted(folder.glob(f"{glob.escape(names[0])}_*"))
              if path.suffix in (".safetensors", ".pth")]
    also = (f"; there is {', '.join(map(str, others))}: name its size (--preset, or --hidden_size and its like), or "
            "the path") if others else "; name a path"
    raise UserError(f"{flag} {names[0]}: no such file or folder, and no {' or '.join(map(str, wanted))} in "
                    f"{' or '.join(map(str, folders))}{also}")


def save_safetensors(path: str | Path, state: dict[str, Tensor], config: ModelConfig, tokenizer: str | None = None):
    """Writes weights (our names) with their configuration: wholly or not at all, even through a power cut.

    Args:
        tokenizer: what is kept of the tokenizer they were trained with, as vocabulary.Vocabulary.to_json gives it.

    Raises:
        ValueError: weights that do not fit the configuration.
    """
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in minimind.check(state, config,
                                                                                         str(path)).items()}
    metadata = {"config": json.dumps(config.to_dict()), "format": "pt"}
    metadata |= {"tokenizer": tokenizer} if tokenizer else {}
    write_file(Path(path), save(state, metadata=metadata))


def find(path: Source) -> list[Path | InMemory]:
    """The weight files that a path means: a file itself, a run folder's one .safetensors, a Hugging Face folder's.

    Raises:
        ValueError: nothing there, no regular files, or several weights to choose from.
    """
    if isinstance(path, InMemory):
        return [path]
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        # The library waits for ever at a pipe that nobody writes to.
        untrusted.open_file(file, sys.maxsize).close()
    if (path / "config.json").is_file():
        if not files:
            raise UserError(f"{path}: a Hugging Face folder without .safetensors files (pickled ones are not read)")
        return files
    if not files:
        under_way = path / "checkpoints"
        best = f", {path / 'best'} its best weights so far" * (path / "best.json").is_file()
        also = f"; its run goes on, or has stopped: {under_way} names its newest checkpoint{best}" * under_way.is_dir()
        raise UserError(f"{path}: holds no .safetensors file{also}")
    if len(files) > 1:
        raise UserError(f"{path}: holds several weights ({', '.join(f.name for f in files)}); name one of them")
    return files


def read_config(path: Source) -> ModelConfig | None:
    """The configuration that weights carry with them, or None (a .pth, or a .safetensors of another origin).

    Raises:
        ValueError: nothing there, or a configuration that is not a MiniMind's.
    """
    first = find(path)[0]
    if first.suffix != ".safetensors":
        return None
    metadata = read_metadata(first)
    if "lora" in metadata:
        raise UserError(f"{path}: holds LoRA adapters, not a whole model: name the weights they were trained on, and "
                         f"these with --lora (chat, score, export)")
    stored = metadata.get("config")
    try:
        if stored is not None:
            return ModelConfig.from_dict(untrusted.json_object(stored, "its metadata"))
        if not isinstance(first, InMemory) and (folder_config := first.parent / "config.json").is_file():
            return huggingface.from_hf_config(untrusted.read_json(folder_config))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: its configuration is not a MiniMind's: {error}") from None
    return None


def read_metadata(path: Path | InMemory) -> dict[str, str]:
    if isinstance(path, InMemory):
        return path.metadata
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {first_line(error)}") from None


def embedding_rows(path: Source) -> int | None:
    """How many ids the model in these files has rows for; None where there is no embedding.

    Raises:
        ValueError: no such file, or an unreadable one.
    """
    name = "model.embed_tokens.weight"
    for file in find(path):
        if isinstance(file, InMemory):
            shape = getattr(file.state.get(name), "shape", ())
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    shape = opened.get_slice(name).get_shape() if name in opened.keys() else ()
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file: {first_line(error)}") from None
        else:
            shape = getattr(read_pth(file, only_shapes=True).get(name), "shape", ())
        if len(shape):
            return int(shape[0])
    return None


def load_weights(path: Source, config: ModelConfig) -> dict[str, Tensor]:
    """Weights under our names, on the CPU, in the dtype of the file.

    Args:
        path: a run folder or its .safetensors file, the original MiniMind's .pth, a Hugging Face folder, or InMemory.

    Raises:
        ValueError: one line: no such file, unreadable, not plain tensors, or weights of another model.
    """
    theirs = read_config(path)
    if theirs is not None:
        check_same_model(path, theirs, config)
    return fitted(read_state(path), config, path, carried=theirs is not None)


def fitted(state: dict[str, Tensor], config: ModelConfig, path: Source, *, carried: bool) -> dict[str, Tensor]:
    """The weights under our names, as minimind.from_minimind has them.

    carried: whether the file says of which model it is; where not, an error says which preset's it may be.
    """
    try:
        return minimind.from_minimind(state, config, str(path))
    except UserError as error:
        raise UserError(f"{error}{'' if carried else like_presets(state)}") from None


def like_presets(state: dict[str, Tensor]) -> str:
    """'; its shapes are those of --preset debug', for a message, or nothing."""
    names = minimind.presets_of(state)
    return f"; its shapes are those of --preset {' or '.join(names)}" if names else ""


def read_state(path: Source) -> dict[str, Tensor]:
    """Weights under the names of their files.  Raises ValueError on what cannot be read."""
    state = {}
    for file in find(path):
        more = read_safetensors(file) if file.suffix == ".safetensors" else read_pth(file)
        if twice := state.keys() & more:
            raise UserError(f"{path}: {untrusted.shown(min(twice))} is in {file.name} and in another file beside it; "
                            "leave the files of one save there")
        state |= more
    for name, tensor in state.items():
        check_tensor(tensor, f"{path}: {untrusted.shown(name)}")
    return state


def check_tensor(tensor: Tensor, what: str) -> None:
    """Raises ValueError for what is no weight: not floating-point, sparse, without values, not finite."""
    if (tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu"
            or tensor.nbytes > tensor.untyped_storage().nbytes()):
        raise UserError(f"{what} is no plain tensor ({str(tensor.layout).removeprefix('torch.')}, on "
                        f"{tensor.device.type})")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise UserError(f"{what} holds {str(tensor.dtype).removeprefix('torch.')}; weights are float32, float16 or "
                        "bfloat16")
    # One pass without a copy: a NaN is both.
    if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise UserError(f"{what} is not finite: these weights are broken, training from them cannot help")


def check_same_model(path: Source, theirs: ModelConfig, ours: ModelConfig):
    """Raises ValueError naming the first field of the file's configuration that makes it another model's."""
    fields = [name for name in ours.to_dict() if name not in FREE_FIELDS]
    for name in fields if ours.use_moe else [name for name in fields if name not in MOE_FIELDS]:
        if getattr(theirs, name) != getattr(ours, name):
            raise UserError(f"{path}: {name} is {getattr(theirs, name)} there and {getattr(ours, name)} here")


def read_safetensors(path: Path | InMemory) -> dict[str, Tensor]:
    if isinstance(path, InMemory):
        return dict(path.state)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {first_line(error)}") from None


def read_pth(path: Path, only_shapes: bool = False) -> dict[str, Tensor]:
    """A state dict, or the "model" of one of MiniMind's resume files.

    only_shapes: the values are left on the disk, where the file's format lets them.
    """
    check_zip(path)
    try:
        with warnings.catch_warnings():
            # torch remarks on a pickle's protocol; whether the file is read is what counts.
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True,
                               mmap=only_shapes and zipfile.is_zipfile(path))
    except (RuntimeError, OSError, EOFError, KeyError) as error:
        raise UserError(f"{path}: not a readable .pth file: {first_line(error)}") from None
    # Bytes of others raise anything, struct.error for one.
    except Exception:
        raise UserError(f"{path}: refused: it is not a plain file of tensors (torch.load with weights_only=True "
                         f"does not read it)") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not (isinstance(state, dict) and state and all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items())):
        raise UserError(f"{path}: holds no state dict")
    return state


def check_zip(path: Path) -> None:
    """Raises ValueError for a file that unpacks to much more than it is: torch's own are not compressed."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except Exception as error:
        raise UserError(f"{path}: not a readable .pth file: {first_line(error)}") from None
    if unpacked > 2 * os.path.getsize(path) + (1 << 20):
        raise UserError(f"{path}: refused: {os.path.getsize(path):,} bytes that unpack to {unpacked:,}")
