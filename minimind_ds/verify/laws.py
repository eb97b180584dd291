"""The laws, measured: each function gives the differences found, on the installed DeepSpeed and the user's own JSON.

What runs is the trainer itself (training.loop, checkpoint.folder) around a small model; what it is
compared with is written here, without it.  In fp32 the bounds are those of rounding; in half precision they are what
rounding every activation costs.

    deepspeed --num_gpus 2 launch/verify.py --deepspeed ds_configs/zero3.json
"""

from __future__ import annotations

import gc
import json
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_ds import checkpoint, kernels, terminal
from minimind_ds.config.precision import DTYPES
from minimind_ds.data import IGNORE
from minimind_ds.data.packing import collate
from minimind_ds.data.sample import Sample
from minimind_ds.distributed import engine
from minimind_ds.model.decoder import MiniMindForCausalLM
from minimind_ds.training import loop
from minimind_ds.training.live import LiveRun
from minimind_ds.training.prepare import PreparedRun

from .checks import Check, apart, bits_apart, gradients, gradients_apart, whole_norm
from .kernels_law import kernels_law
from .reduced_run import STEPS, ReducedRun

# Of a step's rows into micro-batches; the law of gradients takes two.
SPLITS = (1, 4)
CURVE = 2
# Relative differences that rounding explains: of a loss, of a gradient (2-norm; the worst parameter's in fp32).
FP32 = 1e-5
HALF_LOSS, HALF_NORM = 1e-2, 5e-2


def plain_gradients(model: MiniMindForCausalLM, samples: list[Sample]) -> tuple[float, dict[str, Tensor]]:
    """A loop as anybody would write it: one sample after the other, no rows, no ranks, sum of losses over all labels.

    Returns:
        nats per labelled token, and every trained parameter's gradient; the experts' balance loss is a mean over the
        tokens of all samples and in the gradients only.
    """
    device = next(model.parameters()).device
    labelled = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    tokens = sum(len(sample.input_ids) for sample in samples)
    loss = 0.0
    for sample in samples:
        out = model.train()(collate([[sample]], len(sample.input_ids)).to(device), return_logits=True)
        total = F.cross_entropy(out.logits[0].float(), sample.labels.to(device), ignore_index=IGNORE, reduction="sum")
        (total / labelled + out.aux_loss * (len(sample.input_ids) / tokens)).backward()
        loss += total.item() / labelled
    return loss, gradients(model)


def trained(prepared: PreparedRun, steps: int) -> tuple[list[dict], dict[str, Tensor]]:
    """The first steps of a run: their lines of metrics, and the first step's gradients as the update saw them."""
    live = LiveRun(engine=loop.build_engine(prepared))
    ds_engine = live.engine
    update, seen = ds_engine.step, {}

    def watched_update(*args, **kwargs):
        if ds_engine.is_gradient_accumulation_boundary() and not seen and prepared.run.dtype == "fp32":
            seen.update(engine.full_gradients(ds_engine, prepared.stage))
        return update(*args, **kwargs)

    ds_engine.step = watched_update
    lines, step = [], 0
    for epoch in range(prepared.run.epochs_begun):
        plan = prepared.plan(epoch)
        here = range(min(len(plan), steps - step))
        batches = loop.fetch(prepared, epoch, plan, here)
        for epoch_step in here:
            step += 1
            if "scheduler" not in prepared.ds:
                engine.set_lr(ds_engine, prepared.run.learning_rate)
            at = loop.Position(step, epoch, epoch_step)
            lines.append(loop.train_step(prepared, live, plan, at, batches).line())
    forget(ds_engine)
    return lines, seen


def forget(ds_engine) -> None:
    """Frees the engine, which is large and in reference cycles."""
    ds_engine.destroy()
    gc.collect()


