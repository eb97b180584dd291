"""launch/verify.py's report for many runs, some with a law broken on purpose, for tests/verify/test_verify.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/verify_broken.py OUT_DIR CASES

CASES is a JSON list of {name, flags, model, breaks}; `model` are fields of a tiny model, `breaks` names a function of
this file or is null.  Rank 0 writes OUT_DIR/<name>.json.
"""

import contextlib
import json
import pathlib
import sys
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds import verify  # noqa: E402
from minimind_ds.data import IGNORE  # noqa: E402
from minimind_ds.data.store import TokenStore  # noqa: E402
from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.kernels import sdpa  # noqa: E402
from minimind_ds.training import loop, step  # noqa: E402
from minimind_ds.verify.small import bench  # noqa: E402

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96}


def shifted_labels():
    """The oldest mistake: labels that the loss is to shift, in a loss that does not."""
    read = TokenStore.read

    def shifted(store, indices):
        ids, labels = read(store, indices)
        ends = np.cumsum(store.lengths[indices]) - 1
        labels = np.where(np.roll(labels, 1) == IGNORE, IGNORE, ids)
        labels[ends] = IGNORE
        return ids, labels

    return mock.patch.object(TokenStore, "read", shifted)


def leaked_attention():
    """A row is one segment: samples see those before them."""
    attention = sdpa.attention

    def leaky(q, k, v, cu_seqlens, max_seqlen, **more):
        return attention(q, k, v, cu_seqlens[[0, -1]], int(cu_seqlens[-1]), **more)

    return mock.patch.object(sdpa, "attention", leaky)


@contextlib.contextmanager
def mean_of_means():
    """Each micro-batch's own mean, averaged over micro-batches and ranks."""
    fetch, now = loop.fetch, {}

    def watched(prepared, *args):
        now["micro_batches"] = prepared.run.accumulation_steps
        for batch in fetch(prepared, *args):
            now["labelled"] = max(batch.n_labelled, 1)
            yield batch

    def loss_of(ce_sum, aux, n_real, *, step_labelled, step_real, dp_world):
        return ce_sum / now["labelled"] / now["micro_batches"] + aux * (n_real * dp_world / max(step_real, 1))

    with mock.patch.object(loop, "fetch", watched), mock.patch.object(step, "scaled_loss", loss_of):
        yield


def no_moments():
    """A checkpoint that loses the optimizer's states, as a loader that was told not to load them would."""
    load = loop.load_checkpoint

    def forgetful(prepared, ds_engine, start):
        load(prepared, ds_engine, start)
        for state in ds_engine.basic_optimizer.state.values():
            state["exp_avg"].zero_()

    return mock.patch.object(loop, "load_checkpoint", forgetful)


def inexact_kernel():
    """A kernel whose result is off by a thousandth."""
    swiglu = sdpa.swiglu
    return mock.patch.object(sdpa, "swiglu", lambda gate, up: swiglu(gate, up) * 1.001)


def main(out: pathlib.Path, cases: list[dict]) -> None:
    world = read_world()
    engine.start(world)
    torch.manual_seed(0)
    for case in cases:
        yaml = out / f"{case['name']}_{world.rank}.yaml"
        yaml.write_text("preset: debug\nmodel: " + json.dumps({**TINY, **case["model"]}), encoding="utf-8")
        argv = ["--config", str(yaml), "--save_dir", str(out / case["name"]), "--cache_dir", str(out / "cache"),
                "--tokens", "200", "--samples", "3", *case["flags"]]
        options, rest = verify.parse(argv)
        prepared, kind = verify.prepare_run(rest, world)
        with globals()[case["breaks"]]() if case["breaks"] else contextlib.nullcontext():
            report = verify.verify(prepared, kind, bench(prepared, options.tokens), options, verify.print_on(world))
        if world.rank == 0:
            (out / f"{case['name']}.json").write_text(json.dumps(report))
    dist.barrier()
    engine.stop()


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(pathlib.Path(args[0]), json.loads(args[1]))
