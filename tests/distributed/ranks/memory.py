"""What each rank holds at every ZeRO stage, for tests/plan/test_memory.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/memory.py OUT_DIR
"""

import json
import pathlib
import sys

import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.model import memory_model  # noqa: E402
from minimind_ds.model.loss import scaled_loss  # noqa: E402
from minimind_ds.plan import counted  # noqa: E402
from minimind_ds.plan import measure as plan_check  # noqa: E402
from minimind_ds.training.step import fetch  # noqa: E402
from tests.distributed.ranks.layouts import fresh_engine, make_run  # noqa: E402


def measure(prepared) -> dict:
    """Bytes before the step, when gradients are reduced, and after it; and the plan."""
    ds_engine, facts = fresh_engine(prepared), prepared.first_plan.facts(0)
    batch = next(fetch(prepared, 0, prepared.first_plan, range(1)))
    out = ds_engine(batch)
    ds_engine.backward(scaled_loss(out.loss_sum, out.aux_loss, batch.n_tokens, step_labelled=facts.n_labelled,
                                   step_real=facts.n_tokens, dp_world=prepared.world.size), scale_wrt_gas=False)
    before = counted.held(ds_engine)
    ds_engine.step()
    sizes = [getattr(p, "ds_numel", p.numel()) for p in ds_engine.module.parameters()]
    states = memory_model.states(plan_check.setting(prepared, labelled=0.0))["device"]
    return {"planned": states, "before": before, "after": counted.held(ds_engine), "parameters": sum(sizes),
            "largest": max(sizes)}


def main(out: pathlib.Path) -> None:
    world = read_world()
    engine.start(world)
    found = {}
    for dtype in ("fp32", "bf16"):
        for stage in range(4):
            # Nothing is small enough to stay whole at stage 3; buckets as large as the model.
            keys = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 200_000,
                                          **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}}
            prepared = make_run(world, out, "dense", stage, 1, [], dtype=dtype, keys=keys)
            found[f"{dtype}_{stage}"] = measure(prepared)
    (out / f"rank{world.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    engine.stop()


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    main(pathlib.Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
