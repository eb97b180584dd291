"""The epoch plan and the micro-batches (law 3): what is trained on, and when, depends on no layout.

    python -m pytest tests/data/test_loader.py
"""

import json
import threading
import time

import numpy as np
import pytest
import torch

from minimind_ds.data.loader import Prefetcher, epoch_plan, load_micro_batch
from minimind_ds.data.packing import collate
from minimind_ds.data.store import open_or_build
from minimind_ds.data.tokenizer import load_tokenizer
from tests.waiting import until

pytestmark = pytest.mark.numeric


def log_normal(n, longest=768, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(5.3, 0.6, n).astype(int), 1, longest)


def plan_of(lengths, rows_per_step, pack_len=2048, **changes):
    labelled = np.asarray(lengths) // 2
    return epoch_plan(lengths, labelled, **{"pack_len": pack_len, "rows_per_step": rows_per_step, "seed": 7,
                                            "epoch": 0, **changes})


def layouts_of(rows_per_step):
    divisors = [n for n in range(1, rows_per_step + 1) if rows_per_step % n == 0]
    return [(ranks, accumulation, rows_per_step // ranks // accumulation) for ranks in divisors
            for accumulation in divisors if rows_per_step % (ranks * accumulation) == 0]


def slots(plan, step, layout):
    """{(rank, micro): rows} of one step."""
    ranks, accumulation, batch_size = layout
    return {(rank, micro): plan.micro_batch_rows(step, rank, micro, ranks=ranks, accumulation=accumulation,
                                                 batch_size=batch_size)
            for rank in range(ranks) for micro in range(accumulation)}


@pytest.mark.parametrize("packing", [True, False])
def test_the_slots_of_any_layout_are_the_steps_rows_each_once(packing):
    plan = plan_of(log_normal(900), 24, packing=packing)
    for step in (0, 1, len(plan) - 1):
        expected = sorted(plan.rows(step))
        for layout in layouts_of(24):
            dealt = slots(plan, step, layout)
            assert all(len(rows) == layout[2] for rows in dealt.values())
            assert sorted(row for rows in dealt.values() for row in rows if row) == expected


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_sample_once(packing):
    plan = plan_of(log_normal(1000), 6, packing=packing)
    assert sorted(i for step in range(len(plan)) for row in plan.rows(step) for i in row) == list(range(1000))


def test_the_short_last_step_is_filled_up_with_empty_rows():
    plan = plan_of([10] * 13, 8, packing=False, pack_len=16)
    assert len(plan) == 2 and len(plan.rows(1)) == 5 and plan.facts(1).n_rows == 5
    for layout in layouts_of(8):
        dealt = slots(plan, 1, layout)
        assert sum(row == [] for rows in dealt.values() for row in rows) == 3
        # Empty rows are spread: within a micro-step no rank has two real rows more than another.
        for micro in range(layout[1]):
            real = [sum(bool(row) for row in dealt[rank, micro]) for rank in range(layout[0])]
            assert max(real) - min(real) <= 1


def test_fewer_rows_than_ranks_is_no_error():
    plan = plan_of([5, 6], 16)
    assert len(plan) == 1 and plan.n_rows == 1
    assert [rows for rows in slots(plan, 0, (8, 1, 2)).values() if any(rows)] == [[plan.rows(0)[0], []]]


def test_counts_of_a_step_are_those_of_its_samples():
    lengths = log_normal(500)
    plan = plan_of(lengths, 8)
    for step in range(len(plan)):
        samples = [i for row in plan.rows(step) for i in row]
        facts = plan.facts(step)
        assert facts.n_tokens == lengths[samples].sum() == plan.n_tokens[step]
        assert facts.n_labelled == (lengths[samples] // 2).sum() == plan.n_labelled[step]
        assert facts.fill == pytest.approx(facts.n_tokens / (len(plan.rows(step)) * 2048))
        json.dumps(facts._asdict())
    assert plan.fill == pytest.approx(lengths.sum() / (plan.n_rows * 2048))


def test_the_same_epoch_is_planned_alike_and_another_is_not():
    lengths = log_normal(400)
    first, again = plan_of(lengths, 4), plan_of(lengths, 4)
    assert all(first.rows(step) == again.rows(step) for step in range(len(first)))
    for change in ({"epoch": 1}, {"seed": 8}):
        for packing in (True, False):
            one, other = plan_of(lengths, 4, packing=packing), plan_of(lengths, 4, packing=packing, **change)
            assert one.rows(0) != other.rows(0)


def test_rows_per_step_regroups_the_same_rows_in_the_same_order():
    lengths = log_normal(400)
    small, large = plan_of(lengths, 2), plan_of(lengths, 6)
    rows = [[row for step in range(len(plan)) for row in plan.rows(step)] for plan in (small, large)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("packing, batch_size", [(True, 1), (True, 4), (False, 8), (False, 32)])
def test_ranks_carry_the_same_cost_within_every_micro_step(packing, batch_size):
    lengths = log_normal(20_000)
    plan = plan_of(lengths, 8 * 4 * batch_size, packing=packing)
    worst = 1.0
    for step in range(min(10, len(plan) - 1)):
        dealt = slots(plan, step, (8, 4, batch_size))
        for micro in range(4):
            cost = [sum((lengths[row] + 1e-4 * lengths[row] ** 2).sum() for row in dealt[rank, micro])
                    for rank in range(8)]
            worst = max(worst, max(cost) / np.mean(cost))
    assert worst < 1.05


def test_a_layout_that_does_not_match_the_plan_is_an_error():
    plan = plan_of([5] * 9, 8)
    with pytest.raises(ValueError, match="3 ranks x 1 micro-batches x 2 rows are not the 8 rows"):
        plan.micro_batch_rows(0, 0, 0, ranks=3, accumulation=1, batch_size=2)
    with pytest.raises(IndexError, match="step 1 of a plan of 1"):
        plan.rows(1)


@pytest.mark.parametrize("packing", [True, False])
def test_samples_longer_than_the_row_are_an_error(packing):
    with pytest.raises(ValueError, match="sample 1 has length 20: more than pack_len 16"):
        plan_of([4, 20], 2, pack_len=16, packing=packing)
    with pytest.raises(ValueError, match="rows_per_step is 0"):
        plan_of([4], 0, packing=packing)


# Micro-batches


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    lines = [json.dumps({"conversations": [{"role": "user", "content": "hi " * (i % 17)},
                                           {"role": "assistant", "content": f"{i} " * (i % 29 + 1)}]})
             for i in range(200)]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return open_or_build(folder / "talks.jsonl", load_tokenizer(None), kind="conversations", max_seq_len=100,
                         cache_dir=folder / "cache")


def test_a_micro_batch_is_what_collate_makes_of_its_samples(store):
    plan = epoch_plan(store.lengths, store.labelled, pack_len=128, rows_per_step=8, seed=0, epoch=0)
    for step in range(len(plan)):
        for rows in slots(plan, step, (2, 2, 2)).values():
            ours = load_micro_batch(store, rows, 128, pad_id=3)
            theirs = collate([[store[i] for i in row] for row in rows], 128, pad_id=3)
            for name, value in vars(theirs).items():
                same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                assert same(getattr(ours, name), value), name


def test_the_batches_of_a_step_hold_the_labels_that_the_plan_counted(store):
    plan = epoch_plan(store.lengths, store.labelled, pack_len=128, rows_per_step=8, seed=0, epoch=0)
    for step in range(len(plan)):
        batches = [load_micro_batch(store, rows, 128, 0) for rows in slots(plan, step, (4, 2, 1)).values()]
        assert sum(batch.n_labelled for batch in batches) == plan.facts(step).n_labelled
        assert sum(batch.n_tokens for batch in batches) == plan.facts(step).n_tokens


def test_an_empty_micro_batch_is_all_padding(store):
    batch = load_micro_batch(store, [[], []], 32, pad_id=1)
    assert batch.n_tokens == batch.n_labelled == 0 and not batch.real_mask.any()
    assert batch.cu_seqlens.tolist() == [0, 32, 64] and (batch.input_ids == 1).all()


def test_a_split_trains_on_its_own_samples_only(store):
    train, held = store.split(0.2, 0)
    plan = epoch_plan(train.lengths, train.labelled, pack_len=128, rows_per_step=4, seed=0, epoch=0)
    seen = [int(train.lines[i]) for step in range(len(plan)) for row in plan.rows(step) for i in row]
    assert sorted(seen) == train.lines.tolist() and not set(seen) & set(held.lines.tolist())


# The prefetcher


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_come_in_order_and_the_thread_ends():
    with Prefetcher(iter(range(20))) as batches:
        assert list(batches) == list(range(20))
        with pytest.raises(StopIteration):
            next(batches)
    assert not threads()


def test_no_more_than_depth_batches_are_made_ahead():
    made = []
    with Prefetcher((made.append(i) or i for i in range(100)), depth=3) as batches:
        # Three wait in the queue, one in the thread's hand; one too many would be made at once.
        until(lambda: len(made) >= 4, "four batches")
        time.sleep(0.1)
        assert len(made) == 4 and next(batches) == 0
    assert not threads() and len(made) < 100


def test_an_exception_in_the_thread_reaches_whoever_asks_for_the_batch():
    def batches():
        yield 1
        raise ValueError("line 7 is bad")

    with Prefetcher(batches()) as prefetched:
        assert next(prefetched) == 1
        with pytest.raises(ValueError, match="line 7 is bad"):
            next(prefetched)
        with pytest.raises(StopIteration):
            next(prefetched)
    assert not threads()


def test_leaving_early_by_an_exception_ends_the_thread():
    with pytest.raises(KeyboardInterrupt), Prefetcher(iter(range(10**9))) as batches:
        next(batches)
        raise KeyboardInterrupt
    assert not threads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_pinned_batches_reach_the_gpu(store):
    with Prefetcher((load_micro_batch(store, [[i]], 128, 0) for i in range(3)), pin=True) as batches:
        for i, batch in enumerate(batches):
            assert batch.input_ids.is_pinned() and batch.cu_seqlens.is_pinned()
            there = batch.to("cuda", non_blocking=True)
            assert there.input_ids[0, : store.lengths[i]].tolist() == store[i].input_ids.tolist()
