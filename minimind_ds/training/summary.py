"""What a run says of itself: a fact a line at its start, and in the end what came of it and where it lies.

    deepspeed launch/sft.py --deepspeed ds_configs/zero1.json --max_steps 5
"""

from __future__ import annotations

import math
import pathlib
import shlex

from minimind_ds import terminal
from minimind_ds.checkpoint import reshape
from minimind_ds.config import deepspeed_json
from minimind_ds.config.run import RunConfig
from minimind_ds.convert import minimind
from minimind_ds.data import loader
from minimind_ds.data.sources import Mixture, what_is_lost
from minimind_ds.model import lora
from minimind_ds.paths import LAUNCH, PACKAGE
from minimind_ds.training import kept_weights
from minimind_ds.training.evaluations import perplexity
from minimind_ds.training.live import LiveRun
from minimind_ds.training.prepare import EvalSet, PreparedRun
from minimind_ds.training.resume import ResumePoint, layout_facts


def describe_data(run: RunConfig, kind: str, store: Mixture, eval_sets: tuple[EvalSet, ...],
                  plan: loader.EpochPlan) -> list[str]:
    """What an epoch trains on, and what not, for the first lines of output."""
    tokens, stats, rows = int(plan.n_tokens.sum()), store.stats, store.table()
    lost = {"cut": stats["cut"], "dropped": stats["dropped"], "without a label": stats["unlabelled"],
            "malformed": stats["skipped"]}
    lines = [f"data: {terminal.shorter(run.data_path) if len(rows) == 1 else f'{len(rows)} sources'}",
             f"samples: {len(store):,}, {tokens:,} tokens, {plan.n_labelled.sum() / max(tokens, 1):.0%} labelled; "
             + (", ".join(f"{n:,} {what}" for what, n in lost.items() if n) or "all of them whole")]
    if len(rows) > 1 or rows[0]["share"] != 1:
        lines += [f"  {row['path']}: share {row['share']:g}, {row['samples']:,} samples an epoch, "
                  f"{row['share_of_tokens']:.1%} of the tokens, {row['share_of_labels']:.1%} of the labels"
                  for row in rows]
    lost = [(row["path"], what_is_lost(row["file"], run.max_seq_len, kind)) for row in rows]
    if run.eval_path:
        held_out = [row for part in eval_sets for row in part.store.table()]
        lost += [(f"held out, {row['path']}", what_is_lost(row["file"], run.max_seq_len, kind)) for row in held_out]
    return [*lines, *(f"{path}: {said}" if len(lost) > 1 else said for path, said in lost if said),
            f"rows: {plan.n_rows:,} of {run.row_len} tokens, {plan.fill:.2%} full"]


def summary(prepared: PreparedRun, start: ResumePoint) -> list[str]:
    """What the run is, for its first lines of output."""
    run, config, plan, adapters = prepared.run, prepared.model_config, prepared.first_plan, prepared.lora
    parameters = sum(math.prod(shape) for shape in minimind.expected_shapes(config).values())
    tokens = prepared.data_parallel_size * run.batch_size * run.accumulation_steps * run.row_len
    lines = [*prepared.notes, *start.notes,
             f"model: {', '.join([run.preset, *(f'{name} {value}' for name, value in run.model.items())])}, "
             f"{parameters / 1e6:.1f} M parameters",
             f"tokenizer: {prepared.tokenizer.name}",
             *describe_data(run, prepared.kind, prepared.stores[0], prepared.eval_sets, plan),
             f"kernels: {prepared.kernels.reason}",
             f"engine: {deepspeed_json.describe(prepared.ds, prepared.dims)}",
             f"step: {terminal.count(prepared.world.size, 'rank')} x {terminal.count(run.batch_size, 'row')} x "
             f"{terminal.count(run.accumulation_steps, 'micro-batch', 'micro-batches')}, at most {tokens:,} tokens",
             f"steps: {len(plan):,} an epoch, {prepared.total_steps:,} in all"]
    if adapters:
        trained = sum(math.prod(shape) for shape in lora.shapes(config, adapters).values())
        frozen = "; the experts stay as they are" if config.use_moe else ""
        lines.append(f"LoRA: {adapters.describe()}; trains {trained:,} of {parameters + trained:,} parameters{frozen}")
    if start.path is not None:
        reshaped = f", {reshape.note(start.layout, layout_facts(prepared))}" if start.layout else ""
        lines.append(f"resuming from {start.path} after step {start.step}{reshaped}")
        if start.layout and config.dropout > 0:
            lines.append("dropout goes on with new draws, from seed, step and rank")
    return lines


def ending(prepared: PreparedRun, live: LiveRun, step: int, taken: str) -> list[str]:
    """The last lines of a run: what came of it, where the weights are, and how to hear them.

    taken: what this start of the run took, Metrics.taken().
    """
    best, last = live.evaluations.best, live.evaluations.last
    lines = [f"finished after step {step:,}{taken}"]
    if best:
        lines.append(f"evaluation: {loss_of(best)}" + ("" if last == best else " is the lowest"))
    if last and last != best:
        lines.append(f"evaluation: {loss_of(last)} is the last")
    folder = pathlib.Path(prepared.run.save_dir)
    if prepared.run.keep_best and best:
        lines.append(f"best weights: {terminal.shorter(kept_weights.path_of(prepared, kept_weights.BEST))}")
        folder = folder if best == last else folder / kept_weights.BEST
    return [*lines, f"weights: {terminal.shorter(kept_weights.path_of(prepared, kept_weights.LAST))}",
            f"next: {chat_command(prepared, str(folder))}"]


def loss_of(evaluation: tuple[int, float | None]) -> str:
    step, loss = evaluation
    means = perplexity(loss)
    return (f"loss {'not finite' if loss is None else f'{loss:.4f}'}"
            + (f" (perplexity {means:.4g})" if means else "") + f" after step {step:,}")


def chat_command(prepared: PreparedRun, folder: str) -> str:
    """What talks to a run's weights, the last or the best, in `folder`."""
    # A wheel has the programs inside the package, and the command on the PATH.
    words = ["minimind-ds", "chat"] if LAUNCH.is_relative_to(PACKAGE) else ["python", str(LAUNCH / "chat.py")]
    flags = {"--weight": prepared.run.from_weight, "--lora": folder} if prepared.lora else {"--weight": folder}
    return shlex.join(map(terminal.shorter, [*words, *(word for pair in flags.items() for word in pair)]))
