"""Facts about the experts' kernels, in the honest interpreter.  tests/kernels/test_triton_moe.py runs this file:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/moe_facts.py
"""

import importlib.util
import pathlib
from typing import NamedTuple

import pytest
import torch

from minimind_ds import kernels
from minimind_ds.bench.kernels import interpreter
from minimind_ds.kernels import reference
from minimind_ds.kernels.triton import experts as triton_moe
from minimind_ds.kernels.triton import grouped_gemm, sort
from minimind_ds.kernels.triton.experts import Sizes


class Case(NamedTuple):
    """T tokens of C, E experts of I, K of them a token; `choose` names how; tiles of `block` (None: the GPU's)."""

    T: int
    C: int
    I: int
    E: int
    K: int
    dtype: torch.dtype
    choose: str = "random"
    block: int | None = 32


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CASES = {
    "top-1": Case(110, 64, 64, 3, 1, BF16),
    "top-2": Case(70, 64, 32, 3, 2, BF16),
    "top-1 fp16": Case(70, 64, 32, 2, 1, FP16),
    "top-1 fp32": Case(70, 32, 64, 2, 1, FP32),
    "top-2 fp32": Case(33, 48, 40, 3, 2, FP32),
    "top-3 of 6, no size a multiple of a block": Case(23, 50, 35, 6, 3, BF16),
    "top-2 fp64, no size a multiple of a block": Case(37, 50, 35, 3, 2, FP64),
    "an expert without tokens": Case(50, 32, 32, 4, 1, BF16, "not 2"),
    "only the last expert": Case(70, 32, 32, 4, 1, BF16, "last"),
    "only the first two, top-2": Case(40, 32, 32, 4, 2, FP32, "first two"),
    "exactly a block each": Case(128, 32, 32, 4, 1, FP32, "in turn"),
    "one more than a block each": Case(132, 32, 32, 4, 1, FP32, "in turn"),
    "one token": Case(1, 64, 64, 4, 1, BF16),
    "one token, top-2, fp32": Case(1, 64, 64, 4, 2, FP32),
    "no tokens": Case(0, 64, 64, 4, 2, BF16),
    "one expert": Case(40, 32, 32, 1, 1, FP32),
    "the GPU's tiles, no size a multiple of them": Case(300, 100, 150, 4, 2, BF16, block=None),
    "the GPU's tiles in fp32": Case(130, 64, 80, 4, 1, FP32, block=None),
}
SLOW = {
    "the GPU's tiles at model size": Case(700, 768, 2432, 4, 1, BF16, block=None),
    "32 experts, top-4": Case(200, 128, 64, 32, 4, BF16),
}
TABLE = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
# ||ours - exact|| / ||exact||: about three times what was seen; fp64 thirty times, since the
# interpreter's exponentials are numpy's, whose last places are a processor's own.
BOUNDS = {BF16: 1e-2, FP16: 1.5e-3, FP32: 1e-6, FP64: 1e-13}


def tiles(block: int | None) -> dict[str, Sizes] | None:
    return block and dict.fromkeys(triton_moe.HOPPER, Sizes(block, block, block, 4, 1))


def choices(case: Case, generator) -> torch.Tensor:
    T, E, K = case.T, case.E, case.K
    scores = torch.rand(T, E, generator=generator)
    if case.choose == "not 2":
        scores[:, 2] = -1
    elif case.choose == "last":
        scores[:, -1] = 2
    elif case.choose == "first two":
        scores[:, :2] += 1
    elif case.choose == "in turn":
        scores[torch.arange(T), torch.arange(T) % E] = 2
    return scores.topk(K, dim=1).indices


def inputs(case: Case, seed: int = 0):
    """x, gate_up, down, weights, experts and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    T, C, I, E, K = case[:5]
    x, gate_up, down, dy = draw(T, C), draw(E, 2 * I, C) * C ** -0.5, draw(E, C, I) * I ** -0.5, draw(T, C)
    weights = draw(T, K).sigmoid().to(torch.promote_types(case.dtype, torch.float32))
    return [*(tensor.to(case.dtype) for tensor in (x, gate_up, down)), weights, choices(case, generator),
            dy.to(case.dtype)]


def run(function, x, gate_up, down, weights, experts, dy, **named):
    """y, dx, dgate_up, ddown, dweights."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, gate_up, down, weights)]
    y = function(*leaves, experts, **named)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def ours(tensors, block, sizes=None, **options):
    with interpreter.poisoned_outputs(), interpreter.options(**options):
        return run(triton_moe.moe, *tensors, sizes=sizes or tiles(block))


