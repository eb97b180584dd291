"""Training on the device at hand: do our kernels agree with PyTorch's, and how fast is the trainer's own step?

    python -m minimind_ds.bench.gpu OUT_DIR --parts agreement,throughput,stages
"""

from __future__ import annotations

import functools
import gc
import json
import pathlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from minimind_ds import kernels
from minimind_ds.bench import supervise
from minimind_ds.bench.kernels import cases, curve, long_data
from minimind_ds.bench.kernels.contenders import OPS
from minimind_ds.bench.kernels.items import Item, Setting, check
from minimind_ds.bench.kernels.measure import short
from minimind_ds.bench.throughput import cell, ratios, trace
from minimind_ds.convert import minimind
from minimind_ds.data.tokenizer import load_tokenizer
from minimind_ds.distributed import engine
from minimind_ds.distributed.world import World, read_world
from minimind_ds.model.decoder import MiniMindForCausalLM
from minimind_ds.paths import DS_CONFIGS

# An operation of the checks and the door's that it stands for.
DOOR = {"attention": "attention", "moe": "moe", "router": "router", "qk_norm_rope": "rope", "rms_norm": "elementwise",
        "add_rms_norm": "elementwise", "swiglu": "elementwise", "head_loss": "elementwise"}
# Rows, and how many are timed: length x rows x micro-batches.
ROWS = ("4096x8x1", "4096x16x1", "4096x16x4")
SMALL_ROWS = ("768x1x1",)
# Loss and gradients' norm of one step against PyTorch's operations in fp32, relative.
AGREE = 2e-2


def items(part: str, name: str, setting: Setting, folder: pathlib.Path) -> Iterator[Item]:
    if part == "agreement" and name == "operations":
        for op in DOOR:
            yield Item(f"{op} bf16", functools.partial(operation, op, setting))
    elif part == "agreement":
        yield Item(f"{name} model bf16", functools.partial(model, name == "mixture", setting))
    elif part == "stages":
        yield from stages(setting, folder)
    else:
        yield from throughput(name, setting, folder)


# ------------------------------------------------------------------------------------------------ agreement

def operation(op: str, setting: Setting) -> dict:
    """Our kernel against fp64 at the model's widths: few tokens, so that an answer comes within seconds."""
    size = cases.SMALL if setting.small else replace(cases.MINIMIND3, T=2048, N=1024)
    record = check("triton", OPS[op]["triton"], getattr(cases, op)(size, torch.bfloat16, setting.device))
    return {**record, "door": DOOR[op]}


def model(use_moe: bool, setting: Setting) -> dict:
    """One step of the whole model in bf16: loss and gradients' norm with our kernels, and with PyTorch's in fp32."""
    name, config, _, rows, row_len = curve.setting_of(setting.small, use_moe)
    config = replace(config, vocab_size=max(config.vocab_size, load_tokenizer().vocab_size))
    batch, = curve.batches(config, 1, rows, row_len)
    found = {}
    for spec, dtype in (("triton,activations=native", torch.bfloat16), ("sdpa", torch.float32)):
        torch.manual_seed(0)
        net = MiniMindForCausalLM(config, spec).to(setting.device, dtype).train()
        out = net(batch.to(setting.device))
        (out.loss_sum / out.n_labelled + out.aux_loss).backward()
        norm = torch.stack([p.grad.double().norm() for p in net.parameters()]).norm()
        found[spec] = (out.loss_sum.item() / out.n_labelled, norm.item())
    ours, exact = found.values()
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours, exact))
    return {"op": "model", "case": f"{name}, {rows} rows of {row_len}", "dtype": "bf16", "contender": "triton",
            "ours": True, "status": "right" if apart <= AGREE else "wrong", "bound": AGREE,
            "largest_relative_difference": apart, "loss_and_norm": {"triton bf16": ours, "sdpa fp32": exact}}


def kernels_to_train_with(folder: pathlib.Path) -> str:
    """A specification without the kernels that did not agree with the reference here: those are not timed."""
    wrong = set()
    for path in folder.glob("agreement.*.json"):
        for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
            if record["status"] in supervise.BAD:
                # Of a model it is not known which operation is wrong.
                wrong |= {record["door"]} if record.get("door") else set(kernels.OPS) * (record["op"] == "model")
    return ",".join(f"{op}={'sdpa' if op in wrong else 'auto'}" for op in kernels.OPS)


# ------------------------------------------------------------------------------------------------ throughput

