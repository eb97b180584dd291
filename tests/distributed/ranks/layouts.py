"""Gradients and losses of the real training step on one layout, for tests/distributed/test_layouts.py.

    deepspeed --num_gpus 2 tests/distributed/ranks/layouts.py OUT_DIR ACCUMULATION STAGES

Runs every ZeRO stage of STAGES, a word such as 0123, on a small dense and a small MoE model: a few steps, and the
gradients of the first one.  Rank 0 writes OUT_DIR/<model>_<stage>.safetensors (gradients) and OUT_DIR/losses.json.
"""

import contextlib
import functools
import json
import os
import pathlib
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from minimind_ds.data.packing import collate  # noqa: E402
from minimind_ds.data.sample import Sample  # noqa: E402
from minimind_ds.distributed import deepspeed_compat, engine  # noqa: E402
from minimind_ds.distributed.world import read_world  # noqa: E402
from minimind_ds.model.decoder import MiniMindForCausalLM  # noqa: E402
from minimind_ds.model.loss import scaled_loss  # noqa: E402
from minimind_ds.training.build import build_engine  # noqa: E402
from minimind_ds.training.live import LiveRun  # noqa: E402
from minimind_ds.training.prepare import prepare  # noqa: E402
from minimind_ds.training.step import Position, fetch, train_step  # noqa: E402
from tests.routes import watched_routes  # noqa: E402

MODELS = {"dense": {}, "moe": {"use_moe": True, "moe_intermediate_size": 48}}
STEPS = 3
# Of the bundled samples; rows of twice as many, which fit worse, are sought for half a second at every case.
FEW = 400


def make_run(world, out: pathlib.Path, model: str, stage: int, accumulation: int, extra: list[str],
             dtype: str = "fp32", keys: dict | None = None, fields: dict | None = None):
    """A run on a tiny model; `keys` are added to the stage's DeepSpeed JSON, `fields` to the model's."""
    yaml = out / f"{model}_{world.rank}.yaml"
    fields = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 96, **MODELS[model], **(fields or {})}
    yaml.write_text("preset: debug\nmodel: " + json.dumps(fields), encoding="utf-8")
    ds = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text(encoding="utf-8"))
    path = out / f"stage_{world.rank}.json"
    path.write_text(json.dumps({**ds, **(keys or {})}), encoding="utf-8")
    # A scheduler that says its steps itself has no place for it.
    used = pathlib.Path(extra[extra.index("--deepspeed") + 1]) if "--deepspeed" in extra else path
    scheduler = json.loads(used.read_text(encoding="utf-8")).get("scheduler", {"params": {"warmup_num_steps": "auto"}})
    constant = ["--warmup_ratio", "0"] if scheduler["params"].get("warmup_num_steps") == "auto" else []
    data = [] if "--data_path" in extra else ["--data_path", str(few(out, world.rank))]
    return prepare("sft", ["--config", str(yaml), "--deepspeed", str(path), *data, "--save_dir", str(out / "run"),
                           "--cache_dir", str(out / "cache"), "--dtype", dtype, "--max_seq_len", "128", "--pack_len",
                           "128", "--batch_size", "2", "--learning_rate", "1e-2", "--accumulation_steps",
                           str(accumulation), *constant, *extra], world)