def exact(tensors):
    return run(reference.moe, *(x.double() if x.is_floating_point() else x for x in tensors))


def error(got, want) -> float:
    """The largest of ||ours - exact|| / ||exact||; infinity if any is NaN (which Python's max may overlook)."""
    found = [((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(got, want, strict=True)]
    return max(found) if all(e == e for e in found) else float("inf")


@pytest.mark.parametrize("name", TABLE)
def test_output_and_gradients_equal_the_reference(name):
    case = {**CASES, **SLOW}[name]
    tensors = inputs(case)
    got, want = ours(tensors, case.block), exact(tensors)
    assert [a.dtype for a in got] == [case.dtype] * 4 + [tensors[3].dtype]
    assert error(got, want) <= BOUNDS[case.dtype]


@pytest.mark.parametrize("choose, idle", [("not 2", [2]), ("last", [0, 1, 2])])
def test_experts_without_tokens_have_gradients_of_zeros(choose, idle):
    case = Case(40, 32, 48, 4, 1, BF16, choose)
    _, _, dgate_up, ddown, _ = ours(inputs(case), case.block)
    assert not dgate_up[idle].any() and not ddown[idle].any()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_huge_activations_give_no_nan(dtype):
    """Gates of +-10^4: exp overflows, and silu is gate or zero."""
    case = Case(40, 32, 32, 2, 1, dtype)
    tensors = inputs(case)
    tensors[0] *= 1e4
    got, want = ours(tensors, case.block), exact(tensors)
    assert error(got, want) <= 3 * BOUNDS[dtype]


def test_a_token_gets_the_same_bits_whatever_the_others_hold_and_choose():
    case = Case(50, 50, 24, 4, 2, BF16)
    tensors = inputs(case)
    mine = slice(20, 29)
    alone = ours([t[mine] if t.shape[0] == case.T else t for t in tensors], case.block, races=False)
    for poison in (None, float("nan"), float("inf")):
        changed = [t.clone() for t in tensors]
        if poison is not None:
            others = torch.ones(case.T, dtype=torch.bool)
            others[mine] = False
            for t in (changed[0], changed[3], changed[5]):
                t[others] = poison
            changed[4][others] = torch.tensor([3, 1])
        got = ours(changed, case.block, races=False)
        assert all(torch.equal(got[i][mine], alone[i]) for i in (0, 1, 4)), poison


def test_the_order_of_programs_changes_no_bit():
    case = Case(40, 32, 40, 3, 2, BF16)
    tensors = inputs(case)
    first = ours(tensors, case.block)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(tensors, case.block, seed=seed, races=False)))


@pytest.mark.parametrize("K", [1, 2])
def test_gradients_pass_gradcheck_in_fp64(K):
    *leaves, experts, _ = inputs(Case(19, 10, 12, 2, K, FP64))
    leaves = [x.requires_grad_() for x in leaves]
    with interpreter.options(races=False):
        torch.autograd.gradcheck(lambda *x: triton_moe.moe(*x, experts, sizes=tiles(16)), leaves, fast_mode=True)


def test_sums_over_rows_may_be_shared_and_added_in_order(monkeypatch):
    monkeypatch.setattr(triton_moe, "splits", lambda *_: 3)
    for case in (Case(150, 20, 24, 3, 1, FP32, "not 2"), Case(9, 20, 24, 3, 2, BF16)):
        tensors = inputs(case)
        got = ours(tensors, case.block)
        assert error(got, exact(tensors)) <= BOUNDS[case.dtype]
        assert case.choose != "not 2" or not (got[2][2].any() or got[3][2].any())


def test_sums_are_shared_only_where_programs_are_few_and_rows_many():
    def splits(*args):
        return triton_moe.splits(*args, torch.device("cpu"))

    assert (splits(456, 8192), splits(228, 8192), splits(16, 100), splits(16, 8192), splits(66, 8192)) == (
        1, 1, 1, 8, 2)


