"""Facts about the attention kernels, in the honest interpreter; tests/kernels/test_triton_attention.py runs them:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/attention_facts.py
"""

import importlib.util
import pathlib

import pytest
import torch

from minimind_ds import kernels
from minimind_ds.bench.kernels import interpreter
from minimind_ds.kernels import triton as backend
from minimind_ds.kernels.needs import NOTHING
from minimind_ds.kernels.triton import attention, schedule

from .attention_cases import BOUNDS, CASES, SLOW, cu_seqlens, errors, exact, inputs, run, within

TABLE = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def ours(*args):
    with interpreter.poisoned_outputs():
        return run(attention.attention, *args)


@pytest.mark.parametrize("name", TABLE)
def test_outputs_and_gradients_equal_the_reference(name):
    lengths, H, HKV, D, dtype = {**CASES, **SLOW}[name]
    tensors, bounds = inputs(lengths, H, HKV, D, dtype), cu_seqlens(lengths)
    found = errors(ours(*tensors, bounds), exact(*tensors, bounds))
    assert within(found, BOUNDS[dtype]), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_of_ten_thousand_give_no_nan(dtype):
    tensors, bounds = inputs([66, 3], 2, 1, 32, dtype, scale=50.0), cu_seqlens([66, 3])
    logits = tensors[0][:66, 0].double() @ tensors[1][:66, 0].double().T * 32 ** -0.5
    assert logits.abs().max() > 5e3
    got, want = ours(*tensors, bounds), exact(*tensors, bounds)
    # fp32 rounds a logit of 10^4 by 5e-4, and weights with it.
    assert within(errors(got, want), 2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_a_document_gets_the_same_bits_whatever_its_neighbours_hold_and_wherever_it_lies():
    lengths = [70, 45, 33]
    tensors, bounds = inputs(lengths, 2, 1, 48, torch.bfloat16), cu_seqlens(lengths)
    packed = ours(*tensors, bounds)
    middle = slice(70, 115)
    alone = ours(*(x[middle].clone() for x in tensors), cu_seqlens([45]))
    assert all(torch.equal(a[middle], b) for a, b in zip(packed, alone))
    for poison in (float("nan"), float("inf"), 3.0):
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:70] = poison
            x[115:] = -poison
        assert all(torch.equal(a[middle], b[middle]) for a, b in zip(packed, ours(*changed, bounds))), poison


def test_the_order_of_programs_changes_no_bit():
    tensors, bounds = inputs([65, 20, 1], 4, 2, 32, torch.bfloat16), cu_seqlens([65, 20, 1])
    first = ours(*tensors, bounds)
    for seed in (1, 2):
        with interpreter.options(seed=seed):
            assert all(torch.equal(a, b) for a, b in zip(first, ours(*tensors, bounds)))


@pytest.mark.parametrize("H, HKV, D", [(1, 1, 6), (2, 1, 48)])
def test_gradients_pass_gradcheck_in_fp64(H, HKV, D):
    bounds = cu_seqlens([1, 17, 6])
    tensors = [x.requires_grad_() for x in inputs([24], H, HKV, D, torch.float64)[:3]]
    torch.autograd.gradcheck(lambda *x: attention.attention(*x, bounds, 17, dropout_p=0.0), tensors,
                             fast_mode=True)


