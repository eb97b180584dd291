"""LoRA (arXiv:2106.09685): small trained matrices beside frozen projections, W x + alpha / rank * B (A x).

Names, start (A normal with deviation 0.02, B zero) and the choice of modules are MiniMind's: the square projections
of the layers, q_proj and o_proj in MiniMind-3, with a factor of 1 (alpha = rank).  Experts are stacked in one
parameter a layer and get no adapters: of a mixture of experts the attention is adapted, and the router if asked for.
A run writes its adapters only; a base's weights plus these make a model again (`merge`).

    deepspeed launch/sft.py --deepspeed ds_configs/zero2.json --from_weight out/sft --lora_rank 8 --save_dir out/lora
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from minimind_ds.config import untrusted
from minimind_ds.config.errors import UserError, first_line
from minimind_ds.config.model import LARGEST_SIZE, ModelConfig
from minimind_ds.convert import minimind, weight_files
from minimind_ds.io import write_file

from .decoder import Linear, MiniMindForCausalLM

# The rank of every adapter that the original's own programs make room for.
MINIMIND_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What adapters are: their rank, their factor alpha / rank and the modules they stand beside.

    targets: last names of the adapted modules ("q_proj"), in the model's order; every layer's are adapted.
    dropout: on the adapters' input, in training only.
    base: fingerprint of the weights they were trained on; None where it is not known (MiniMind's files).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    base: str | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def describe(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}, on {', '.join(self.targets)}"

    def identity(self) -> str:
        """All of it in one line, for a checkpoint to compare."""
        return f"{self.describe()}, dropout {self.dropout:g}, base {(self.base or '')[:16]}"

    def facts(self) -> dict:
        """All of it, for read_facts to read back from JSON."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, "dropout": self.dropout,
                "base": self.base}


class Adapter(nn.Module):
    """x -> alpha / rank * B(A(x)).  A and B own their weights, so that ZeRO-3 gathers them where they are used."""

    def __init__(self, lora: Lora, A_RC: Tensor, B_DR: Tensor):
        super().__init__()
        self.scale, self.dropout = lora.scale, lora.dropout
        for name, matrix in (("A", A_RC), ("B", B_DR)):
            linear = Linear(matrix.shape[1], matrix.shape[0], device="meta")
            linear.weight = nn.Parameter(matrix)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(F.dropout(x, self.dropout, self.training))) * self.scale


class AdaptedLinear(Linear):
    """A frozen Linear with an adapter beside it, under the original's names: weight, lora.A.weight, lora.B.weight."""

    def __init__(self, base: Linear, adapter: Adapter):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.lora = base.weight, adapter

    def forward(self, x: Tensor, hand_on: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if not hand_on:
            return super().forward(x) + self.lora(x)
        y, x = super().forward(x, hand_on=True)
        return y + self.lora(x), x


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of every Linear in the layers; the experts' stacked weights are excluded."""
    return {name.removesuffix(".weight"): shape for name, shape in minimind.expected_shapes(config).items()
            if name.startswith("model.layers.") and len(shape) == 2}


def find_targets(config: ModelConfig, asked: str | None) -> tuple[str, ...]:
    """The last names of the modules to adapt, in the model's order.

    Args:
        asked: a comma list, or None for the original's choice: the modules whose weight is square.

    Raises:
        ValueError: a name that is no module of the layers, or of experts; a model without a square module.
    """
    last = {name.rpartition(".")[2]: shape for name, shape in linear_shapes(config).items()}
    if asked is None:
        square = tuple(name for name, (out, into) in last.items() if out == into)
        if not square:
            raise UserError(f"no projection of this model is square, as MiniMind's LoRA wants: name some of "
                             f"{', '.join(last)} with --lora_targets")
        return square
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names or [asked]:
        if config.use_moe and name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "experts"):
            raise UserError(f"--lora_targets {name}: experts are stacked in one parameter a layer and get no "
                             f"adapters; choose from {', '.join(last)}")
        if name not in last:
            raise UserError(f"--lora_targets {name!r}: no such projection in the layers; choose from "
                             f"{', '.join(last)}")
    return tuple(name for name in last if name in names)


def shapes(config: ModelConfig, lora: Lora) -> dict[str, tuple[int, int]]:
    """Name -> shape of every adapter's A (rank, in) and B (out, rank), in the model's order."""
    found = {}
    for name, (out, into) in linear_shapes(config).items():
        if name.rpartition(".")[2] in lora.targets:
            found |= {f"{name}.lora.A.weight": (lora.rank, into), f"{name}.lora.B.weight": (out, lora.rank)}
    return found