def test_frozen_weights_get_no_gradient_and_no_grad_saves_nothing():
    case = Case(40, 32, 32, 4, 1, FP32)
    x, gate_up, down, weights, experts, dy = inputs(case)
    want = ours([x, gate_up, down, weights, experts, dy], case.block)
    x.requires_grad_()
    y = triton_moe.moe(x, gate_up, down, weights, experts, sizes=tiles(case.block))
    dx, = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, want[0]) and torch.equal(dx, want[1])
    made = sort.plan(experts, case.E, case.block)
    saved, hidden = triton_moe.apply_gate_up(x.detach(), gate_up, 1, made, tiles(case.block)["gate_up"], False)
    assert not saved.numel()
    with torch.no_grad():
        assert torch.equal(triton_moe.moe(x, gate_up, down, weights, experts, sizes=tiles(case.block)), want[0])


@pytest.mark.parametrize("T, K, E, rows, programs", [
    (0, 1, 4, 16, 128), (1, 1, 4, 16, 128), (3000, 2, 4, 128, 2), (333, 2, 48, 16, 3), (5000, 1, 4, 128, 128),
    (64, 1, 1, 16, 4)])
def test_choices_are_sorted_stably_and_row_blocks_cover_them(T, K, E, rows, programs):
    generator = torch.Generator().manual_seed(T)
    experts = torch.rand(T, E, generator=generator).square().topk(K, dim=1).indices
    with interpreter.poisoned_outputs():
        made = sort.plan(experts, E, rows, programs=programs)
    flat = experts.flatten()
    counts = torch.bincount(flat, minlength=E)
    assert torch.equal(made.order.long(), flat.argsort(stable=True))
    assert made.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    used = [block for block in made.blocks[:, :3].tolist() if block[1] < block[2]]
    want = [[e, first, min(first + rows, end)] for e in range(E)
            for end in [int(made.offsets[e + 1])] for first in range(int(made.offsets[e]), end, rows)]
    assert used == want and made.blocks[:len(used), :3].tolist() == want


def test_rows_lie_beyond_the_reach_of_32_bits():
    """Token 70,000 of rows 32,768 wide: element 2,293,760,000.  Memory that is never touched costs nothing."""
    T, C, last = 70_001, 32_768, 5
    small = inputs(Case(last, C, 16, 1, 1, BF16))
    wide = torch.empty(T, C, dtype=BF16)
    wide[-last:] = small[0]
    offsets, blocks = torch.tensor([0, last]).int(), torch.tensor([[0, 0, last, 0]]).int()
    near, far = (sort.Plan(torch.arange(end - last, end).int(), offsets, blocks) for end in (last, T))
    sizes = Sizes(16, 16, 4096, 4, 1)
    with interpreter.options(races=False):
        got, want = (triton_moe.apply_gate_up(x, small[1], 1, made, sizes, True)
                     for x, made in ((wide, far), (small[0], near)))
        dgot, dwant = (triton_moe.weight_gradient(want[1], x, "b", 1, made, Sizes(16, 4096, 16, 4, 1))
                       for x, made in ((wide, far), (small[0], near)))
    assert torch.equal(got[1], want[1]) and torch.equal(dgot, dwant)


@pytest.mark.parametrize("change, word", [
    (dict(x=torch.zeros(3, 8, dtype=FP64)), "one dtype"), (dict(x=torch.zeros(4, 8)), "do not fit"),
    (dict(gate_up=torch.zeros(2, 9, 8)), "do not fit"), (dict(experts=torch.zeros(3, 2, dtype=int)), "do not fit")])
def test_what_does_not_fit_is_named(change, word):
    args = dict(x=torch.zeros(3, 8), gate_up=torch.zeros(2, 10, 8), down=torch.zeros(2, 8, 5),
                weights=torch.zeros(3, 1), experts=torch.zeros(3, 1, dtype=int))
    with pytest.raises(ValueError, match=word):
        triton_moe.moe(**{**args, **change})


