"""launch/verify.py's report for many runs, some with a law broken on purpose, for tests/verify/test_verify.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/verify_broken.py OUT_DIR CASES

CASES is a JSON list of {name, flags, model, breaks}; `model` are fields of a tiny model, `breaks` is a function of
minimind_ds.verify.faults and its arguments, or null.  Rank 0 writes OUT_DIR/<name>.json.
"""

import contextlib
import functools
import json
import pathlib
import sys

import torch
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds import verify  # noqa: E402
from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.verify import faults, laws, operations  # noqa: E402
from minimind_ds.verify.reduced_run import make_reduced_run  # noqa: E402
from tests.routes import watched_routes  # noqa: E402

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96}


def watched(gaps: list[float], law, b) -> list:
    with watched_routes() as found:
        checks = law(b)
    gaps += found
    return checks


def main(out: pathlib.Path, cases: list[dict]) -> None:
    world = read_world()
    engine.start(world)
    torch.manual_seed(0)
    # A quarter of the elements, for the time it takes.
    operations.LEAST = 2**16
    layout_law = laws.LAWS["layout"]
    for case in cases:
        # Of all laws' samples, in fp32 whatever the run's precision.
        gaps = []
        laws.LAWS["layout"] = functools.partial(watched, gaps, layout_law)
        yaml = out / f"{case['name']}_{world.rank}.yaml"
        yaml.write_text("preset: debug\nmodel: " + json.dumps({**TINY, **case["model"]}), encoding="utf-8")
        argv = ["--config", str(yaml), "--save_dir", str(out / case["name"]), "--cache_dir", str(out / "cache"),
                "--tokens", "200", "--samples", "3", *case["flags"]]
        options, rest = verify.parse(argv)
        prepared, kind = verify.prepare_run(rest, world)
        name, *how = case["breaks"] or [None]
        with getattr(faults, name)(*how) if name else contextlib.nullcontext():
            reduced = make_reduced_run(prepared, options.tokens)
            report = verify.verify(prepared, kind, reduced, options, verify.print_on(world))
        if world.rank == 0:
            (out / f"{case['name']}.json").write_text(json.dumps({**report, "gaps": gaps}))
    dist.barrier()
    engine.stop()


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(pathlib.Path(args[0]), json.loads(args[1]))