def fresh(config: ModelConfig, lora: Lora, *, seed: int) -> dict[str, Tensor]:
    """Adapters that change nothing yet: A normal with deviation 0.02, B zero; fixed by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.empty(shape).normal_(0.0, 0.02, generator=generator) if name.endswith(".A.weight")
            else torch.zeros(shape) for name, shape in shapes(config, lora).items()}


def attach(model: MiniMindForCausalLM, lora: Lora, state: dict[str, Tensor]) -> None:
    """Freezes a model and puts adapters with these weights (`fresh`, `load`) beside its targets; only they train."""
    model.requires_grad_(False)
    for name in [name.removesuffix(".lora.A.weight") for name in state if name.endswith(".lora.A.weight")]:
        parent, _, last = name.rpartition(".")
        base = model.get_submodule(name)
        A_RC, B_DR = (state[f"{name}.lora.{part}.weight"].detach().clone().to(base.weight) for part in "AB")
        setattr(model.get_submodule(parent), last, AdaptedLinear(base, Adapter(lora, A_RC, B_DR)))


def fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 of a model's weights: names and values, whatever file and dtype hold them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {tuple(state[name].shape)}\n".encode())
        digest.update(state[name].detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def check_base(state: dict[str, Tensor], lora: Lora) -> None:
    """Raises ValueError for adapters that were trained on other weights than these."""
    if lora.base is not None and lora.base != fingerprint(state):
        raise UserError("the adapters were trained on other weights than these: name the base that the run had as "
                         "--from_weight, in its own precision")


def merge(state: dict[str, Tensor], lora: Lora, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A base's weights with adapters added: W + alpha / rank * B A, in fp32 (fp64 where W is); the rest as it was.

    Raises:
        ValueError: adapters that were trained on other weights than these.
    """
    check_base(state, lora)
    merged = dict(state)
    for name in adapters:
        if name.endswith(".lora.A.weight"):
            module = name.removesuffix(".lora.A.weight")
            base = state[f"{module}.weight"]
            wide = torch.promote_types(base.dtype, torch.float32)
            B_DR, A_RC = adapters[f"{module}.lora.B.weight"].to(wide), adapters[name].to(wide)
            merged[f"{module}.weight"] = base.to(wide) + lora.scale * (B_DR @ A_RC)
    return merged


def save_adapters(path: str | Path, adapters: dict[str, Tensor], lora: Lora, config: ModelConfig,
                  tokenizer: str | None = None):
    """Writes adapters with what they are, the model's configuration and its tokenizer's (as
    weight_files.save_safetensors), wholly or not at all.

    Raises:
        ValueError: adapters that do not fit.
    """
    adapters = {name: tensor.detach().contiguous().cpu()
                for name, tensor in minimind.fit(adapters, shapes(config, lora), str(path)).items()}
    metadata = {"lora": json.dumps(lora.facts()), "config": json.dumps(config.to_dict()), "format": "pt"}
    metadata |= {"tokenizer": tokenizer} if tokenizer else {}
    write_file(Path(path), save(adapters, metadata=metadata))


