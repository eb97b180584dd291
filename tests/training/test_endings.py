"""How a run ends, and how it goes on from there: at its end, by plan, early, longer; what stays of it.

Real ranks, except where only the start of a run is asked; the undisturbed run and the disturbed one must be the same
run, bit for bit (law 7).
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from minimind_ds import terminal
from minimind_ds.config.run import parse_run_config
from minimind_ds.distributed.world import World
from minimind_ds.training.evaluations import Evaluations, perplexity, recorded
from minimind_ds.training.prepare import prepare
from minimind_ds.training.resume import look_for_resume_point
from tests.checkpoint.test_resume import MODEL, Run, curve, weights
from tests.conftest import cache_dir

pytestmark = pytest.mark.numeric

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
# Steps of an epoch of the data below, on two rows a step.
EPOCH = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings")
    (folder / "run.yaml").write_text("preset: debug\nmodel: " + json.dumps(MODEL))
    with (folder / "data.jsonl").open("w") as file:
        for i in range(62):
            file.write(json.dumps({"prompt": f"{i}?", "completion": f"{i}, " * (1 + i % 5)}) + "\n")
    return folder


def flags_of(home, **values):
    return {"data_path": home / "data.jsonl", "eval_fraction": 0.2, "eval_interval": 3, "save_interval": 3,
            "accumulation_steps": 1, "learning_rate": 0.01, "max_steps": 0, "keep_best": 1, "keep": 9, **values}


def start(folder, home, **values):
    """Two ranks at stage 2."""
    return Run(folder, home, 2, **flags_of(home, **values))


def point(folder, home, **values):
    """Where another start would begin; one rank with twice the micro-batches sees the same run."""
    flags = {"config": home / "run.yaml", "deepspeed": "zero2", "save_dir": folder, "cache_dir": cache_dir(),
             "dtype": "bf16", "batch_size": 1, "max_seq_len": 96, "pack_len": 96,
             **flags_of(home, accumulation_steps=2, **values)}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return look_for_resume_point(prepare("sft", words, ALONE))


def evaluations(folder):
    return recorded(folder / "metrics.jsonl", 10**9)


def best(folder):
    tensors = load_file(folder / "best" / "sft_48.safetensors")
    return json.loads((folder / "best.json").read_text()), {k: v.numpy().tobytes() for k, v in tensors.items()}


def same(one, other):
    assert curve(one) == curve(other) and evaluations(one) == evaluations(other)
    assert weights(one) == weights(other) and best(one) == best(other)
    for name in ("best.json", "last.json"):
        assert (one / name).read_text() == (other / name).read_text()


SCHEDULE = dict(epochs=1.5, lr_schedule="wsd", decay_ratio=0.5, warmup_steps=3)


@pytest.fixture(scope="module")
def ended(home):
    """-> (a run of 1.5 epochs that nobody disturbed, the same stopped by plan and then killed)."""
    whole, disturbed = home / "whole", home / "disturbed"
    start(whole, home, **SCHEDULE).finish()
    start(disturbed, home, **SCHEDULE, stop_after=5).finish()
    assert [path.name for path in (disturbed / "checkpoints").glob("step_*5")] == ["step_00000005"]
    assert not (disturbed / "DONE").exists() and not (disturbed / "last.json").exists()
    start(disturbed, home, **SCHEDULE).kill_at(10)
    start(disturbed, home, **SCHEDULE).finish()
    return whole, disturbed


def test_a_share_of_an_epoch_a_planned_stop_and_a_kill_leave_the_same_run(ended):
    whole, disturbed = ended
    same(whole, disturbed)
    steps = EPOCH + EPOCH // 2
    assert [step for step, *_ in curve(whole)] == list(range(1, steps + 1))
    rates = [rate for *_, rate in curve(whole)]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, *[0.01] * 4, *[0.01 - 0.0015 * i for i in range(1, 7)]])
    said = disturbed.with_suffix(".log").read_text()
    assert said.count("stopped after 5 steps (--stop_after); the checkpoint of step 5 is written, the same") == 1


def test_the_end_is_evaluated_kept_and_named(ended):
    folder, steps = ended[0], EPOCH + EPOCH // 2
    found = evaluations(folder)
    assert [step for step, _ in found] == [3, 6, 9, 12] and all(b[1] < a[1] for a, b in zip(found, found[1:]))
    assert (folder / "checkpoints" / f"step_{steps:08d}" / "manifest.json").exists()
    named, kept = best(folder)
    assert kept == weights(folder) and (named["step"], named["file"]) == (12, "best/sft_48.safetensors")
    assert json.loads((folder / "last.json").read_text()) == {"file": "sft_48.safetensors", "step": steps,
                                                              "eval_loss": found[-1][1]}
    assert named["eval_loss"] == found[-1][1] and named["eval_perplexity"] == perplexity(found[-1][1])
    assert f"perplexity {perplexity(found[0][1]):.4g}" in folder.with_suffix(".log").read_text()
    assert (folder / "best" / "tokenizer").is_dir()


def test_a_finished_run_goes_on_when_it_is_told_to_be_longer_and_only_then(ended, home):
    whole, disturbed = ended
    done = point(whole, home, **SCHEDULE)
    assert done.finished and "finished run of 12 steps; more --epochs or --max_steps go on" in done.notes[0]
    for shorter in (dict(SCHEDULE, epochs=1), dict(SCHEDULE, max_steps=11), dict(SCHEDULE, max_steps=12)):
        with pytest.raises(ValueError, match=r"can be made longer, not shorter \(12 steps then, \d+ now\)"):
            point(whole, home, **shorter)
    with pytest.raises(ValueError, match="its warmup_steps is 3, this run's is 4"):
        point(whole, home, **dict(SCHEDULE, epochs=2, warmup_steps=4))
    longer = dict(SCHEDULE, epochs=2.25)
    begins = point(whole, home, **longer)
    assert (begins.step, begins.epoch, begins.epoch_step) == (12, 1, EPOCH // 2) and not begins.finished
    assert begins.changed == {"epochs": [1.5, 2.25]}
    before = curve(whole)
    start(whole, home, **longer).finish()
    # Steps of this start, which began after step 12.
    start(disturbed, home, **longer, stop_after=2).finish()
    assert "(--stop_after); the checkpoint of step 14 is written" in disturbed.with_suffix(".log").read_text()
    start(disturbed, home, **longer, keep_weights_only=1).finish()
    same(whole, disturbed)
    assert curve(whole)[:12] == before and len(curve(whole)) == 2 * EPOCH + EPOCH // 4
    # Of a run of 18 steps the last 9 fall.
    assert [rate for *_, rate in curve(whole)[12:]] == pytest.approx([0.01 - 0.001 * i for i in range(4, 10)])
    said = whole.with_suffix(".log").read_text()
    assert said.count("goes on to 18 steps instead of 12: the learning rate is from here on that of a run of") == 1
    # Of the other, weights are left.
    assert not list((disturbed / "checkpoints").glob("step_*"))
    done = point(disturbed, home, **longer)
    assert done.finished and "18 steps, of which only weights are left" in done.notes[0]
    with pytest.raises(ValueError, match="only weights are left, no checkpoint to go on from: --from_weight .*sft_48"):
        point(disturbed, home, **dict(longer, epochs=3))


def test_a_run_without_progress_ends_early_on_all_ranks_and_a_kill_changes_nothing(home):
    """Without a learning rate no evaluation is lower than the first."""
    folder = home / "early"
    flags = dict(learning_rate=0, epochs=3, patience=2, save_interval=2)
    start(folder, home, **flags).kill_at(8)
    start(folder, home, **flags).finish()
    found = evaluations(folder)
    assert [step for step, _ in found] == [3, 6, 9] and len({loss for _, loss in found}) == 1
    assert [step for step, *_ in curve(folder)] == list(range(1, 10)) and best(folder)[0]["step"] == 3
    said = folder.with_suffix(".log").read_text()
    assert said.count("ends early, after step 9: 2 evaluations in a row without a lower loss (--patience)") == 1
    # The best weights are not the last ones, so they are what to talk to.
    assert f" --weight {terminal.shorter(folder / 'best')}\n" in " ".join(said.split("\n    ")), said[-800:]
    assert (folder / "DONE").exists() and (folder / "checkpoints" / "step_00000009").is_dir()
    done = point(folder, home, **flags)
    assert done.finished and "of 9 steps, the last 2 evaluations without a lower loss; a larger" in done.notes[0]
    more = point(folder, home, **dict(flags, patience=3))
    assert not more.finished and more.step == 9 and more.changed == {"patience": [2, 3]}
    # What came to its end has nothing left that patience kept it from; made longer it has no more of it than before.
    done = json.loads((folder / "DONE").read_text())
    assert done.pop("early") is True
    (folder / "DONE").write_text(json.dumps(done))
    assert "of 9 steps; more --epochs" in point(folder, home, **flags).notes[0]
    assert point(folder, home, **dict(flags, patience=3)).finished
    assert "a larger --patience goes on" in point(folder, home, **dict(flags, epochs=4)).notes[0]
    assert point(folder, home, **dict(flags, epochs=4, patience=3)).step == 9


def test_nothing_is_written_or_deleted_through_a_link(tmp_path, home):
    for name, flags, said in (("best", {}, "best is no folder of this run's"),
                              ("checkpoints", {"keep_weights_only": 1}, "is a link, and nothing is deleted through")):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        (folder / name).symlink_to(tmp_path)
        with pytest.raises(ValueError, match=said):
            point(folder, home, **flags)


def test_the_lowest_loss_is_the_earliest_and_what_is_no_number_is_no_progress():
    seen = Evaluations([(2, 1.5), (4, 1.5), (6, None)])
    assert seen.best == (2, 1.5) and seen.since == 2
    assert seen.gave_up(2) and seen.gave_up(1) and not seen.gave_up(3) and not seen.gave_up(0)
    assert seen.record(8, 1.4) and seen.best == (8, 1.4) and seen.since == 0 and not seen.gave_up(1)
    assert seen.at(8) == {"eval_loss": 1.4} and seen.at(6) == {}
    assert perplexity(None) is None and perplexity(1e4) is None and perplexity(0.0) == 1.0


@pytest.mark.parametrize("flags, said", [
    (["--patience", "2"], "--patience is 2 and nothing is held out to evaluate: name --eval_path or"),
    (["--keep_best"], "--keep_best is True and nothing is held out"),
    (["--patience", "-1", "--eval_fraction", "0.1"], "must be at least 0"),
    (["--stop_after", "-1"], "must be at least 0")])
def test_flags_of_the_end_without_a_meaning_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        parse_run_config(flags, "sft", {})
