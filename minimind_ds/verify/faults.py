"""Deliberate errors, each as a context manager: what verify's laws are to find, and `--sensitivity` measures.

    with faults.scaled_kernel("swiglu", "sdpa", 1e-3): report = verify(...)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from minimind_ds import kernels
from minimind_ds.config.errors import UserError
from minimind_ds.data import IGNORE, hf_folder
from minimind_ds.data.store import TokenStore
from minimind_ds.training import loop, step

from .patching import replaced

# Which of an operation's results is scaled.
SCALED = {"add_rms_norm": 1}


def scaled_kernel(name: str, backend: str, size: float):
    """A backend's operation whose result is 1 + size times what it should be, and with it the gradients.

    It is worked out in fp32, scaled there and rounded once: a result in bf16 times 1.001 would be the same bits again.
    """
    module = kernels.operations_of(backend)
    if module is kernels.reference:
        raise UserError("the law of kernels compares with the reference backend; deliberate errors need another one")
    function, which = getattr(module, name), SCALED.get(name, 0)

    def wide(x):
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return x.to(torch.promote_types(x.dtype, torch.float32)) if floating else x

    def scaled(*args, **options):
        found = function(*map(wide, args), **options)
        several = list(found) if isinstance(found, tuple) else [found]
        several[which] = several[which] * (1 + size)
        # Losses and a router's weights are in fp32 whatever comes in.
        kept = {"token_losses": (0,), "route": range(4)}.get(name, ())
        several = [x if i in kept else x.to(args[0].dtype) for i, x in enumerate(several)]
        return tuple(several) if isinstance(found, tuple) else several[0]

    return replaced(module, name, scaled)


def leaked_attention(backend: str):
    """A row is one segment: samples see those before them."""
    module = kernels.operations_of(backend)
    attention = module.attention

    def leaky(q, k, v, cu_seqlens, max_seqlen, **more):
        return attention(q, k, v, cu_seqlens[[0, -1]], int(cu_seqlens[-1]), **more)

    return replaced(module, "attention", leaky)


def leaked_key(backend: str):
    """The first token of each row's second sample also sees the last one of the first sample, in one head."""
    module = kernels.operations_of(backend)
    attention = module.attention

    def leaky(q, k, v, cu_seqlens, max_seqlen, **more):
        out = attention(q, k, v, cu_seqlens, max_seqlen, **more)
        if len(cu_seqlens) < 3:
            return out
        at = int(cu_seqlens[1])
        seen = attention(*(x[at - 1:at + 1] for x in (q, k, v)), cu_seqlens.new_tensor([0, 2]), 2, **more)
        mask = torch.zeros_like(out, dtype=torch.bool)
        mask[at, 0] = True
        return torch.where(mask, torch.nn.functional.pad(seen[1:], (0, 0, 0, 0, at, len(out) - at - 1)), out)

    return replaced(module, "attention", leaky)


def shifted_labels():
    """Labels not shifted, for a loss that does not shift them."""
    read = TokenStore.read

    def shifted(store, indices):
        ids, labels = read(store, indices)
        ends = np.cumsum(store.lengths[indices]) - 1
        labels = np.where(np.roll(labels, 1) == IGNORE, IGNORE, ids)
        labels[ends] = IGNORE
        return ids, labels

    return replaced(TokenStore, "read", shifted)


def lost_line_end():
    """The exported chat template lacks the last of the line ends that it writes, in an open prompt."""
    exported = hf_folder.exported_template
    return replaced(hf_folder, "exported_template", lambda own: "".join(exported(own).rsplit(r"\n", 1)))


def one_label(line: int, how: str):
    """One label of the sample in this line of the file: another token ("changed"), none ("lost"), or one too many, on
    the first token without ("added")."""
    read = TokenStore.read

    def wrong(store, indices):
        ids, labels = read(store, indices)
        lengths = store.lengths[indices]
        for index, end, length in zip(indices, np.cumsum(lengths).tolist(), lengths.tolist()):
            if store.lines[index] == line:
                told = labels[end - length:end]
                at = int(np.flatnonzero((told == IGNORE) == (how == "added"))[0])
                told[at] = {"changed": (told[at] + 1) % 256, "lost": IGNORE, "added": ids[end - length + at + 1]}[how]
        return ids, labels

    return replaced(TokenStore, "read", wrong)


@contextlib.contextmanager
def mean_of_means(share: float = 1.0) -> Iterator[None]:
    """Each micro-batch's own mean, averaged over micro-batches and ranks; or a share of it, the rest right."""
    fetch, scaled_loss, now = loop.fetch, step.scaled_loss, {}

    def watched(prepared, *args):
        now["micro_batches"] = prepared.run.accumulation_steps
        for batch in fetch(prepared, *args):
            now["labelled"] = max(batch.n_labelled, 1)
            yield batch

    def loss_of(ce_sum, aux, n_real, **facts):
        right = scaled_loss(ce_sum, aux, n_real, **facts)
        means = ce_sum / now["labelled"] / now["micro_batches"] + scaled_loss(ce_sum * 0, aux, n_real, **facts)
        return right + share * (means - right)

    with replaced(loop, "fetch", watched), replaced(step, "scaled_loss", loss_of):
        yield


def wrong_ranks_factor(size: float):
    """The loss handed to the engine is 1 + size times what it should be."""
    scaled_loss = step.scaled_loss
    return replaced(step, "scaled_loss", lambda *args, **facts: scaled_loss(*args, **facts) * (1 + size))


def not_learnt(what: str):
    """The first row, or the first label, of each rank's first micro-batch of a run is not learnt."""
    fetch = loop.fetch

    def lossy(prepared, epoch, plan, steps):
        for number, batch in enumerate(fetch(prepared, epoch, plan, steps)):
            if number == 0 and epoch == 0:
                labels, flat = batch.labels.clone(), batch.labelled_index
                gone = flat < labels.shape[1] if what == "row" else torch.arange(len(flat)) < 1
                labels.view(-1)[flat[gone]] = IGNORE
                batch = dataclasses.replace(batch, labels=labels, labelled_index=flat[~gone])
            yield batch

    return replaced(loop, "fetch", lossy)


def lost_moments(how: str = "all"):
    """A checkpoint whose loader forgets the optimizer's first moments: "all", or "one" element on each rank."""
    load = loop.load_checkpoint

    def forgetful(prepared, ds_engine, start):
        load(prepared, ds_engine, start)
        for state in ds_engine.basic_optimizer.state.values():
            moments = state["exp_avg"]
            if how == "all":
                moments.zero_()
            else:
                moments.view(-1)[moments.abs().argmax()] = 0
                break

    return replaced(loop, "load_checkpoint", forgetful)
