"""Two steps of every YAML of examples/, made small, for tests/programs/test_examples.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/examples.py OUT_DIR

Each trains in OUT_DIR/<name>; what starts from weights starts from OUT_DIR/pretrain.
"""

import contextlib
import pathlib
import shutil
import sys

import torch.distributed as dist
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds.distributed import engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.resilience.signals import Stopped  # noqa: E402
from minimind_ds.training import loop  # noqa: E402
from minimind_ds.training.live import LiveRun  # noqa: E402
from minimind_ds.training.prepare import prepare  # noqa: E402
from minimind_ds.training.resume import find_resume_point  # noqa: E402

EXAMPLES = ROOT / "examples"
# Those that start from others' weights or checkpoints come after them.
ORDER = ("pretrain", "sft", "lora", "resume_elsewhere", "moe_experts", "long_sequences", "offload")
FROM_WEIGHTS = ("sft", "lora", "resume_elsewhere")
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "moe_intermediate_size": 48}


def smaller(name: str, out: pathlib.Path) -> dict:
    """The YAML with a small model, short rows and two steps; all else as it stands."""
    values = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    kind = "debug-moe" if values["preset"].endswith("moe") else "debug"
    small = {key: size for key, size in SMALL.items() if kind == "debug-moe" or not key.startswith("moe")}
    values |= {"preset": kind, "model": {**small, **values.get("model", {})}, "max_seq_len": 128, "pack_len": 256,
               "batch_size": 2, "max_steps": 2, "dtype": "fp32", "save_dir": str(out / name), "cache_dir":
               str(out / "cache")}
    values |= {key: str(ROOT / values[key]) for key in ("data_path", "eval_path") if key in values}
    if name in FROM_WEIGHTS:
        values["from_weight"] = str(out / "pretrain")
    # The other run of the pair stops half-way and has twice the rows in a micro-batch.
    values |= {"stop_after": 1} if name == "sft" else {}
    values |= {"batch_size": 1, "accumulation_steps": 2} if name == "resume_elsewhere" else {}
    return values


def train(world, out: pathlib.Path, name: str) -> None:
    path = out / f"{name}_{world.rank}.yaml"
    path.write_text(yaml.safe_dump(smaller(name, out)), encoding="utf-8")
    if name == "resume_elsewhere" and world.rank == 0:
        shutil.copytree(out / "sft", out / name)
    dist.barrier()
    prepared, live = prepare("pretrain" if name == "pretrain" else "sft", ["--config", str(path)], world), LiveRun()
    with contextlib.suppress(Stopped):
        loop.train(prepared, live, find_resume_point(prepared, live))


if __name__ == "__main__":
    out, world = pathlib.Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))), read_world()
    engine.start(world)
    for name in ORDER:
        train(world, out, name)
    engine.stop()
