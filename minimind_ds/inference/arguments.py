"""The weights that chat.py and score.py load, by our flags or by those of MiniMind's eval_llm.py.

    python launch/chat.py --weight out/sft
    python launch/chat.py --load_from path/to/minimind/model --weight full_sft --hidden_size 768
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from minimind_ds.checkpoint.weights import opened
from minimind_ds.config import program_flags
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS, ModelConfig
from minimind_ds.config.run import RunConfig
from minimind_ds.config.spellings import SHAPE, choose_model
from minimind_ds.convert import weight_files
from minimind_ds.paths import is_bare


class Chosen(NamedTuple):
    """What was asked for: load_model's arguments, lines for the user, and whether the weights are a pretraining's."""

    arguments: dict
    notes: list[str]
    pretrained: bool


def choose(args: argparse.Namespace) -> Chosen:
    """The files that the flags mean.

    Raises:
        ValueError: none named, none there, weights named twice, or a shape that is missing or not the weights' own.
    """
    weight, tokenizer = program_flags.load_from(args)
    told = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    bare = is_bare(weight)
    shape, notes = shape_of(args.preset, told, usual=bare), []

    def named(flag: str, name: str, *others: str) -> str:
        path = weight_files.find_bare(flag, [name, *others], [args.save_dir], shape or PRESETS["minimind-3"])
        notes.append(f"{flag} {name}: {path}")
        return str(path)

    path = named("--weight", weight) if bare else opened(weight)
    carried = weight_files.read_config(path)
    if carried is None and shape is None:
        raise UserError(f"{path} does not carry its model's configuration: name --preset, or --hidden_size, "
                        "--num_hidden_layers and --use_moe as in MiniMind"
                        f"{weight_files.like_presets(weight_files.read_state(path))}")
    if carried is not None:
        check_shape(path, carried, told, args.preset)
        shape = carried
    lora = None if args.lora == "None" else args.lora
    if lora and is_bare(lora):
        lora = named("--lora", lora, f"{lora}_lora")
    lora = opened(lora)
    arguments = dict(weight=path, tokenizer=tokenizer, lora=lora, shape=shape,
                     inference_rope_scaling=args.inference_rope_scaling)
    return Chosen(arguments, notes, bare and "pretrain" in weight)


def shape_of(preset: str | None, told: dict, usual: bool) -> ModelConfig | None:
    """The model that a preset or MiniMind's flags describe; with neither its default, if `usual`, or None."""
    values, given = ({"preset": preset}, {"preset": "--preset"}) if preset else ({}, {})
    choose_model(told or ({"use_moe": False} if usual and not preset else {}), values, given)
    if not values:
        return None
    return RunConfig(preset=values["preset"], model=values.get("model", {})).model_config(vocab_size=1)


def check_shape(path: weight_files.Source, carried: ModelConfig, told: dict, preset: str | None) -> None:
    """Raises ValueError where the weights' own configuration is another than the one that was told."""
    asked = {"--preset " + preset: PRESETS[preset]} if preset else {}
    wanted = {name: (getattr(config, name), flag) for flag, config in asked.items() for name in SHAPE}
    wanted |= {name: (value, f"--{name}") for name, value in told.items()}
    for name, (value, flag) in wanted.items():
        if getattr(carried, name) != value:
            raise UserError(f"{path}: its {name} is {getattr(carried, name)}, with {flag} it would be {value}; leave "
                            "the flag out")