def few(out: pathlib.Path, rank: int, first: int = 0, count: int = FEW) -> pathlib.Path:
    """Some of the bundled samples, from a line on; the first rank to come writes them, none sees half of them."""
    path = out / "few.jsonl"
    if not path.exists():
        lines = (ROOT / "examples" / "sft_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        mine = out / f"few_{rank}.jsonl"
        mine.write_text("".join(lines[first:first + count]), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)
    return path


def full_gradients(ds_engine, stage: int) -> dict:
    """Collective: every parameter's gradient as the update would see it, unclipped."""
    from deepspeed.utils import safe_get_full_grad

    grads = {}
    for name, p in ds_engine.module.named_parameters():
        grad = safe_get_full_grad(p) if stage > 0 else p.grad
        grads[name] = grad.detach().float().cpu().clone()
    return grads


@contextlib.contextmanager
def watched_gradients(read):
    """What read(engine) gives of the gradients of the first step under `with`, before the trainer clips them."""
    clip, seen = deepspeed_compat.clip_gradients, {}

    def watched(ds_engine, most: float):
        if not seen:
            seen.update(read(ds_engine))
        return clip(ds_engine, most)

    deepspeed_compat.clip_gradients = watched
    try:
        yield seen
    finally:
        deepspeed_compat.clip_gradients = clip


def constant_rows(model: MiniMindForCausalLM) -> list[int]:
    """Tokens such that a row of nothing else sends all its tokens to one expert of the first layer, a new one each."""
    tokens = {}
    for token in range(300, 420):
        row = [Sample(torch.full((16,), token), torch.cat([torch.full((15,), token), torch.tensor([-100])]))]
        counts = model.train()(collate([row], 16)).expert_counts[0]
        if (counts == 16).any():
            tokens.setdefault(int(counts.argmax()), token)
    assert len(tokens) >= 3, tokens
    return list(tokens.values())


def idle_experts(prepared, ds_engine, reference, tokens: list[int]) -> float:
    """Largest gradient error when every micro-batch of every rank routes to another expert."""
    world, accumulation, batches = prepared.world, prepared.run.accumulation_steps, []
    for i in range(world.size * accumulation):
        token = tokens[i % 3]
        targets = torch.cat([torch.full((15,), tokens[(i + 1) % 3]), torch.tensor([-100])])
        batches.append(collate([[Sample(torch.full((16,), token), targets)]], 16))
    labelled, real = 15 * len(batches), 16 * len(batches)
    reference.zero_grad()
    for batch in batches:
        out = reference(batch)
        (out.loss_sum / labelled + out.aux_loss * batch.n_tokens / real).backward()
    for micro in range(accumulation):
        batch = batches[world.rank * accumulation + micro]
        out = ds_engine(batch)
        ds_engine.backward(scaled_loss(out.loss_sum, out.aux_loss, batch.n_tokens, step_labelled=labelled,
                                       step_real=real, dp_world=world.size), scale_wrt_gas=False)
        if ds_engine.is_gradient_accumulation_boundary():
            grads = full_gradients(ds_engine, prepared.stage)
        ds_engine.step()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    return max(((grads[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-6)).item() for n in expected)


def fresh_engine(prepared):
    ds_engine = build_engine(prepared)
    ds_engine.train()
    return ds_engine


def main(out: pathlib.Path, accumulation: int, stages: list[int]) -> None:
    world = read_world()
    engine.start(world)
    losses, tokens = {}, None
    for model in MODELS:
        for stage in stages:
            prepared = make_run(world, out, model, stage, accumulation, [])
            live = LiveRun(engine=fresh_engine(prepared))
            batches = fetch(prepared, 0, prepared.first_plan, range(STEPS))
            read = functools.partial(full_gradients, stage=stage)
            with watched_gradients(read) as grads, watched_routes() as gaps:
                lines = [train_step(prepared, live, prepared.first_plan, Position(step + 1, 0, step), batches).line()
                         for step in range(STEPS)]
            case = {"loss": [line["loss"] for line in lines], "aux": [line["aux_loss"] for line in lines],
                    "norm": [line["grad_norm"] for line in lines]}
            if model == "moe":
                torch.manual_seed(prepared.run.seed)
                reference = MiniMindForCausalLM(prepared.model_config, balance="row")
                tokens = tokens or constant_rows(reference)
                with watched_routes() as idle_gaps:
                    case["idle_expert_error"] = idle_experts(prepared, fresh_engine(prepared), reference, tokens)
                case["gaps"] = gaps + idle_gaps
            losses[f"{model}_{stage}"] = case
            if world.rank == 0:
                save_file(grads, out / f"{model}_{stage}.safetensors")
    if world.rank == 0:
        (out / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    engine.stop()


if __name__ == "__main__":
    # The launcher puts --local_rank somewhere among the arguments.
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(pathlib.Path(args[0]), int(args[1]), [int(stage) for stage in args[2]])