def flags_of(preset: str, rows: str, folder: pathlib.Path, setting: Setting) -> list[str]:
    """launch/sft.py's, of a measurement on made conversations of about 300 tokens."""
    data = folder / "conversations.jsonl"
    if not data.exists():
        long_data.main(str(data))
    length, batch, accumulation = rows.split("x")
    return ["--preset", preset, "--data_path", str(data), "--save_dir", str(folder / "run"), "--cache_dir",
            str(folder / "cache"), "--pack_len", length, "--batch_size", batch, "--accumulation_steps", accumulation,
            "--max_seq_len", "768", "--dtype", "fp32" if setting.small else "bf16", "--kernels",
            kernels_to_train_with(folder)]


def zero(stage: int) -> list[str]:
    return ["--deepspeed", str(DS_CONFIGS / f"zero{stage}.json")]


def preset_of(name: str, setting: Setting) -> str:
    return ("debug" if setting.small else "minimind-3") + "-moe" * (name == "mixture")


@functools.cache
def started() -> World:
    world = read_world()
    engine.start(world)
    return world


def throughput(name: str, setting: Setting, folder: pathlib.Path) -> Iterator[Item]:
    """The trainer's own step at stage 1, rows of several sizes, then a profile of it; or MiniMind's padded loop."""
    preset, rows = preset_of(name, setting), SMALL_ROWS if setting.small else ROWS
    if name == "padded":
        for kind in ("dense", "mixture"):
            yield Item(f"padded {kind}", functools.partial(padded, preset_of(kind, setting), setting, folder))
        return
    for one in rows:
        yield Item(f"{preset} {one}", functools.partial(packed, preset, one, setting, folder))
    yield Item(f"profile {preset} {rows[-1 if setting.small else 1]}", functools.partial(
        profile, preset, rows[-1 if setting.small else 1], setting, folder))


def packed(preset: str, rows: str, setting: Setting, folder: pathlib.Path) -> dict:
    prepared = cell.prepare_cell([*flags_of(preset, rows, folder, setting), *zero(1)], started())
    found = cell.run(prepared, warm_up=1 if setting.small else 4, steps=2 if setting.small else 12)
    gc.collect()
    return {"op": "throughput", "case": f"{preset}, stage 1, {rows}", "ours": True, "status": "right", **found}


def padded(preset: str, setting: Setting, folder: pathlib.Path) -> dict:
    """MiniMind's own loop: one sample a row, padded to 768, autocast."""
    rows = "768x64x1" if not setting.small else "768x1x1"
    prepared = cell.prepare_cell([*flags_of(preset, rows, folder, setting), *zero(0)], started())
    torch.manual_seed(0)
    loop = ratios.padded_loop(prepared, prepared.run.dtype, prepared.run.batch_size, 768,
                              dict(minimind.fresh(prepared.model_config)))
    found = ratios.measure([loop], 1 if setting.small else 3, 1 if setting.small else 8, setting.device,
                           lambda text: None)[loop.name]
    return {"op": "throughput", "case": f"{preset}, MiniMind's padded loop, {rows}", "ours": True, "status": "right",
            **found}


def profile(preset: str, rows: str, setting: Setting, folder: pathlib.Path) -> dict:
    """Every kernel of a step by its time, and how much of the step no kernel ran; the trace lies in `folder`."""
    target = folder / f"profile_{preset}"
    lines = trace.run([*flags_of(preset, rows, folder, setting), *zero(1)], started(), target,
                      warm_up=1 if setting.small else 3, steps=2, top=60)
    print("\n".join(lines[:24]), flush=True)
    return {"op": "profile", "case": f"{preset}, stage 1, {rows}", "ours": True, "status": "right",
            **json.loads((target / "summary.json").read_text(encoding="utf-8"))}


def stages(setting: Setting, folder: pathlib.Path) -> Iterator[Item]:
    """Each ZeRO stage against PyTorch alone, in turns, on the same batches."""
    rows = SMALL_ROWS[0] if setting.small else ROWS[1]
    for stage in range(4):
        yield Item(f"stage {stage}", functools.partial(of_plain, stage, rows, setting, folder))


def of_plain(stage: int, rows: str, setting: Setting, folder: pathlib.Path) -> dict:
    started()
    found = ratios.compare_engines(flags_of(preset_of("dense", setting), rows, folder, setting),
                                   files=[zero(stage)[1]], ddp=False, warm_up=1 if setting.small else 3,
                                   steps=2 if setting.small else 10, say=lambda text: None)
    (name, pair), = found["pairs"].items()
    return {"op": "stages", "case": f"{name}, {rows}", "dtype": short(torch.bfloat16), "ours": True,
            "status": "right", **pair}