@pytest.mark.skipif("triton" not in kernels.BACKENDS, reason="the door does not name triton yet")
@pytest.mark.parametrize("K", [1, 2])
def test_a_model_through_the_door_equals_the_reference(K):
    from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, collate

    config = ModelConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128, use_moe=True,
                         num_experts_per_tok=K, norm_topk_prob=K > 1)
    ids = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(0))
    batch = collate([[Sample(part, torch.cat((part[1:], torch.tensor([-100])))) for part in ids.split(25)]], 64)
    results = []
    for name in ("attention=reference,moe=triton,elementwise=reference", "reference"):
        torch.manual_seed(0)
        model = MiniMindForCausalLM(config, name)
        out = model(batch)
        (out.loss_sum + 60 * out.aux_loss).backward()
        results.append([out.loss_sum.detach(), *(p.grad for p in model.parameters())])
    assert error(*([x.double() for x in result] for result in results)) <= 1e-5


# Bugs seeded into the kernels' source, each of which a case must notice: old text, new text.
MUTANTS = {
    "gathers by place, not by choice": ("token = tl.load(order_ptr + tl.minimum(row, end - 1)) // K",
                                        "token = tl.minimum(row, end - 1) // K"),
    "stores past its expert's rows": ("mask=(row < end)[:, None] & (column < N)",
                                      "mask=(row >= 0)[:, None] & (column < N)"),
    "stores past the last column": ("(row < end)[:, None] & (column < N)[None, :]", "(row < end)[:, None]"),
    "reads another expert's weight": ("down_ptr + expert.to(tl.int64)", "down_ptr + (expert * 0).to(tl.int64)"),
    "takes up for gate": ("up_weight = gate_weight + I * C", "up_weight = gate_weight"),
    "forgets the weight": ("out = out * tl.load(scale_ptr + choice).to(ACC)[:, None]", "out = out"),
    "weights the gradient twice": ("dscale = tl.sum(dhidden * hidden, 1)\n",
                                   "dscale = tl.sum(dhidden * hidden * scale[:, None], 1)\n"),
    "leaves the weight out of hidden": ("(hidden * scale[:, None]).to(dtype)", "hidden.to(dtype)"),
    "derives silu wrongly": ("sigmoid + silu * (1 - sigmoid)", "sigmoid + sigmoid * (1 - sigmoid)"),
    "forgets what masked lanes hold": ("+ q[None, :], mask=b_mask, other=0.0)", "+ q[None, :], mask=b_mask)"),
    "adds the next expert's rows": ("valid = row < end\n        a_row", "valid = row >= 0\n        a_row"),
    "gathers a round too late": ("tl.load(order_ptr + row + DEPTH, mask=row + DEPTH < end, other=0)",
                                 "tl.load(order_ptr + row, mask=row < end, other=0)"),
    "loses a share of the rows": ("tl.cdiv(tl.cdiv(end - first, SPLIT), DEPTH)", "((end - first) // SPLIT // DEPTH)"),
    "swaps the quarters": ("halves(right, ROWS, COLUMNS // 2)", "halves(left, ROWS, COLUMNS // 2)"),
}


def mutant(module, bugs: dict[str, tuple[str, str]], name: str, tmp_path):
    """The module with one bug."""
    old, new = bugs[name]
    source = pathlib.Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) >= 1, f"the bug {name!r} no longer fits the source"
    path = tmp_path / f"mutant_{list(bugs).index(name)}.py"
    path.write_text(source.replace(old, new).replace("from .", "from minimind_ds.kernels.triton."), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if i % 4 else ())
                                  for i, name in enumerate(MUTANTS)])
def test_a_seeded_bug_is_noticed(name, tmp_path, monkeypatch):
    module = mutant(grouped_gemm, MUTANTS, name, tmp_path)
    for kernel in ("gate_up_kernel", "linear_kernel", "hidden_gradient_kernel", "weight_gradient_kernel"):
        monkeypatch.setattr(triton_moe, kernel, getattr(module, kernel))
    monkeypatch.setattr(triton_moe, "splits", lambda *_: 2)
    case = Case(35, 20, 24, 2, 2, FP32, block=16)
    tensors = inputs(case)
    try:
        found = error(ours(tensors, case.block), exact(tensors))
    except Exception as stopped:  # noqa: BLE001  (how it was stopped does not matter here)
        found = stopped
    assert isinstance(found, Exception) or found > BOUNDS[case.dtype]