def gradients_law(b: ReducedRun) -> list[Check]:
    """The engine's loss and gradients are the plain loop's, over all ranks and two micro-batches."""
    prepared = b.layout(accumulation=2, dtype="fp32", moe_balance="document", grad_clip=0.0)
    lines, ours = trained(prepared, 1)
    samples = [sample for row in b.rows() for sample in row]
    loss, theirs = plain_gradients(b.model("reference", torch.float32), samples)
    ranks = terminal.count(prepared.world.size, "rank")
    how = f"{len(samples)} samples in {b.row_len}-token rows, {ranks} x 2 micro-batches"
    found = [Check("gradients", f"fp32 loss against a plain loop's, {how}", apart(lines[0]["loss"], loss), FP32),
             Check("gradients", "fp32 gradients against the plain loop's", gradients_apart(ours, theirs), FP32)]
    dtype = b.prepared.run.dtype
    if dtype != "fp32":
        prepared = b.layout(accumulation=2, dtype=dtype, moe_balance="document", grad_clip=0.0)
        lines, _ = trained(prepared, 1)
        found.append(Check("gradients", f"{dtype} loss against the fp32 loop's", apart(lines[0]["loss"], loss),
                             HALF_LOSS))
        # With fp16 the first updates may overflow, and have no norm.
        if "skipped" not in lines[0]:
            found.append(Check("gradients", f"{dtype} gradient norm against the fp32 loop's",
                                 apart(lines[0]["grad_norm"], whole_norm(theirs)), HALF_NORM))
    return found


def layout_law(b: ReducedRun) -> list[Check]:
    """However a step's rows are cut into micro-batches, losses, norms and gradients are the same."""
    balance = "row" if b.prepared.run.moe_balance == "batch" else b.prepared.run.moe_balance
    runs = {split: trained(b.layout(accumulation=split, dtype="fp32", moe_balance=balance), CURVE) for split in SPLITS}
    control, grads = runs[SPLITS[0]]
    ranks, worst = b.prepared.world.size, {"loss": 0.0, "aux_loss": 0.0, "grad_norm": 0.0}
    for lines, _ in runs.values():
        for key in worst:
            worst[key] = max([worst[key], *(apart(a[key], c[key]) for a, c in zip(lines, control))])
    how = f"{terminal.count(ranks, 'rank')} x {', '.join(map(str, SPLITS))} micro-batches"
    moved = max(gradients_apart(other, grads) for _, other in runs.values())
    found = [Check("layout", f"fp32 losses of {CURVE} steps, {how}", worst["loss"], FP32),
             Check("layout", "fp32 gradient norms of these steps", worst["grad_norm"], FP32),
             Check("layout", "fp32 gradients of the first", moved, FP32)]
    if b.config.use_moe:
        found.append(Check("layout", f"fp32 balance losses of these steps ({balance})", worst["aux_loss"], FP32))
    return found


def run_rows(model: MiniMindForCausalLM, rows: list[list[Sample]], row_len: int) -> tuple[float, dict[str, Tensor]]:
    """Summed cross-entropy of rows in one batch, and its gradients, the balance loss weighted by tokens with them."""
    batch = collate(rows, row_len).to(next(model.parameters()).device)
    out = model.train()(batch)
    (out.loss_sum + out.aux_loss * batch.n_tokens).backward()
    return out.loss_sum.item(), gradients(model)


def packing_law(b: ReducedRun) -> list[Check]:
    """Rows give the loss and gradients of their samples alone; what one sample holds moves no bit of another."""
    rows = [row for row in b.rows() if row]
    model = b.model(b.spec32, torch.float32)
    loss, packed = run_rows(model, rows, b.row_len)
    alone_loss, alone = 0.0, None
    for sample in (sample for row in rows for sample in row):
        one_loss, one = run_rows(model, [[sample]], len(sample.input_ids))
        alone_loss += one_loss
        alone = one if alone is None else {name: alone[name] + grad for name, grad in one.items()}
    what = f"{sum(map(len, rows))} samples in {len(rows)} rows against each alone"
    found = [Check("packing", f"fp32 loss, {what}", apart(loss, alone_loss), FP32),
             Check("packing", f"fp32 gradients, {what}", gradients_apart(packed, alone), FP32)]
    dtype = b.prepared.run.dtype
    spec, kept = b.spec, ""
    if b.config.use_moe:
        # Where fast kernels sort tokens by expert, another sample's routing changes the shapes of products.
        spec, kept = only_moe(b, "reference"), ", experts by reference"
        moved, _ = probe(b.model(b.spec32, torch.float32), rows)
        found.append(Check("packing", "the same through the run's own experts, relative, fp32", moved, FP32))
    _, bits = probe(b.model(spec, DTYPES[dtype]), rows)
    found.insert(2, Check("packing", f"elements of a sample's outputs and gradients that move with its neighbours' "
                            f"tokens, {dtype}{kept}", bits, 0))
    return found


