"""Gradients, losses and final weights under sequence and expert parallelism, for tests/distributed/test_parallel.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/parallel.py OUT_DIR CASES

CASES is a JSON list of {name, model, stage, accumulation, sequence, experts, flags, fields, keys, file, steps};
DEFAULTS fills in what is left out; `file` stands for a whole DeepSpeed JSON.  Rank 0 writes the first step's gradients
to OUT_DIR/<name>_grad.safetensors, the last weights to OUT_DIR/<name>_weights.safetensors and the curves to
OUT_DIR/cases.json.
"""

import functools
import json
import pathlib
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.training.live import LiveRun  # noqa: E402
from minimind_ds.training.step import Position, evaluate, fetch, train_step  # noqa: E402
from tests.distributed.ranks.layouts import few, fresh_engine, full_gradients, make_run, watched_gradients  # noqa: E402
from tests.routes import watched_routes  # noqa: E402

# Of the samples whose tokens, in the first steps, all stand clear of a second expert.
FIRST, COUNT = 1200, 800
DEFAULTS = {"accumulation": 1, "sequence": 1, "experts": 1, "flags": ["--eval_fraction", "0.02"], "fields": {},
            "keys": {}, "file": None, "steps": 4}


def keys_of(case: dict) -> dict:
    keys = {}
    if case["sequence"] > 1:
        keys["sequence_parallel_size"] = case["sequence"]
    if case["experts"] > 1:
        keys["expert_parallel"] = {"enabled": True, "autoep_size": case["experts"], "preset_model": "qwen3_moe"}
    return {**keys, **case["keys"]}


def whole_gradients(ds_engine, case: dict) -> dict:
    grads = full_gradients(ds_engine, case["stage"])
    if case["experts"] > 1:
        from minimind_ds.distributed.expert_parallel import whole

        grads = {name: whole(p, grads[name]) for name, p in ds_engine.module.named_parameters()}
    return grads


def run_case(world, out: pathlib.Path, case: dict) -> dict:
    flags = case["flags"]
    if "--data_path" not in flags:
        flags = [*flags, "--data_path", str(few(out, world.rank, FIRST, COUNT))]
    if case["file"]:
        path = out / f"file_{world.rank}.json"
        path.write_text(json.dumps(case["file"]))
        flags = [*flags, "--deepspeed", str(path)]
    prepared = make_run(world, out, case["model"], case["stage"], case["accumulation"], flags, keys=keys_of(case),
                        fields=case["fields"])
    assert prepared.stage == case["stage"]
    live, plan = LiveRun(engine=fresh_engine(prepared)), prepared.first_plan
    batches = fetch(prepared, 0, plan, range(case["steps"]))
    with watched_gradients(functools.partial(whole_gradients, case=case)) as grads, watched_routes() as gaps:
        lines = [train_step(prepared, live, plan, Position(step + 1, 0, step), batches).line()
                 for step in range(case["steps"])]
    if world.rank == 0:
        save_file(grads, out / f"{case['name']}_grad.safetensors")
    found = {"loss": [line["loss"] for line in lines], "aux": [line["aux_loss"] for line in lines],
             "norm": [line["grad_norm"] for line in lines], "labelled": [line["labelled_tokens"] for line in lines],
             "gaps": gaps}
    if prepared.eval_sets:
        found["eval"] = evaluate(prepared, live)["eval_loss"]
    final = engine.full_weights(live.engine, prepared.stage)
    if world.rank == 0:
        save_file(final, out / f"{case['name']}_weights.safetensors")
    return found


def main(out: pathlib.Path, cases: list[dict]) -> None:
    world = read_world()
    engine.start(world)
    torch.manual_seed(0)
    found = {case["name"]: run_case(world, out, {**DEFAULTS, **case}) for case in cases}
    if world.rank == 0:
        (out / "cases.json").write_text(json.dumps(found))
    dist.barrier()
    engine.stop()


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(pathlib.Path(args[0]), json.loads(args[1]))
