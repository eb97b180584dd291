"""A mixture of three files of three shapes, killed and gone on with on another number of ranks.

    python -m pytest tests/training/test_mixture.py
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest

from minimind_ds.config.run import parse_run_config
from minimind_ds.data.tokenizer import load_tokenizer
from minimind_ds.training.prepare import open_data, plan_epoch
from tests.conftest import ROOT, environment, free_port
from tests.waiting import HANG_S, until

ROWS_PER_STEP, SHARES, SIZES, EPOCHS = 4, {"a": 1, "b": 2, "c": 0.5}, {"a": 90, "b": 41, "c": 61}, 2


def record(shape: str, number: int) -> dict:
    asked, answer = f"Number {number} of {shape}?", f"{shape} {number}, " * (1 + number % 9)
    return {"a": {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]},
            "b": {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]},
            "c": {"instruction": asked, "input": "", "output": answer}}[shape]


def write_config(folder, shares: dict) -> list[str]:
    """The run file, and the command line that all starts of the run share."""
    sources = [{"path": str(folder / f"{name}.jsonl"), "share": share} for name, share in shares.items()]
    (folder / "run.yaml").write_text(json.dumps({
        "preset": "debug", "data_path": sources, "eval_fraction": 0.1, "eval_interval": 5, "epochs": EPOCHS,
        "max_seq_len": 96, "pack_len": 96, "save_interval": 3, "dtype": "fp32", "cache_dir": str(folder / "cache"),
        "save_dir": str(folder / "run"),
        "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                  "intermediate_size": 64}}))
    zero2 = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    (folder / "ds.json").write_text(json.dumps({**zero2, "dataloader_drop_last": True}))
    return ["--config", str(folder / "run.yaml"), "--deepspeed", str(folder / "ds.json"), "--batch_size", "1"]


def start(folder, ranks: int) -> list[subprocess.Popen]:
    words = [*write_config(folder, SHARES), "--accumulation_steps", str(ROWS_PER_STEP // ranks)]
    port, log = str(free_port()), (folder / "log").open("a")
    return [subprocess.Popen([sys.executable, str(ROOT / "launch" / "sft.py"), *words], cwd=ROOT, stdout=log,
                             stderr=log, start_new_session=True, env=environment(
                                 RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                                 LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
            for rank in range(ranks)]


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 2 ranks that was killed half-way and finished by one rank."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, size in SIZES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record(name, i)) + "\n" for i in range(size)))
    ranks, metrics = start(folder, 2), folder / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 8, "step 8", ranks, folder / "log")
    for p in ranks:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
    codes = [p.wait(timeout=HANG_S) for p in start(folder, 1)]
    assert codes == [0], (folder / "log").read_text()[-4000:]
    return folder


def test_each_sample_was_seen_exactly_as_often_as_its_share_says(finished):
    run = parse_run_config([*write_config(finished, SHARES), "--accumulation_steps", "2"], "sft", {})
    stores, held_out = open_data("conversations", run, load_tokenizer(None))
    steps, seen = [line for line in lines_of(finished) if "loss" in line], Counter()
    assert "resuming from" in (finished / "log").read_text()
    done = iter(steps)
    for epoch, store in enumerate(stores):
        plan = plan_epoch(store, run, 2, epoch)
        for step in range(len(plan)):
            facts, line = plan.facts(step), next(done)
            assert (line["epoch"], line["tokens"], line["labelled_tokens"]) == (epoch, facts.n_tokens,
                                                                                facts.n_labelled)
            indices = [i for row in plan.rows(step) for i in row]
            seen.update((store.sources[of].name, int(line)) for of, line in
                        zip(store.source_of(indices), store.lines[indices]))
    assert next(done, None) is None and [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    held = Counter((held_out.sources[of].name, int(line)) for of, line in
                   zip(held_out.source_of(range(len(held_out))), held_out.lines))
    assert set(held.values()) == {1} and not held.keys() & seen.keys()
    expected = {(name, line): int(SHARES[name] * EPOCHS) for name, size in SIZES.items() for line in
                range(1, size + 1) if (name, line) not in held}
    assert seen == expected


def test_metrics_say_what_each_source_gives_and_how_it_is_learnt(finished):
    first, *rest = lines_of(finished)
    assert [row["name"] for row in first["data"]] == ["a", "b", "c"]
    assert [row["share"] for row in first["data"]] == [1, 2, 0.5]
    assert sum(row["share_of_labels"] for row in first["data"]) == pytest.approx(1)
    assert any("ds.json: dataloader_drop_last has no effect" in note for note in first["notes"])
    evals = [line for line in rest if "eval_loss" in line]
    assert evals
    for line in evals:
        parts = [line[f"eval_loss/{name}"] for name in SHARES]
        assert min(parts) < line["eval_loss"] < max(parts)
    said = (finished / "log").read_text()
    assert "data: 3 sources" in said and "b.jsonl: share 2, " in said


@pytest.mark.parametrize("shares, said", [
    ({"a": 1, "b": 1, "c": 0.5}, "b.jsonl with share 2, this run with 1"),
    ({"a": 1, "b": 2}, "it read c.jsonl, which this run does not"),
])
def test_a_resume_with_other_sources_is_refused_by_name(finished, shares, said):
    words = [*write_config(finished, shares), "--accumulation_steps", "4"]
    before = lines_of(finished)
    done = subprocess.run([sys.executable, "launch/sft.py", *words], cwd=ROOT, env=environment(), capture_output=True,
                          text=True, timeout=HANG_S)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and said in errors[0], done.stderr
    assert lines_of(finished) == before
