"""The plan of a run, for people: every ZeRO stage side by side, and which file of ds_configs/ to start with.

    python launch/plan.py --preset minimind-3 --ranks 8 --memory 80
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch

from minimind_ds import kernels
from minimind_ds.config import deepspeed_json, program_flags
from minimind_ds.config.errors import UserError, one_line
from minimind_ds.config.precision import DTYPES
from minimind_ds.config.run import RunConfig, parse_run_config
from minimind_ds.config.untrusted import shown
from minimind_ds.data.tokenizer import load_tokenizer
from minimind_ds.distributed import sequence_parallel
from minimind_ds.distributed.deepspeed_compat import choose_accelerator
from minimind_ds.distributed.engine import start, stop
from minimind_ds.distributed.world import alone, free_port, read_world
from minimind_ds.model import memory_model
from minimind_ds.model.decoder import kernel_requirements
from minimind_ds.model.memory_model import GIB, Setting
from minimind_ds.paths import DS_CONFIGS, LAUNCH
from minimind_ds.plan import hardware, measure, time_report
from minimind_ds.terminal import columns, count, wrap
from minimind_ds.training import starting_weights
from minimind_ds.training.prepare import PROGRAMS, choose, choose_lora, prepare

# Below so many tokens a GPU waits for its kernels to be launched.
ENOUGH_TOKENS = 32_768
MOST_RANKS = 1 << 20
STAGES = ("zero0", "zero1", "zero2", "zero3")
# When no stage fits: what leaves the device next.
OFFLOADED = ("zero2_offload", "zero3_offload", "zero3_offload_param")
# What is not counted: temporaries of single operations, fragments, the libraries' own.
SPARE = 0.15


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    options, rest = program_flags.plan().parse_known_args(argv)
    if not 1 <= options.ranks <= MOST_RANKS:
        raise UserError(f"--ranks is {shown(options.ranks)}; it must be at least 1, at most {MOST_RANKS:,}")
    if not 0 <= options.memory < float("inf") or not 0 <= options.labelled <= 1:
        name = "labelled" if 0 <= options.memory < float("inf") else "memory"
        raise UserError(f"--{name} is {getattr(options, name)}; it must be "
                         + ("at least 0, and finite" if name == "memory" else "between 0 and 1"))
    time_report.check(options)
    return options, rest


def main(argv: list[str]) -> int:
    """The whole of launch/plan.py.  Returns the exit code."""
    try:
        options, rest = parse(argv)
        choose_accelerator(alone().device)
        if options.child:
            return measure_here(pathlib.Path(options.child), rest)
        run = parse_run_config(rest, "sft", PROGRAMS["sft"])
        files = files_of(run)
        settings = {name: setting(path, run, options) for name, path in files.items()}
        memory = device_memory(options) * GIB
        plans = {name: plan(s, memory) for name, s in settings.items()}
        advice = recommend(settings, plans, run, options, memory)
        assumed = not (options.memory or options.gpu or torch.cuda.is_available())
        for line in [*table(settings, plans, memory, assumed), advice["line"],
                     *time_report.lines_of(settings, plans, run, options)]:
            print(wrap(line))
        measured = compare_with_run(files, rest, options.ranks) if options.measure else {}
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"memory": memory, "ranks": options.ranks, "plans": plans, "recommended": advice,
                          "off": measured}))
    return 0


def device_memory(options: argparse.Namespace) -> float:
    """GiB as asked for, of --gpu, of this machine's, or of a common one."""
    if options.memory or options.gpu:
        return options.memory or hardware.sheet_of(options.gpu)[0].memory / GIB
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 80.0


def shipped(name: str) -> str:
    return str(DS_CONFIGS / f"{name}.json")


def files_of(run: RunConfig) -> dict[str, str]:
    """Every stage's own file, and the user's beside them."""
    files = {name: shipped(name) for name in STAGES}
    if run.deepspeed:
        path = pathlib.Path(run.deepspeed)
        if path.resolve().as_posix() not in (pathlib.Path(p).resolve().as_posix() for p in files.values()):
            files[path.stem if path.stem not in files else path.name] = run.deepspeed
    return files