def test_strided_inputs_need_no_copy_and_other_layouts_are_right_too():
    lengths, bounds = [40, 9], cu_seqlens([40, 9])
    q, k, v, dout = inputs(lengths, 4, 2, 32, torch.bfloat16)
    want = ours(q, k, v, dout, bounds)
    fused = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    views = [x.unflatten(1, (-1, 32)) for x in fused.split([128, 64, 64], dim=1)]
    assert all(attention.rows(x) is x and not x.is_contiguous() for x in views)
    permuted = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    for other in (views, permuted):
        leaves = [x.detach().requires_grad_() for x in other]
        out = attention.attention(*leaves, bounds, 40, dropout_p=0.0)
        got = [out, *torch.autograd.grad(out, leaves, dout.transpose(0, 1).contiguous().transpose(0, 1))]
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_rows_lie_beyond_the_reach_of_32_bits():
    """Token 70,000 of rows 32,768 wide: element 2,293,760,000.  Memory that is never touched costs nothing."""
    T, stride, last = 70_001, 32_768, 5
    storage = torch.empty(T * stride, dtype=torch.bfloat16)
    wide = storage.as_strided((T, 2, 32), (stride, 32, 1))
    small = inputs([last], 2, 2, 32, torch.bfloat16)
    wide[-last:] = small[0]
    bounds = cu_seqlens([T - last, last])
    work = attention.launch("forward", wide, wide, wide, bounds)
    tiles = work.tiles[work.tiles[:, 1] == T - last].contiguous()
    out, lse = torch.empty(T, 2, 32, dtype=torch.bfloat16), torch.empty(2, T)
    with interpreter.options(races=False):
        attention.attention_kernel[(len(tiles) * 2,)](wide, wide, wide, out, lse, tiles, T, **work.constants)
    want = ours(small[0], small[0], small[0], small[3], cu_seqlens([last]))[0]
    assert torch.equal(out[-last:], want)


def test_schedule_covers_every_token_once_longest_document_first():
    lengths = [5, 0, 130, 64, 1, 65]
    bounds = cu_seqlens(lengths)
    tiles = schedule.tiles_on_cpu(bounds.numpy(), 64)
    covered = sorted(t for first, _, end, _ in tiles.tolist() for t in range(first, min(first + 64, end)))
    assert covered == list(range(sum(lengths)))
    sizes = [end - start for _, start, end, _ in tiles.tolist()]
    assert sizes == sorted(sizes, reverse=True)
    on_device = schedule.tiles_on_device(bounds, sum(lengths), 64)
    used = on_device[:, 0] < on_device[:, 2]
    assert on_device[used].tolist() == tiles.tolist() and not on_device[~used][:, 2].sum()


def test_tiles_made_on_a_device_give_the_same_bits(monkeypatch):
    tensors, bounds = inputs([70, 0, 33], 2, 1, 32, torch.bfloat16), cu_seqlens([70, 0, 33])
    want = ours(*tensors, bounds)
    monkeypatch.setattr(schedule, "tiles_on_cpu",
                        lambda b, block: schedule.tiles_on_device(torch.from_numpy(b), 103, block).numpy())
    assert all(torch.equal(a, b) for a, b in zip(want, ours(*tensors, cu_seqlens([70, 0, 33]))))


def test_layers_share_one_schedule_and_a_changed_tensor_gets_another(monkeypatch):
    made = []
    stock = schedule.tiles_on_cpu
    monkeypatch.setattr(schedule, "tiles_on_cpu", lambda b, block: made.append(block) or stock(b, block))
    tensors, bounds = inputs([20, 13], 2, 1, 32, torch.bfloat16), cu_seqlens([20, 13])
    first = ours(*tensors, bounds)
    assert len(made) == len(set(made)) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, ours(*tensors, bounds))) and len(made) == 2
    bounds[1] = 13
    second = ours(*tensors, bounds)
    assert len(made) == 4 and not torch.equal(first[0], second[0])


def test_torch_compile_takes_it_whole():
    tensors, bounds = inputs([20, 13], 2, 1, 32, torch.float32), cu_seqlens([20, 13])
    compiled = torch.compile(attention.attention, backend="aot_eager", fullgraph=True)
    got, want = run(compiled, *tensors, bounds), ours(*tensors, bounds)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("change, word", [
    (dict(dropout_p=0.1), "dropout"), (dict(D=130), "130"), (dict(D=7), "even"), (dict(HKV=3), "fit"),
    (dict(bounds=[0, 9]), "0 to 8"), (dict(bounds=[0, 5, 3, 8]), "not fall")])
def test_what_cannot_run_says_why(change, word):
    H, HKV, D = 4, change.get("HKV", 2), change.get("D", 32)
    q, k, v, _ = inputs([8], H, HKV, D, torch.float32)
    bounds = torch.tensor(change.get("bounds", [0, 8]), dtype=torch.int32)
    with pytest.raises(ValueError, match=word):
        attention.attention(q, k, v, bounds, 8, dropout_p=change.get("dropout_p", 0.0))
    assert backend.why_not("attention", torch.device("cpu"), torch.int8, NOTHING)