def load_adapters(path: weight_files.Source,
                  config: ModelConfig | None = None) -> tuple[dict[str, Tensor], Lora, ModelConfig]:
    """Adapters from a LoRA run's folder, its .safetensors file, its checkpoint in memory or MiniMind's LoRA .pth.

    Args:
        config: the base model's; None takes the file's own word for it.

    Returns:
        the adapters by name, what they are, and the model they belong to.

    Raises:
        ValueError: one line: nothing there, no adapters, adapters of another model, ranks that differ, a .pth (which
            carries no configuration) without a config.
    """
    file = weight_files.find(path)[0]
    if file.suffix != ".safetensors":
        if config is None:
            raise UserError(f"{path}: a .pth does not say of which model its adapters are")
        adapters, lora = from_minimind(weight_files.read_pth(file), str(path))
    else:
        metadata = weight_files.read_metadata(file)
        if "lora" not in metadata:
            raise UserError(f"{path}: holds no LoRA adapters of a run, but a whole model's weights, or PEFT's "
                            "adapters, which are not read")
        try:
            lora, theirs = read_facts(metadata["lora"]), ModelConfig.from_dict(
                untrusted.json_object(metadata["config"], "its configuration"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: what it says of its adapters is damaged: {first_line(error)}") from None
        weight_files.check_same_model(path, theirs, config or theirs)
        adapters, config = weight_files.read_safetensors(file), config or theirs
    return minimind.fit(adapters, shapes(config, lora), str(path)), lora, config


def read_facts(text: str) -> Lora:
    """A file's own description of its adapters.  Raises TypeError or ValueError on anything else."""
    values = untrusted.json_object(text, "its LoRA")
    lora = Lora(**{**values, "targets": tuple(values["targets"])})
    shown = untrusted.shown
    if type(lora.rank) is not int or not 1 <= lora.rank <= LARGEST_SIZE:
        raise UserError(f"rank is {shown(lora.rank)}; it must be a whole number from 1 to {LARGEST_SIZE}")
    if type(lora.alpha) not in (int, float) or not 0 < lora.alpha < 1e12:
        raise UserError(f"alpha is {shown(lora.alpha)}; it must be a number above 0")
    if type(lora.dropout) not in (int, float) or not 0 <= lora.dropout < 1:
        raise UserError(f"dropout is {shown(lora.dropout)}; it must be at least 0 and below 1")
    if not lora.targets or not all(isinstance(target, str) for target in lora.targets):
        raise UserError(f"targets is {shown(values['targets'])}; it must be a list of projections")
    if not isinstance(lora.base, (str, type(None))):
        raise UserError(f"base is {shown(lora.base)}; it must be a text")
    return lora


def from_minimind(state: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], Lora]:
    """MiniMind's LoRA .pth -> adapters and what they are: the names are ours, the factor is 1.

    Raises:
        ValueError: one line: no adapters, ranks that differ, or experts that are adapted.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    other = [name for name in state if not name.endswith((".lora.A.weight", ".lora.B.weight"))]
    if other:
        raise UserError(f"{source}: holds {other[0]:.200}, which is no LoRA adapter"
                         + ("" if len(other) < len(state) else ": it looks like a whole model's weights"))
    ours = {}
    for name, tensor in state.items():
        # An expert's adapter with B = 0 changes nothing: to_minimind writes such.
        if ".experts." not in name:
            ours[name] = tensor
        elif name.endswith(".B.weight") and tensor.any():
            raise UserError(f"{source}: adapts experts ({name:.200}), which minimind_ds keeps frozen; merge it into "
                             f"its base with MiniMind's scripts/convert_model.py")
    ranks = sorted({tensor.shape[0] for name, tensor in ours.items() if name.endswith(".A.weight") and tensor.dim()})
    if len(ranks) != 1:
        raise UserError(f"{source}: its adapters have several ranks ({', '.join(map(str, ranks))})" if ranks else
                         f"{source}: holds no adapter's A")
    targets = dict.fromkeys(name.split(".")[-4] for name in ours if name.count(".") >= 4)
    return ours, Lora(rank=ranks[0], alpha=ranks[0], targets=tuple(targets))


def to_peft(adapters: dict[str, Tensor], lora: Lora) -> tuple[dict[str, Tensor], dict]:
    """Adapters under the names of Hugging Face's PEFT, and adapter_config.json but for the base's name.

    Raises:
        ValueError: adapters of the router, which is no Linear in transformers.
    """
    if "gate" in lora.targets:
        raise UserError("PEFT has no adapters for the router (gate): merge them into their base instead (--to hf)")
    named = {f"base_model.model.{name.replace('.lora.A.', '.lora_A.').replace('.lora.B.', '.lora_B.')}": tensor
             for name, tensor in adapters.items()}
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return named, {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": alpha,
                   "lora_dropout": lora.dropout, "target_modules": list(lora.targets), "bias": "none",
                   "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "use_rslora": False,
                   "use_dora": False, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
                   "rank_pattern": {}, "alpha_pattern": {}}


def to_minimind(adapters: dict[str, Tensor], lora: Lora, config: ModelConfig) -> dict[str, Tensor]:
    """Adapters under the original's names, for its load_lora after apply_lora(model).

    The original adapts every square Linear, always with factor 1 and in its own programs with rank 16: alpha / rank
    goes into B, smaller ranks are filled up with zeros, and square modules that were not adapted get zeros.  A rank
    above 16 needs apply_lora(model, rank=...) there.

    Raises:
        ValueError: adapters on modules that are not square.
    """
    rank = max(lora.rank, MINIMIND_RANK)
    empty = {name: torch.empty(shape, device="meta") for name, shape in minimind.expected_shapes(config).items()}
    square = {name.removesuffix(".weight"): tensor.shape[0] for name, tensor in minimind.split_experts(empty).items()
              if tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] and name != "model.embed_tokens.weight"}
    for name in adapters:
        module = name.rpartition(".lora.")[0]
        if module not in square:
            raise UserError(f"the original MiniMind adapts square projections only, and these adapters stand beside "
                             f"{', '.join(lora.targets)}: merge them into their base instead (--to minimind)")
    named = {}
    for module, size in square.items():
        A_RC, B_DR = torch.zeros(rank, size), torch.zeros(size, rank)
        if f"{module}.lora.A.weight" in adapters:
            A_RC[:lora.rank] = adapters[f"{module}.lora.A.weight"]
            B_DR[:, :lora.rank] = adapters[f"{module}.lora.B.weight"].float() * lora.scale
        named |= {f"{module}.lora.A.weight": A_RC, f"{module}.lora.B.weight": B_DR}
    return named
