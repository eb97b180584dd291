"""Our step against Hugging Face TRL's SFTTrainer with packing, in turns in one process, on the same rows.

    pip install -e .[trl]
    python launch/benchmark.py --compare trl --deepspeed ds_configs/zero2.json --preset minimind-3
"""

from __future__ import annotations

import gc
import os
import pathlib
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.specifiers import SpecifierSet

from minimind_ds.bench.machine import machine
from minimind_ds.bench.throughput.cell import full_steps, prepare_cell
from minimind_ds.bench.throughput.loops import packed_loop
from minimind_ds.bench.throughput.ratios import facts, pair
from minimind_ds.config.errors import UserError
from minimind_ds.convert import minimind
from minimind_ds.distributed import engine
from minimind_ds.distributed.world import read_world
from minimind_ds.training.prepare import PreparedRun

# The tested releases; setup.py's extra `trl` says the same.
NEEDS = {"trl": ">=1.16,<1.17", "datasets": ">=5.2,<6", "accelerate": ">=1.15,<2"}


def require() -> dict[str, str]:
    """-> the installed versions.

    Raises:
        ValueError: one is missing, or is none of those tested.
    """
    found = {}
    for name, tested in NEEDS.items():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
        if found[name] is None or found[name] not in SpecifierSet(tested, prereleases=True):
            what = "is not installed" if found[name] is None else f"{found[name]} is not one of the tested {tested}"
            wanted = " ".join(f"'{package}{spec}'" for package, spec in NEEDS.items())
            raise UserError(f"--compare trl: {name} {what}; pip install {wanted}")
    return found


def compare(program_flags: list[str], *, files: list[str], warm_up: int, steps: int, say) -> dict:
    """Each DeepSpeed file against TRL; collective.

    The same rows in the same order from the same weights, the same AdamW, clipping and ranks: dense models in fp32
    must have the same losses, too.

    Raises:
        ValueError: a user's mistake in the flags, or TRL is not there.
        RuntimeError: the two do not train the same model.
    """
    versions, world = require(), read_world()
    runs = [prepare_cell([*program_flags, "--deepspeed", file], world) for file in files]
    for prepared in runs:
        if prepared.dims.sequence > 1 or prepared.dims.experts > 1 or prepared.lora:
            raise UserError(f"{prepared.run.deepspeed}: --compare trl has no sequence or expert parallelism "
                             "and no LoRA")
    engine.start(world)
    if world.device.type == "cpu":
        # Otherwise accelerate chooses again, and for both.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    warnings.filterwarnings("ignore", category=FutureWarning, module="trl|transformers")
    pairs, notes = {}, []
    for prepared in runs:
        name = pathlib.Path(prepared.run.deepspeed).stem
        found, note = compare_one(prepared, name, warm_up=warm_up, steps=steps, say=say)
        pairs[f"{name} / trl"] = found
        notes.append(f"{name} / trl: {note}")
        gc.collect()
    return {"what": f"{world.size} rank(s): each DeepSpeed file / TRL's SFTTrainer on the same packed rows, real "
                    "tokens/s, in turns", **facts(runs[0]), "pairs": pairs, "notes": notes,
            "machine": {**machine(world), **versions, "transformers": version("transformers")}}


def compare_one(prepared: PreparedRun, name: str, *, warm_up: int, steps: int, say) -> tuple[dict, str]:
    from minimind_ds.bench.throughput import trl_loop

    torch.manual_seed(prepared.run.seed)
    start = prepared.start_weights or dict(minimind.fresh(prepared.model_config))
    trainer = trl_loop.build(prepared, start, warm_up + steps)
    leak = trl_loop.leak(prepared, trainer)
    trainer.begin()
    prepared = replace(prepared, start_weights=start)
    found = pair(trl_loop.loop(prepared, trainer, "trl"), packed_loop(prepared, name), warm_up=warm_up, steps=steps,
                 device=prepared.world.device, say=say)
    trainer.end()
    counted = [prepared.first_plan.facts(at % full_steps(prepared)) for at in range(warm_up, warm_up + steps)]
    share = sum(f.n_labelled for f in counted) / sum(f.n_tokens for f in counted)
    found |= {"labelled_tokens_per_s": {who: rate * share for who, rate in found["tokens_per_s"].items()},
              "attention": trainer.model.config._attn_implementation, "liger": trainer.args.use_liger_kernel,
              "leak": leak and dict(zip(("changed_sample", "others"), leak)),
              "trl_own_packing_fill": trl_loop.own_fill(prepared)}
    config, leaks = prepared.model_config, leak is not None and leak[1] > 0
    same = prepared.run.dtype == "fp32" and not config.use_moe and not config.dropout and not leaks
    if same and not found["largest_loss_difference"] < 1e-3:
        raise RuntimeError(f"{name} and TRL do not train the same model: their losses differ by "
                           f"{found['largest_loss_difference']:.1e}")
    if config.use_moe:
        # Their balance losses are not meant to agree.
        del found["largest_loss_difference"]
    return found, describe(prepared, found)


def describe(prepared: PreparedRun, found: dict) -> str:
    """What TRL did, as a line to stand beside the ratio."""
    moved = found["leak"]
    words = [f"TRL with {found['attention']} attention, {'Liger' if found['liger'] else 'no Liger'}, "
             + ("fp32" if prepared.run.dtype == "fp32" else f"fp32 weights under {prepared.run.dtype} autocast")]
    if moved is None:
        words.append("no batch had two samples")
    elif moved["others"]:
        words.append(f"NOT the same training: its packed samples see each other ({moved['others']:,} outputs of other "
                     "samples moved when one was changed)")
    else:
        words.append(f"its packed samples are apart (one changed: {moved['changed_sample']:,} of its own outputs "
                     "moved, none of the others')")
    if prepared.model_config.use_moe:
        words.append("its balance loss is another, so losses are not compared")
    else:
        words.append(f"losses differ by at most {found['largest_loss_difference']:.0e}")
    words.append(f"on our rows, {prepared.first_plan.fill:.1%} full (TRL's own packing: "
                 f"{found['trl_own_packing_fill']:.1%})")
    return "; ".join(words)
