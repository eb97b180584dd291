"""What a run takes over from the weights it starts with: their tokenizer, their vocabulary and themselves.

    deepspeed launch/sft.py --deepspeed zero2 --from_weight out/pretrain
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from minimind_ds.checkpoint.weights import opened
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import PRESETS, ModelConfig
from minimind_ds.config.run import RunConfig
from minimind_ds.convert import export, vocabulary, weight_files
from minimind_ds.convert.vocabulary import Vocabulary
from minimind_ds.convert.weight_files import Source
from minimind_ds.data.tokenizer import Tokenizer, load_tokenizer

# The largest --grow_vocab: a multiple to fill up to.
MOST_ROWS = 4096


def open_weights(run: RunConfig) -> tuple[RunConfig, Source | None, list[str]]:
    """--from_weight, a checkpoint read into memory, and named where its folder was: the run with that name, the
    weights (None: there are none), lines for the start.  Raises ValueError as opened."""
    if run.from_weight == "none":
        return run, None, []
    weights = opened(run.from_weight)
    if str(weights) == run.from_weight:
        return run, weights, []
    note = f"{run.place('from_weight')} {run.from_weight}: starts from {weights}"
    return run.replace(from_weight=str(weights)), weights, [note]


def own_model(run: RunConfig, weights: Source | None, note: str) -> tuple[RunConfig, str]:
    """The run with the model that its weights say they are of, and a line about it; else as it is, and `note`."""
    config = None if weights is None else weight_files.read_config(weights)
    if config is None:
        return run, note
    free = {*weight_files.FREE_FIELDS, "vocab_size", *(() if config.use_moe else weight_files.MOE_FIELDS)}
    # Other weights may have been made for shorter texts; these say how long theirs are.
    free.remove("max_position_embeddings")
    changes = {preset: {name: value for name, value in config.to_dict().items()
                        if name not in free and value != getattr(base, name)} for preset, base in PRESETS.items()}
    preset = min(changes, key=lambda preset: len(changes[preset]))
    run = run.replace(preset=preset, model=changes[preset])
    return run, f"the model is that of {run.from_weight}; --preset names another"


def tokenizer_and_model(run: RunConfig,
                        weights: Source | None = None) -> tuple[RunConfig, Tokenizer, ModelConfig, list[str]]:
    """The run with its tokenizer named, that tokenizer, the model with its vocabulary, and lines for the start.

    Args:
        weights: --from_weight, opened; None opens it.

    Raises:
        ValueError: a tokenizer that cannot be read or is not the starting weights', fewer rows than ids, rows that
            cannot be added.
    """
    check_growth(run)
    if run.from_weight == "none":
        tokenizer = load_tokenizer(run.tokenizer)
        return run, tokenizer, run.model_config(tokenizer.vocab_size), []
    # First, so that what is no whole model's weights is named before their tokenizer is looked for.
    weights = weights or opened(run.from_weight)
    weight_files.read_config(weights)
    beside = export.find_tokenizer(weights)
    tokenizer = load_tokenizer(run.tokenizer or beside)
    own = own_vocabulary(run, weights, tokenizer, beside)
    notes = check_tokenizer(run, tokenizer, own)
    rows, grown = vocabulary_rows(run, weight_files.embedding_rows(weights), tokenizer, own)
    if run.model.get("vocab_size", rows) != rows:
        raise UserError(f"vocab_size is {run.model['vocab_size']} in the model block; with {run.from_weight} it is "
                        f"{rows:,}")
    if run.tokenizer is None and beside is not None:
        run = run.replace(tokenizer=beside)
    return run, tokenizer, run.model_config(rows), notes + grown


def check_growth(run: RunConfig) -> None:
    """Raises ValueError where there is nothing to add rows to, none of them would be trained, or far too many."""
    said = f"{run.place('grow_vocab')} is {run.grow_vocab}"
    if run.grow_vocab and run.from_weight == "none":
        raise UserError(f"{said}: rows are added to the weights of --from_weight; name some, or leave it out")
    if run.grow_vocab and run.lora_rank:
        raise UserError(f"{said}: new rows have to be trained, and --lora_rank keeps all weights as they are; leave "
                        "one of the two out")
    if run.grow_vocab > MOST_ROWS:
        raise UserError(f"{said}; it must be at most {MOST_ROWS}, a multiple to fill up to")


def own_vocabulary(run: RunConfig, weights: Source, tokenizer: Tokenizer, beside: str | None) -> Vocabulary | None:
    """What the weights say of their tokenizer, or the one beside them; None where there is neither.

    A .pth says nothing, and may lie anywhere.

    Raises:
        ValueError: one beside them that cannot be read, unless the run allows any.
    """
    own = vocabulary.recorded(weights)
    if own is not None or beside is None or weight_files.find(weights)[0].suffix != ".safetensors":
        return own
    if run.tokenizer is None:
        return Vocabulary.of(tokenizer)
    try:
        return Vocabulary.of(load_tokenizer(beside))
    except UserError as error:
        if run.tokenizer_mismatch == "allow":
            return None
        raise UserError(f"{error}; so it cannot be compared with {tokenizer.name}: --tokenizer_mismatch allow starts "
                        "all the same") from None


def check_tokenizer(run: RunConfig, tokenizer: Tokenizer, own: Vocabulary | None) -> list[str]:
    """What is said of the run's tokenizer beside that of its starting weights.

    Raises:
        ValueError: it is another one, and the run does not allow that.
    """
    if own is None:
        return [f"{run.from_weight} does not say with which tokenizer it was trained: {tokenizer.name} is taken for "
                "it; --tokenizer names another"]
    if why := own.difference(tokenizer):
        said = f"{tokenizer.name} is not the tokenizer that {run.from_weight} was trained with: {why}"
        if run.tokenizer_mismatch == "refuse":
            named = "leave --tokenizer out" if run.tokenizer else "name theirs with --tokenizer"
            raise UserError(f"{said}; {named}, or start all the same with --tokenizer_mismatch allow")
        return [f"{said} (--tokenizer_mismatch allow)"]
    if tokenizer.vocab_size > own.size:
        return [f"{tokenizer.name} has the ids of {run.from_weight} and {tokenizer.vocab_size - own.size:,} more"]
    return [] if run.tokenizer else [f"tokenizer: {tokenizer.name}, with which {run.from_weight} was trained"]


def vocabulary_rows(run: RunConfig, rows: int | None, tokenizer: Tokenizer,
                    own: Vocabulary | None) -> tuple[int, list[str]]:
    """How many ids the model has rows for: as many as the weights, or more with --grow_vocab; lines for the start.

    Args:
        rows: of the weights' embedding; None where they have none.

    Raises:
        ValueError: fewer rows than ids, or more where nothing says that the weights are this tokenizer's.
    """
    ids = tokenizer.vocab_size
    rows = rows or ids
    said = f"{run.from_weight} has rows for {rows:,} ids and {tokenizer.name} has {ids:,}"
    if run.grow_vocab:
        grown = math.ceil(max(ids, rows) / run.grow_vocab) * run.grow_vocab
        if grown == rows:
            return rows, [f"--grow_vocab adds nothing: {said}"]
        return grown, [f"{said}: {grown - rows:,} rows are added, each the mean of the old ones and a little noise"]
    if rows < ids:
        raise UserError(f"{said}: --grow_vocab adds the missing rows, --tokenizer names another tokenizer")
    if rows > ids and own is None and run.tokenizer_mismatch == "refuse" and run.model.get("vocab_size") != rows:
        raise UserError(f"{said}: name the weights' own tokenizer with --tokenizer, or start all the same with "
                        "--tokenizer_mismatch allow")
    return rows, [said] if rows > ids else []


def load(run: RunConfig, config: ModelConfig, weights: Source | None = None) -> dict[str, Tensor] | None:
    """The weights that training starts from, with rows for the model's whole vocabulary; None: from nothing.

    Args:
        weights: as tokenizer_and_model's.

    Raises:
        ValueError: what weight_files.load_weights refuses.
    """
    if run.from_weight == "none":
        return None
    weights = weights or opened(run.from_weight)
    if not run.grow_vocab:
        return weight_files.load_weights(weights, config)
    rows = weight_files.embedding_rows(weights) or config.vocab_size
    state = weight_files.load_weights(weights, replace(config, vocab_size=rows))
    return vocabulary.grow(state, config.vocab_size, seed=run.seed)