def only_moe(b: ReducedRun, backend: str) -> str:
    chosen = kernels.parse(b.spec)
    return ",".join(f"{key}={backend if key == 'moe' else name}" for key, name in chosen.items())


def probe(model: MiniMindForCausalLM, rows: list[list[Sample]]) -> tuple[float, int]:
    """The middle one of three samples, while its neighbours' tokens change: largest relative move, elements moved."""
    three = sorted((sample for row in rows for sample in row), key=lambda sample: len(sample.input_ids))[-3:]
    first, middle, last = three[0], three[-1], three[len(three) // 2]
    generator, results = torch.Generator().manual_seed(0), []
    device, vocab = next(model.parameters()).device, model.config.vocab_size
    for change in (False, True):
        row = []
        for sample in (first, middle, last):
            ids = torch.randint(0, vocab, sample.input_ids.shape, generator=generator)
            own = sample is middle
            row.append(Sample(sample.input_ids if own or not change else ids,
                              sample.labels if own else torch.full_like(sample.labels, IGNORE)))
        out = model.eval()(collate([row], sum(len(s.input_ids) for s in row)).to(device), return_logits=True)
        out.loss_sum.backward()
        start = len(first.input_ids)
        logits = out.logits[0, start:start + len(middle.input_ids)].detach().clone()
        results.append(({"logits": logits, "loss": out.loss_sum.detach()}, gradients(model)))
    (one, one_grads), (other, other_grads) = results
    relative = max(gradients_apart(one_grads, other_grads), *(gradients_apart({key: one[key]}, {key: other[key]})
                                                              for key in one))
    return relative, bits_apart([*one.values(), *one_grads.values()], [*other.values(), *other_grads.values()])


class Lines(list):
    """Takes metrics lines, as metrics.Metrics does."""

    def write(self, line: dict) -> None:
        self.append(line)


def resume_law(b: ReducedRun) -> list[Check]:
    """A run that stops half-way and goes on in a new engine ends as one that never stopped, bit for bit."""
    folder = pathlib.Path(b.prepared.run.save_dir) / ".verify"
    prepared = b.layout(accumulation=2, dtype=b.prepared.run.dtype, save_dir=str(folder), save_interval=STEPS // 2,
                        keep=2, keep_dropout=True)
    whole, resumed = Lines(), Lines()
    live = LiveRun(engine=loop.build_engine(prepared))
    loop.run_plan(prepared, live, loop.ResumePoint(), whole)
    live.finish_save()
    ends = [engine.full_weights(live.engine, prepared.stage)]
    forget(live.engine)
    path = checkpoint.folder_of(folder) / checkpoint.name_of(STEPS // 2)
    facts = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    start = loop.ResumePoint(path, facts["step"], facts["epoch"], facts["epoch_step"])
    live = LiveRun(engine=loop.build_engine(prepared))
    loop.load_checkpoint(prepared, live.engine, start)
    loop.run_plan(prepared, live, start, resumed)
    # Its last checkpoint may still be on the way into the folder, which is deleted next.
    live.finish_save()
    ends.append(engine.full_weights(live.engine, prepared.stage))
    forget(live.engine)
    assert len(whole) == STEPS and len(resumed) == STEPS - STEPS // 2, (len(whole), len(resumed))
    keys = ("loss", "aux_loss", "grad_norm", "lr")
    worst = max(apart(a[key] or 0.0, c[key] or 0.0) for a, c in zip(resumed, whole[STEPS // 2:]) for key in keys)
    return [Check("resume",
                  f"losses, norms and rates of {len(resumed)} steps after a checkpoint, {prepared.run.dtype}",
                    worst, 0),
            Check("resume", "elements of the last weights that differ", bits_apart(*(e.values() for e in ends)), 0)]


LAWS = {"gradients": gradients_law, "packing": packing_law, "layout": layout_law, "kernels": kernels_law,
        "resume": resume_law}