# Bugs seeded into the kernels' source, each of which the cases above must notice: old text, new text.
MUTANTS = {
    "sees one key ahead": ("key[None, :] <= token[:, None], scores", "key[None, :] <= token[:, None] + 1, scores"),
    "does not see itself": ("key[:, None] <= token[None, :], weights", "key[:, None] < token[None, :], weights"),
    "reads into the next document": ("here = key < end\n        k_block", "here = key < T\n        k_block"),
    "stores past its document": ("valid = token < end\n    q_offsets", "valid = token < T\n    q_offsets"),
    "forgets what masked lanes hold": ("mask=mask, other=0.0", "mask=mask"),
    "writes columns past the head": ("& (column < D)[None, :]\n    tl.store", "\n    tl.store"),
    "starts from the wrong block": ("(start64 + block * KEYS) * V_STRIDE", "(start64 + block) * V_STRIDE"),
    "does not shrink the sum": ("total * shrink +", "total +"),
    "forgets delta": ("ACC) - delta[None, :]", "ACC)"),
    "leaves a tile out": ("len(tiles) * across", "len(tiles) * across - 1"),
    "mixes heads of a group": ("kv_head * GROUP + turn % GROUP", "kv_head * GROUP + turn // GROUP % GROUP"),
    "multiplies fp32 as tf32": ('"ieee" if wide', '"tf32" if wide'),
}


def mutant(name, folder):
    """The kernels' module with one bug in it."""
    old, new = MUTANTS[name]
    source = pathlib.Path(attention.__file__).read_text(encoding="utf-8")
    assert old in source, f"the bug {name!r} no longer fits the source"
    path = folder / f"mutant_{list(MUTANTS).index(name)}.py"
    path.write_text(source.replace(old, new).replace('"minimind_ds::', f'"{path.stem}::'), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"minimind_ds.kernels.triton.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The last document is NaN: what reads it shows.  Its tiles are not the last ones: what is left out shows too.
TRIALS = [([3, 40, 5], torch.bfloat16), ([70, 3], torch.float32)]


def notices(function):
    for lengths, dtype in TRIALS:
        tensors, bounds, last = inputs(lengths, 2, 1, 40, dtype), cu_seqlens(lengths), lengths[-1]
        want = exact(*(x[:-last] for x in tensors), bounds[:-1])
        for x in tensors:
            x[-last:] = float("nan")
        try:
            with interpreter.poisoned_outputs():
                got = run(function, *tensors, bounds)
        except Exception:  # noqa: BLE001  (how it was stopped does not matter here)
            return True
        if not within(errors([x[:-last] for x in got], want), BOUNDS[dtype]):
            return True
    return False


def test_trials_find_nothing_wrong_with_the_kernels_as_they_are():
    assert not notices(attention.attention)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if i % 4 else ())
                                  for i, name in enumerate(MUTANTS)])
def test_a_seeded_bug_is_noticed(name, tmp_path):
    assert notices(mutant(name, tmp_path).attention)


def test_the_interpreter_of_another_triton_is_refused(monkeypatch):
    monkeypatch.setattr(interpreter, "STOCK", {})
    monkeypatch.setattr(interpreter.Builder, "create_masked_load", lambda self, pointers, mask: None)
    with pytest.raises(RuntimeError, match="create_masked_load is not what it was"):
        interpreter.install()


@pytest.mark.skipif("triton" not in kernels.BACKENDS, reason="the door does not name triton yet")
def test_a_model_through_the_door_equals_the_reference():
    from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, collate

    config = ModelConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128)
    ids = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(0))
    batch = collate([[Sample(part, torch.cat((part[1:], torch.tensor([-100])))) for part in ids.split(25)]], 64)
    results = []
    for name in ("attention=triton,moe=reference,elementwise=reference", "reference"):
        torch.manual_seed(0)
        model = MiniMindForCausalLM(config, name)
        out = model(batch)
        out.loss_sum.backward()
        results.append([out.loss_sum.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert (a - b).norm() <= 1e-5 * b.norm()
