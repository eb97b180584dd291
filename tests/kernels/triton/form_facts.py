"""Facts about the forms of the experts' kernels, in the honest interpreter.  test_triton_moe.py runs this file:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/form_facts.py
"""

import pytest
import torch

from minimind_ds.kernels.triton import experts as triton_moe
from minimind_ds.kernels.triton import hopper, sort, tma
from minimind_ds.kernels.triton.experts import Sizes

from .moe_facts import BF16, BOUNDS, CASES, FP16, FP32, Case, error, exact, inputs, mutant, ours, tiles


def form_tiles(form: str, block: int = 32, ahead: int = 0, parts: int = 1) -> dict[str, Sizes]:
    """tiles(block) with one form wherever a kernel has it; hidden_gradient's tiles are a part of a row block."""
    made = tiles(block)
    for name in ("gate_up_gradient", "down_gradient"):
        made[name] = made[name]._replace(form="tma" if form == "persistent" else form)
    if form in ("tma", "persistent"):
        made["gate_up"] = made["gate_up"]._replace(form=form)
        made["hidden_gradient"] = made["hidden_gradient"]._replace(form="tma", ahead=ahead, rows=block // parts)
    return made


FORMS = {"early": {}, "sorted": {}, "grouped_mm": {}, "tma": {}, "tma, 1 ahead, halves": {"ahead": 1, "parts": 2},
         "tma, 4 ahead": {"ahead": 4}, "persistent": {}}
FORM_CASES = {
    "top-1": CASES["top-1"],
    "top-2, odd sizes": Case(77, 64, 40, 3, 2, BF16),
    "whole rounds": Case(128, 32, 32, 4, 1, FP16, "in turn"),
    "one more than a block each": CASES["one more than a block each"],
    "only the last expert": CASES["only the last expert"],
    "an expert without tokens": CASES["an expert without tokens"],
    "one token": CASES["one token"],
    "no tokens": CASES["no tokens"],
    "sizes no descriptor takes": CASES["top-3 of 6, no size a multiple of a block"],
}


@pytest.mark.parametrize("name", FORM_CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_products(form, name):
    case, kind = FORM_CASES[name], form.split(",")[0]
    tensors = inputs(case)
    got, want = ours(tensors, None, sizes=form_tiles(kind, **FORMS[form])), exact(tensors)
    assert [a.dtype for a in got] == [case.dtype] * 4 + [tensors[3].dtype]
    assert error(got, want) <= BOUNDS[case.dtype]
    idle = [e for e in range(case.E) if not (tensors[4] == e).any()]
    assert not got[2][idle].any() and not got[3][idle].any()


@pytest.mark.parametrize("form", ["tma", "persistent"])
def test_every_form_shares_sums_and_gives_a_token_its_own_bits(form, monkeypatch):
    monkeypatch.setattr(triton_moe, "splits", lambda *_: 3)
    case = Case(150, 32, 40, 3, 2, BF16)
    tensors = inputs(case)
    got = ours(tensors, None, sizes=form_tiles(form))
    assert error(got, exact(tensors)) <= BOUNDS[BF16]
    mine = slice(20, 29)
    poisoned = [t.clone() for t in tensors]
    others = torch.ones(case.T, dtype=torch.bool)
    others[mine] = False
    for t in (poisoned[0], poisoned[3], poisoned[5]):
        t[others] = float("nan")
    poisoned[4][others] = torch.tensor([2, 1])
    again = ours(poisoned, None, sizes=form_tiles(form), races=False)
    assert all(torch.equal(again[i][mine], got[i][mine]) for i in (0, 1, 4))


def test_weights_may_begin_anywhere_in_a_flat_buffer():
    case = Case(40, 32, 40, 3, 1, BF16)
    tensors = inputs(case)
    sizes = form_tiles("tma")
    made = sort.plan(tensors[4], case.E, sizes["gate_up"].rows)
    buffer = torch.cat([torch.zeros(1, dtype=BF16), tensors[1].flatten()])
    weight = buffer[1:].view_as(tensors[1])
    assert weight.data_ptr() % 16
    got, want = (triton_moe.apply_gate_up(tensors[0], each, 1, made, sizes["gate_up"], True)
                 for each in (weight, tensors[1]))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("form", ["tma", "persistent"])
def test_what_one_experts_rows_hold_stays_out_of_anothers_gradients(form):
    case = Case(90, 32, 40, 3, 1, BF16)
    tensors = inputs(case)
    want = ours(tensors, None, sizes=form_tiles(form))
    for t in (tensors[0], tensors[5]):
        t[tensors[4][:, 0] == 1] = float("nan")
    got = ours(tensors, None, sizes=form_tiles(form))
    for i in (2, 3):
        assert torch.equal(got[i][[0, 2]], want[i][[0, 2]]) and got[i][1].isnan().any()


MUTANTS = {
    "sums the next expert's rows": ("tl.where(start + DEPTH <= last, start, M + expert * DEPTH)", "start"),
    "takes another expert's tail": ("M + expert * DEPTH)", "M)"),
    "leaves a tail's end as it was": ("stored = place < end, within >= 0", "stored = place < end, place < end"),
    "sorts one token's rows twice": ("tl.load(order_ptr + to, mask=to < M, other=0) // K",
                                     "tl.load(order_ptr + to, mask=to < M, other=0) // K * 0"),
    "takes gate for up": ("weight_desc.load([weight_row + I, start])", "weight_desc.load([weight_row, start])"),
    "reads another expert's weight": ("[expert * depth + start,", "[start,"),
    "reads a quarter twice": ("gate_2, up_2 = gate_and_up(gate_up_rows, column + 2 * WIDTH",
                              "gate_2, up_2 = gate_and_up(gate_up_rows, column + WIDTH"),
    "stores past its expert's rows": ("valid = first + within < end", "valid = first + within >= 0"),
    "forgets the second part of a block": ("first += program % PARTS * ROWS", "first += 0 * ROWS"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_in_a_form_is_noticed(name, tmp_path, monkeypatch):
    module = mutant(tma, MUTANTS, name, tmp_path)
    for kernel in (name for name in vars(hopper) if name.endswith("_kernel")):
        monkeypatch.setattr(hopper, kernel, getattr(module, kernel))
    case = Case(75, 32, 40, 2, 2, FP32)
    tensors = inputs(case)
    try:
        found = error(ours(tensors, None, sizes=form_tiles("tma", parts=2)), exact(tensors))
    except Exception as stopped:  # noqa: BLE001  (how it was stopped does not matter here)
        found = stopped
    assert isinstance(found, Exception) or found > BOUNDS[case.dtype]
