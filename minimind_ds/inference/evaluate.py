"""Loss, perplexity and token accuracy of weights on data files: the evaluation of a training run, without the run.

Rows, order, ranks and loss are the training's own (training/step.py), so on the same layout the numbers are the same
to the last digit.  Every rank holds the whole model; no optimizer, no DeepSpeed engine.

    python launch/evaluate.py --weight out/sft --data_path examples/sft_heldout.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from minimind_ds import kernels
from minimind_ds.config import program_flags, untrusted
from minimind_ds.config.errors import UserError
from minimind_ds.config.model import ModelConfig, ParallelDims
from minimind_ds.config.precision import DTYPES
from minimind_ds.config.run import PRECISIONS, RunConfig, read_yaml
from minimind_ds.convert import export
from minimind_ds.convert.weight_files import InMemory, Source
from minimind_ds.data.conversation import notes as data_notes
from minimind_ds.data.files import passed_over
from minimind_ds.data.packing import PackedBatch
from minimind_ds.data.sources import what_is_lost
from minimind_ds.distributed import engine
from minimind_ds.distributed.deepspeed_compat import choose_accelerator
from minimind_ds.distributed.world import World, read_world
from minimind_ds.inference import arguments
from minimind_ds.inference.chat import usable
from minimind_ds.io import write_file
from minimind_ds.model import lora
from minimind_ds.model.decoder import MiniMindForCausalLM, kernel_requirements
from minimind_ds.paths import cache_folder
from minimind_ds.terminal import columns, count, wrap
from minimind_ds.training.kept_weights import BEST
from minimind_ds.training.live import LiveRun
from minimind_ds.training.loop import user_error
from minimind_ds.training.prepare import PreparedRun, open_data, split_by_source
from minimind_ds.training.step import evaluation_sums

# What an evaluation takes from the run.yaml beside its weights; the rest of AS_TRAINED is this machine's.
OF_RUN = (*(name for name in program_flags.AS_TRAINED if name not in ("kernels", "cache_dir", "num_workers")), "dtype")


def main(argv: list[str]) -> int:
    """The whole of launch/evaluate.py.  Returns the exit code."""
    args, world = program_flags.evaluate().parse_args(argv), read_world()
    try:
        choose_accelerator(world.device)
        if args.device and world.size > 1:
            raise UserError(f"--device {args.device}: the launcher gives each of {world.size} ranks its own")
        world = replace(world, device=usable(args.device)) if args.device else world
        check_out(args.out)
        prepared, model, about = prepare(args, world)
        if world.size > 1:
            # Ranks that read other weights or data would add up what does not belong together.
            engine.start(world, settings={**about, "data": prepared.eval_sets[0].store.content})
        if world.rank == 0:
            for line in prepared.notes:
                print(wrap(line), flush=True)
            print(f"evaluating {count(len(prepared.stores[0]), 'sample')} …", file=sys.stderr, flush=True)
        result = {**about, "ranks": world.size, **evaluate(prepared, model)}
        if world.rank == 0:
            for line in report(result):
                print(wrap(line))
            if args.out:
                write_file(args.out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    except UserError as error:
        return user_error(error, world)
    except KeyboardInterrupt:
        return 130
    finally:
        engine.stop()
    return 0


def check_out(path: Path | None) -> None:
    """Raises UserError for a file that cannot be written, or that is no result of an evaluation."""
    if path is not None and path.exists() and not path.is_dir():
        try:
            earlier = untrusted.read_json(path)
        except UserError:
            earlier = {}
        if "weight" not in earlier:
            raise UserError(f"--out {untrusted.shown_path(path)} exists and is no evaluation's result: name another")
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--out {path}: " + ("is a folder" if path.is_dir() else f"there is no folder {path.parent}"))


def prepare(args: argparse.Namespace, world: World) -> tuple[PreparedRun, MiniMindForCausalLM, dict]:
    """The evaluation, its model on the rank's device, and what it is, for the result.

    Raises:
        ValueError: what is wrong with the flags, the weights or the data.
    """
    chosen = arguments.choose(args)
    weight, adapters = chosen.arguments["weight"], chosen.arguments["lora"]
    run, kind, notes = settings_of(args, adapters or weight, chosen.pretrained)
    state, config = export.load(weight, shape=chosen.arguments["shape"])
    config = replace(config, inference_rope_scaling=args.inference_rope_scaling or config.inference_rope_scaling)
    tok = export.tokenizer_of(weight, chosen.arguments["tokenizer"], adapters)
    if tok.vocab_size > config.vocab_size:
        raise UserError(f"{weight}: these are weights of another tokenizer: {tok.name} has {tok.vocab_size} ids, the "
                        f"model {config.vocab_size}")
    stored = state["model.embed_tokens.weight"].dtype
    run = run.replace(dtype=run.dtype or next((name for name in PRECISIONS if DTYPES[name] == stored), "fp32"))
    dtype = DTYPES[run.dtype]
    selection = kernels.resolve(run.kernels, world.device, dtype, kernel_requirements(config))
    model = build(state, config, adapters, run.kernels).to(world.device, dtype)
    [held_out], _ = open_data(kind, run, tok, progress=world.rank == 0)
    if (longest := int(held_out.lengths.max())) > config.max_position_embeddings:
        raise UserError(f"a sample of {longest} tokens is longer than the model's {config.max_position_embeddings}: "
                        "lower --max_seq_len")
    notes += data_notes(held_out.stats, run.text_markers) + passed_over(run.data_path)
    notes += [f"{row['path']}: {lost}" for row in held_out.table()
              if (lost := what_is_lost(row["file"], run.max_seq_len, kind))]
    sets = split_by_source(held_out, run, world.size)
    prepared = PreparedRun(run, world, ParallelDims(), tok, config, [held_out], sets, sets[0].plan, {}, selection,
                           None, (*chosen.notes, *notes), kind=kind)
    about = {"weight": str(weight), "lora": adapters and str(adapters), "kind": kind,
             **{name: getattr(run, name) for name in OF_RUN}}
    return prepared, model, about


def settings_of(args: argparse.Namespace, weight: Source, pretrained: bool) -> tuple[RunConfig, str, list[str]]:
    """What the flags say, else the run.yaml beside the weights, else the training's defaults; and a note of these."""
    folder = weight.path.parent.parent if isinstance(weight, InMemory) else Path(weight)
    folder = folder if folder.is_dir() else folder.parent
    beside, found = folder / "run.yaml", {}
    if folder.name == BEST and not beside.exists():
        # A run's best weights lie in a folder of it.
        beside = folder.parent / "run.yaml"
    if beside.is_file():
        values, _ = read_yaml(str(beside))
        found = {name: values[name] for name in OF_RUN if name in values}
    told = {name: value for name in (*program_flags.AS_TRAINED, "dtype") if (value := getattr(args, name)) is not None}
    run = RunConfig(**{"cache_dir": str(cache_folder()), **found, **told}, given={
        **{name: f"{name} in {beside}" for name in found}, **{name: f"--{name}" for name in told}},
        data_path=args.data_path, epochs=1)
    kind = args.kind or ("text" if pretrained or found.get("too_long") == "split" else "conversations")
    said = ", ".join(f"{name} {spelt(value)}" for name, value in found.items() if name not in told)
    return run, kind, [f"as in {beside}: {said}"] if said else []


