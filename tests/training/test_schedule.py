"""How long a run is, and which learning rate each of its steps takes."""

import json
import math

import pytest

from minimind_ds.config.run import parse_run_config
from minimind_ds.training.lr_schedule import learning_rate, notes, progress, steps_of, total_steps, warmup_share


def parsed(*flags):
    return parse_run_config(["--learning_rate", "1", *map(str, flags)], "sft", {})


def rates(plan_steps, *flags):
    """The rate of every step of a run whose epochs have so many steps each."""
    run, step, found = parsed(*flags), 0, []
    warmup = warmup_share(run, total_steps(run, plan_steps))
    for epoch in range(run.epochs_begun):
        steps = steps_of(run, epoch, plan_steps)
        for epoch_step in range(min(steps, run.max_steps - step) if run.max_steps else steps):
            step += 1
            found.append(learning_rate(progress(run, step, epoch, epoch_step, steps), run, warmup))
    assert len(found) == total_steps(run, plan_steps)
    return found


def test_the_default_is_minimind_s_cosine_after_a_linear_rise():
    found = rates(50, "--epochs", 2, "--warmup_ratio", 0.1)
    assert found[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert found[10:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * step / 90)) for step in range(1, 91)])


@pytest.mark.parametrize("flags, expected", [
    (["--lr_schedule", "linear", "--min_lr_ratio", 0], [0.5, 1, 0.75, 0.5, 0.25, 0]),
    (["--lr_schedule", "constant"], [0.5, 1, 1, 1, 1, 1]),
    (["--lr_schedule", "wsd", "--decay_ratio", 0.5, "--min_lr_ratio", 0], [0.5, 1, 1, 2 / 3, 1 / 3, 0]),
    (["--lr_schedule", "wsd", "--decay_ratio", 0], [0.5, 1, 1, 1, 1, 1])])
def test_every_schedule_rises_alike_and_ends_where_it_says(flags, expected):
    found = rates(6, "--epochs", 1, "--warmup_steps", 2, *flags)
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_warm_up_in_steps_is_that_long_whatever_ends_the_run():
    for flags in (["--epochs", 3], ["--epochs", 9, "--max_steps", 24], ["--epochs", 2.5]):
        found = rates(10, "--warmup_steps", 4, *flags)
        assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1]) and max(found[4:]) < 1, flags
    # A run that ends before its warm-up does never comes to the peak, and says so.
    assert notes(parsed("--warmup_steps", 40), 41) == notes(parsed(), 1) == []
    assert "--warmup_steps is 40 and the run has 2 steps" in notes(parsed("--warmup_steps", 40), 2)[0]
    assert rates(10, "--warmup_steps", 40, "--max_steps", 2) == pytest.approx([1 / 40, 2 / 40])


@pytest.mark.parametrize("epochs, steps", [(0.5, [5]), (1.5, [10, 5]), (1.1, [10, 1]), (0.01, [1]), (2, [10, 10])])
def test_a_share_of_an_epoch_is_that_share_of_its_steps_and_the_rate_ends_with_it(epochs, steps):
    run = parsed("--epochs", epochs)
    assert [steps_of(run, epoch, 10) for epoch in range(run.epochs_begun)] == steps
    found = rates(10, "--epochs", epochs)
    assert found[-1] == pytest.approx(0.1) and len(found) == sum(steps)
    assert all(before > after for before, after in zip(found, found[1:]))


def test_epochs_are_written_as_they_were_meant():
    assert "\nepochs: 2\n" in parsed("--epochs", "2").to_yaml()
    assert "\nepochs: 1.5\n" in parsed("--epochs", "1.5").to_yaml()
    assert json.dumps(parsed("--epochs", "2.0").epochs) == "2"


@pytest.mark.parametrize("flags, said", [
    (["--warmup_steps", 5, "--warmup_ratio", 0.1], "both say how long the learning rate rises; give one"),
    (["--decay_ratio", 0.2], "--decay_ratio is 0.2 and --lr_schedule .default. is cosine: it is wsd's"),
    (["--lr_schedule", "constant", "--min_lr_ratio", 0.5], "--min_lr_ratio is 0.5 and .* the rate does not fall"),
    (["--lr_schedule", "wsd", "--warmup_ratio", 0.6, "--decay_ratio", 0.6], "together they are more than the run"),
    (["--epochs", 0], "--epochs is 0; it must be above 0"), (["--epochs", "1e9"], "at most 1000000"),
    (["--epochs", -0.5], "must be above 0"), (["--warmup_steps", -1], "must be at least 0")])
def test_flags_of_the_schedule_that_contradict_each_other_are_refused(flags, said):
    with pytest.raises(ValueError, match=said) as refused:
        parsed(*flags)
    assert "\n" not in str(refused.value)