def setting(path: str, run: RunConfig, options: argparse.Namespace) -> Setting:
    """A file's run, resolved as the trainer does; nothing is read but flags, tokenizer, JSON and the
    vocabulary of starting weights that are there already.

    Raises:
        ValueError: one line about a mistake in them.
    """
    if options.gpu and run.dtype is None:
        run = run.replace(dtype="bf16")
    run, _ = choose(run.replace(deepspeed=path), alone())
    if run.from_weight == "none" or pathlib.Path(run.from_weight).exists():
        run, _, config, _ = starting_weights.tokenizer_and_model(run)
    else:
        config = run.model_config(load_tokenizer(run.tokenizer).vocab_size)
    run, adapters = choose_lora(run, config)
    raw = deepspeed_json.read(run)
    deepspeed_json.check_keys(path, raw)
    dims = sequence_parallel.read_dims(path, raw, options.ranks)
    ds, run = deepspeed_json.resolve(raw, run, config, ranks=max(1, options.ranks // dims.sequence), total_steps=0)
    sequence_parallel.check(dims, config, ranks=options.ranks, row_tokens=run.batch_size * run.row_len,
                   stage=deepspeed_json.stage_of(ds), path=path)
    on_cpu = not torch.cuda.is_available() and not options.memory and not options.gpu
    active = kernels.resolve(run.kernels, "cpu", DTYPES[run.dtype],
                             kernel_requirements(config)).activations.itemsize if on_cpu \
        else None
    return Setting(config=config, ds=ds, dtype=run.dtype, ranks=options.ranks, row_len=run.row_len,
                   rows=run.batch_size, accumulation=run.accumulation_steps, labelled=options.labelled,
                   activations=active, on_cpu=on_cpu, dims=dims, adapters=adapters,
                   recompute=run.gradient_checkpointing)


def plan(s: Setting, memory: float) -> dict:
    """Bytes of a rank at this setting's micro-batch, and the largest micro-batch that fits."""
    held = memory_model.states(s)
    return {"stage": s.stage, "states": held["device"], "host": held["host"],
            "activations": memory_model.activations(s),
            "gathered": memory_model.gathered(s), "peak": memory_model.peak(s), "sent": memory_model.sent(s),
            "most_rows": memory_model.most_rows(s, memory * (1 - SPARE))}


def recommend(settings: dict, plans: dict, run: RunConfig, options: argparse.Namespace, memory: float) -> dict:
    """The lowest stage whose rows are enough, then whatever holds most of them, then offloading; and why."""
    row_len = next(iter(settings.values())).row_len
    enough = max(run.batch_size, min(ENOUGH_TOKENS // row_len, 64))
    for name in STAGES:
        if plans[name]["most_rows"] >= enough:
            return {"file": f"ds_configs/{name}.json", "line": because(name, settings, plans, options)}
    best = max(STAGES, key=lambda name: plans[name]["most_rows"])
    rows = plans[best]["most_rows"]
    if rows:
        return {"file": f"ds_configs/{best}.json", "line": f"recommended: ds_configs/{best}.json: it holds the most "
                f"rows, {rows}; --accumulation_steps makes up for more, --gradient_checkpointing makes room"}
    for name in OFFLOADED:
        s = setting(shipped(name), run, options)
        plans[name] = plan(s, memory)
        if plans[name]["most_rows"]:
            return {"file": f"ds_configs/{name}.json", "line": f"recommended: ds_configs/{name}.json: no stage holds "
                    f"one row of {row_len} tokens in {memory / GIB:.1f} GiB, and this leaves "
                    f"{sum(plans[name]['host'].values()) / GIB:.1f} GiB a rank on the host"}
    return {"file": None, "line": f"nothing fits: one row of {row_len} tokens needs more than {memory / GIB:.1f} GiB "
            "even with everything offloaded; --gradient_checkpointing, a smaller --pack_len or model, more --ranks"}


def because(name: str, settings: dict, plans: dict, options: argparse.Namespace) -> str:
    chosen, rows = plans[name], plans[name]["most_rows"]
    tokens = rows * settings[name].row_len
    line = f"recommended: ds_configs/{name}.json: {rows:,} rows a micro-batch fit ({tokens:,} tokens)"
    if options.ranks == 1:
        return line + "; on one rank there is nothing to shard"
    if name != "zero0":
        lower = STAGES[STAGES.index(name) - 1]
        return line + f", of {lower}.json {plans[lower]['most_rows']}"
    spared = sum(chosen["states"].values()) - min(sum(plans[n]["states"].values()) - plans[n]["states"]["buckets"]
                                                 for n in STAGES)
    more = sum(plans["zero3"]["sent"].values()) / max(sum(chosen["sent"].values()), 1)
    return line + (f"; sharding does not pay: it would free at most {spared / GIB:.2f} GiB of "
                   f"{device_memory(options):.0f}, and stage 3 sends {more:.1f} x the bytes")


def table(settings: dict, plans: dict, memory: float, assumed: bool) -> list[str]:
    s = next(iter(settings.values()))
    kind = "experts" if s.config.use_moe else "mlp"
    size = sum(part.total for part in memory_model.trained_parts(s)) + sum(memory_model.frozen(s))
    rows = {name: [] for name in ("parameters", "optimizer", "gradients", "buckets", "gathered", "attention", kind,
                                  "rest", "logits", "peak", "host", "sent a step", "most rows")}
    for p in plans.values():
        made, held = p["activations"], p["states"]
        rest = made["rest"] + made.get("copies of weights", 0)
        values = [*held.values(), p["gathered"], made["attention"], made[kind], rest, made["logits"], p["peak"],
                  sum(p["host"].values()), sum(p["sent"].values())]
        for row, cell in zip(rows.values(), [*(f"{value / GIB:.3f}" for value in values), f"{p['most_rows']:,}"]):
            row.append(cell)
    return [f"model: {size / 1e6:.1f} M parameters, {s.dtype}, {count(s.ranks, 'rank')}",
            f"micro-batch: {s.rows} x {s.row_len} tokens, {s.labelled:.0%} labelled",
            f"memory: {memory / GIB:.1f} GiB a device{', assumed (--memory)' * assumed}, {SPARE:.0%} kept free; "
            "in GiB a rank:",
            *columns(list(plans), rows.items())]


def compare_with_run(files: dict[str, str], rest: list[str], ranks: int) -> dict:
    """Runs a step of each file under the launcher and prints how far off the plan is; {file: {kind: share}}.

    Raises:
        ValueError: the run failed; the message is its last line.
    """
    launcher = pathlib.Path(sys.executable).with_name("deepspeed")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(launcher), "--num_gpus", str(ranks), "--master_port", str(free_port()),
                   str(LAUNCH / "plan.py"), "--child", folder, *rest, "--save_dir", folder]
        (pathlib.Path(folder) / "files.json").write_text(json.dumps(files))
        done = subprocess.run(command, text=True, capture_output=True)
        results = [pathlib.Path(folder) / f"rank{rank}.json" for rank in range(ranks)]
        if done.returncode or not all(path.exists() for path in results):
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise UserError(said[0].removeprefix("error: ") if said else
                             f"the measuring run ended with {done.returncode}: {done.stderr[-300:]}")
        by_rank = [json.loads(path.read_text()) for path in results]
    for name in files:
        off = [measure.compare(rank[name]) for rank in by_rank]
        # Planned is the rank that holds most.
        found[name] = {kind: min(o[kind] for o in off) for kind in off[0]}
        said = ", ".join(f"{kind} {share:+.1%}" for kind, share in found[name].items())
        print(wrap(f"plan against run, {name}: {said}"))
    return found


def measure_here(folder: pathlib.Path, rest: list[str]) -> int:
    """What the launcher runs: a step of every file on this rank."""
    world = read_world()
    files, found = json.loads((folder / "files.json").read_text()), {}
    runs = {name: prepare("sft", rest, world, deepspeed=path) for name, path in files.items()}
    start(world)
    for name, prepared in runs.items():
        found[name] = measure.measure(prepared)
    measure.write(folder / f"rank{world.rank}.json", found)
    stop()
    return 0