def spelt(value: object) -> str:
    """A setting as a flag gives it."""
    return untrusted.shown(int(value) if isinstance(value, bool) else value).strip("'")


def build(state: dict, config: ModelConfig, adapters: Source | None, spec: str) -> MiniMindForCausalLM:
    """The model as a run trains it: adapters beside their base, not merged into it."""
    model = MiniMindForCausalLM(config, kernels=spec)
    model.load_weights(state)
    if adapters:
        matrices, facts, _ = lora.load_adapters(adapters, config)
        lora.check_base(state, facts)
        lora.attach(model, facts, matrices)
    return model.eval()


def evaluate(prepared: PreparedRun, model: MiniMindForCausalLM) -> dict:
    """{"all": figures, "sources": [figures with the source's name and path, ...]}; collective."""
    def measure(batch: PackedBatch) -> list[torch.Tensor | int]:
        out = model(batch, count_correct=True)
        return [out.loss_sum, out.n_labelled, out.n_correct]

    sums = evaluation_sums(prepared, LiveRun(engine=model), measure)
    return {"all": figures(*sums.sum(0).tolist()),
            "sources": [{"name": part.name, "path": str(part.store.sources[0].path), "samples": len(part.store),
                         **{name: part.store.stats[name] for name in ("cut", "dropped", "unlabelled", "skipped")},
                         **figures(*row)} for part, row in zip(prepared.eval_sets, sums.tolist())]}


def figures(loss_sum: float, labelled: float, correct: float) -> dict:
    """Loss in nats per labelled token, its exponential, the share of labels with the largest logit; None for what is
    no number."""
    loss = loss_sum / labelled if labelled else math.nan
    sound = math.isfinite(loss)
    return {"loss": loss if sound else None, "perplexity": math.exp(loss) if sound and loss < 700 else None,
            "accuracy": correct / labelled if labelled else None, "labelled_tokens": int(labelled)}


def report(result: dict) -> list[str]:
    """The result for people: each source where there are several, then all."""
    rows = [*(result["sources"] if len(result["sources"]) > 1 else []), {"name": "all", **result["all"]}]

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return columns(["loss", "perplexity", "token accuracy", "labelled tokens"], [
        (row["name"], [cell(row["loss"], ".6f"), cell(row["perplexity"], ".4f"), cell(row["accuracy"], ".2%"),
                       f"{row['labelled_tokens']:,}"]) for row in rows])
