"""Device mistakes found without a device: torch's CUDA build, tensors on "cuda:0" that hold no data.

Every operation is seen on its way (FakeTensorMode works out shapes and devices): none may take tensors from two
devices, and each place where the host would wait for the GPU is on a list with its reason.  What a kernel computes is
not seen: launches are left out.

    python -m pytest --slow tests/training/test_fake_gpu.py         (with a CUDA build of torch and no GPU; 10 s)
"""

import collections
import contextlib
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from minimind_ds import MiniMindForCausalLM, ModelConfig, Sample, collate, kernels
from minimind_ds.distributed import deepspeed_compat
from minimind_ds.model.decoder import Linear
from minimind_ds.model.loss import scaled_loss
from minimind_ds.paths import ROOT
from minimind_ds.training import step
from minimind_ds.training.step import Position, StepSums, Verdict, evaluate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch makes no CUDA tensors, not even fake"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the tests named on_a_gpu run on it"),
]
FakeTensorMode = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode

# Operations whose result the host waits for.
READS = {"_local_scalar_dense", "item", "nonzero", "bincount", "equal", "unique_dim", "_unique2", "masked_select"}


class Watch(TorchDispatchMode):
    """Sees every operation.  Those on the CPU alone run as they are; others go on to FakeTensorMode.

    waits: (what, file and function of ours) of each place where the host waits.  mixed: operations with tensors of two
    devices, likewise.  answer: what a number that is asked for is said to be.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.mixed, self.seen, self.answer = set(), set(), collections.Counter(), 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(x.device.type == "cuda" for x in given)
        target = kwargs.get("device")
        to_gpu = target is not None and torch.device(target).type == "cuda"
        if name == "is_pinned":
            return False
        if name == "_pin_memory":
            return args[0]
        if not (on_gpu or to_gpu):
            with _disable_current_modes():
                return func(*args, **kwargs)
        self.seen[name] += 1
        if name in ("_to_copy", "copy_"):
            across = len({x.device.type for x in given}) > 1 or target is not None and to_gpu != on_gpu
            if across and not kwargs.get("non_blocking", name == "copy_" and args[2:] == (True,)):
                self.waits.add(("copy", place()))
        elif any(x.device.type == "cpu" and x.dim() for x in given):
            self.mixed.add((name, place()))
        if name in READS:
            self.waits.add((name, place()))
            if name == "_local_scalar_dense":
                return float(self.answer) if args[0].is_floating_point() else self.answer
        return func(*args, **kwargs)


def place() -> str:
    """The file and function of ours that called last."""
    frame, package = sys._getframe(1), str(ROOT / "minimind_ds")
    while frame and (not frame.f_code.co_filename.startswith(package) or frame.f_code.co_name.startswith("<")):
        frame = frame.f_back
    if frame is None:
        return "tests"
    return f"{frame.f_code.co_filename.removeprefix(package + '/')}:{frame.f_code.co_name}"


@pytest.fixture
def watch(monkeypatch):
    """A GPU of the Hopper kind whose kernels are not started; what asks CUDA itself for facts is answered."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from minimind_ds.kernels import triton

    target = SimpleNamespace(arch=90, backend="cuda", warp_size=32)
    monkeypatch.setattr(type(driver), "active", SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **kwargs: None)
    monkeypatch.setattr(triton, "why_not", lambda *facts: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device=None: SimpleNamespace(multi_processor_count=132))
    kernels.resolve.cache_clear()
    kernels.choose.cache_clear()
    watch = Watch()
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield watch
    kernels.resolve.cache_clear()
    kernels.choose.cache_clear()


def make_model(watch: Watch, kernels: str, dtype: torch.dtype, moe: bool) -> MiniMindForCausalLM:
    """Two layers of 64, K = 2 of 4 experts, on the GPU."""
    config = ModelConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128, use_moe=moe,
                         num_experts_per_tok=2)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return MiniMindForCausalLM(config, f"{kernels},activations=native", balance="row").train()
    finally:
        torch.set_default_dtype(torch.float32)
        # Weights come from the CPU, where they are drawn.
        watch.waits.clear()


def make_batch():
    """Two rows of 32 tokens, padded at their ends."""
    samples = [Sample(torch.arange(n), torch.cat((torch.arange(1, n), torch.tensor([-100])))) for n in (1, 17, 20, 9)]
    return collate([samples[:2], samples[2:]], 32)


def backward(*losses: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """-> each leaf's gradient.  What the engine of autograd does, which itself wants a real GPU: every node is called
    with the gradients of its outputs, in an order in which these are complete."""
    order, seen = [], set()

    def visit(node):
        seen.add(node)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                visit(after)
        order.append(node)

    waiting, found = collections.defaultdict(dict), {}
    for loss in losses:
        waiting[loss.grad_fn][loss.output_nr] = torch.ones_like(loss)
        if loss.grad_fn not in seen:
            visit(loss.grad_fn)
    with torch.no_grad():
        for node in reversed(order):
            given = waiting.pop(node, None)
            if given is None:
                continue
            if hasattr(node, "variable"):
                found[node.variable] = given[0]
                continue
            given = [given.get(i) for i in range(len(node._input_metadata))]
            # A Function of Python's is no callable, has gradients for all its inputs and edges for tensors alone.
            gradients = node(*given) if callable(node) else node.apply(*given)
            gradients, edges = gradients if isinstance(gradients, tuple) else (gradients,), node.next_functions
            if not callable(node):
                gradients = itertools.compress(gradients, node.needs_input_grad)
                edges = [edge for edge in edges if edge[0] is not None]
            for (after, i), dx in zip(edges, gradients, strict=True):
                if after is None or dx is None:
                    continue
                # What was spread over a dimension is summed over it.
                form = after._input_metadata[i]
                dx = dx.sum_to_size(form.shape).to(form.dtype)
                waiting[after][i] = waiting[after][i] + dx if i in waiting[after] else dx
    assert not waiting
    return found


def fake_world(**more):
    return SimpleNamespace(size=1, rank=0, device=torch.device("cuda", 0), **more)


# Once a run: cos and sin are made on the CPU, as everywhere, so that their bits are the same.
ROTARY = ("copy", "model/rotary.py:forward")
CASES = [(backend, dtype, moe, remember) for backend in ("triton", "sdpa", "reference")
         for dtype in (torch.bfloat16, torch.float32) for moe in (False, True) for remember in (True, False)]


@pytest.mark.parametrize("backend, dtype, moe, remember", CASES, ids=str)
def test_forward_and_backward_stay_on_the_gpu_and_wait_for_nothing(watch, backend, dtype, moe, remember):
    """remember: False is gradient checkpointing."""
    model, expected = make_model(watch, backend, dtype, moe), {ROTARY}
    model.gradient_checkpointing = not remember
    batch = make_batch().pin_memory().to("cuda", non_blocking=True)
    assert batch.cu_seqlens.device.type == "cpu" and batch.labelled_index.device.type == "cuda" and not watch.waits
    if backend == "sdpa" and moe and dtype == torch.float32:
        # PyTorch's grouped product takes bf16 only; in fp32 the lists of rows by expert come from the GPU.  Such a
        # GPU has our kernels unless its owner asked for this backend.
        expected.add(("_local_scalar_dense", "kernels/sdpa.py:grouped_linear"))
        watch.answer = batch.input_ids.numel() * 2 // 4
    out = model(batch)
    loss = scaled_loss(out.loss_sum, out.aux_loss, batch.n_tokens, step_labelled=40, step_real=50, dp_world=1)
    gradients = backward(loss)
    for name, p in model.named_parameters():
        dp = gradients[p]
        assert (dp.shape, dp.dtype, dp.device) == (p.shape, p.dtype, torch.device("cuda", 0)), name
    assert out.loss_sum.dtype == torch.float32 and watch.seen["mm"] + watch.seen["addmm_"] > 20
    assert watch.waits == expected and not watch.mixed


def test_an_evaluation_waits_at_its_end_alone(watch, monkeypatch):
    model, batch = make_model(watch, "triton", torch.bfloat16, True), make_batch()
    held_out = collections.namedtuple("Set", "name store plan")
    plan = type("Plan", (), {"__len__": lambda self: 2, "micro_batch_rows": lambda *args, **kwargs: None})()
    prepared = SimpleNamespace(run=SimpleNamespace(accumulation_steps=2, batch_size=2, row_len=32), world=fake_world(),
                               eval_sets=[held_out("one", None, plan), held_out("other", None, plan)],
                               dims=SimpleNamespace(sequence=1), data_parallel_size=1,
                               tokenizer=SimpleNamespace(pad_id=0))
    monkeypatch.setattr(step.loader, "load_micro_batch", lambda *args: batch)
    monkeypatch.setattr(step.dist, "all_reduce", lambda x: None)
    found = evaluate(prepared, SimpleNamespace(engine=model, beat=lambda text: None))
    assert found["eval_tokens"] == 1 and watch.waits == {("_local_scalar_dense", "training/step.py:evaluate"), ROTARY}
    assert not watch.mixed


def test_a_steps_sums_norm_clipping_and_verdict_wait_once(watch):
    """As at stage 0 in fp32."""
    model = make_model(watch, "triton", torch.float32, False)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0, optimizer=SimpleNamespace(), module=model,
                             basic_optimizer=SimpleNamespace())
    live = SimpleNamespace(engine=engine, beat=lambda text: None, spikes=SimpleNamespace(check=lambda loss: None))
    prepared = SimpleNamespace(run=SimpleNamespace(dtype="fp32"), world=fake_world())
    plan = SimpleNamespace(facts=lambda step: SimpleNamespace(n_labelled=40, n_tokens=50))
    sums = StepSums(prepared.world)
    sums.add(SimpleNamespace(loss_sum=torch.empty((), device="cuda"), aux_loss=torch.empty((), device="cuda")), 50)
    sums.reduce(stop_asked=False, forward_s=0.1)
    norm = deepspeed_compat.clip_gradients(engine, 1.0)
    assert norm.device.type == "cuda" and norm.dtype == torch.float64 and not watch.waits
    assert Verdict(prepared, live, plan, Position(1, 0, 0), sums)([norm]) == [1.0]
    assert watch.waits == {("_local_scalar_dense", "training/step.py:read")} and not watch.mixed


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_norms_at_stages_1_and_2_and_what_deepspeed_does_with_them_wait_once(watch, monkeypatch, clip):
    from deepspeed import comm
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    monkeypatch.setattr(comm, "all_reduce", lambda *args, **kwargs: None)
    model = make_model(watch, "triton", torch.bfloat16, False)
    parameters = list(model.parameters())
    optimizer = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    vars(optimizer).update(
        averaged_gradients={0: [torch.empty_like(p) for p in parameters]}, params_in_partition=[parameters],
        bit16_groups=[parameters], cpu_offload=False, has_moe_layers=False, check_grad_overflow=False, clip_grad=clip,
        dp_process_group=None, device=torch.device("cuda", 0), use_muon=False, external_loss_scale=None,
        custom_loss_scaler=False, loss_scaler=SimpleNamespace(cur_scale=1.0, loss_scale=1.0))
    monkeypatch.setattr(optimizer, "_muon_update_lacks_loss_scale", lambda i: False)
    engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 2)
    assert deepspeed_compat.take_norm_once(engine, lambda norms: torch.stack(norms).tolist())
    norm = optimizer.scaled_global_norm()
    flat = [torch.empty(1000, device="cuda")]
    optimizer.unscale_and_clip_grads(flat, norm)
    # The read is the test's own `take`; DeepSpeed goes on with a number of the CPU's.
    assert norm.device.type == "cpu" and watch.waits == {("_local_scalar_dense", "distributed/deepspeed_compat.py:"
                                                                                 "numbers")}
    assert not watch.mixed and watch.seen["_foreach_norm"] == 1 and (watch.seen["mul_"] == 1) == (clip > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_update_of_fp32_masters_waits_once(watch, dtype):
    """As at stage 0 in half precision, with PyTorch's fused AdamW and with its own DeepSpeed optimizer."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    lows = list(make_model(watch, "triton", dtype, False).parameters())
    highs = [p.detach().float() for p in lows]
    for p in lows[1:]:
        p.grad = torch.empty_like(p)
    optimizer = FP16_UnfusedOptimizer.__new__(FP16_UnfusedOptimizer)
    vars(optimizer).update(fp16_groups=[lows], fp32_groups=[highs], fused_lamb_legacy=False, clip_grad=1.0,
                           optimizer=torch.optim.AdamW(highs, lr=1e-3, fused=True),
                           overflow_checker=SimpleNamespace(), loss_scale_config=SimpleNamespace(cur_scale=1.0))
    optimizer._update_scale = lambda skip: None
    engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 0)
    assert deepspeed_compat.update_together(engine, lambda norms: torch.stack(norms).tolist())
    assert optimizer.step() is False
    assert watch.waits == {("_local_scalar_dense", "distributed/deepspeed_compat.py:step")} and not watch.mixed
    assert watch.seen["_fused_adamw_"] == 1 and watch.seen["_foreach_copy_"] == 2
    assert set(deepspeed_compat.stage_zero_masters(engine)) == set(lows)


def test_the_watch_sees_mistakes(watch):
    """A product of two devices is refused, an index from the CPU and a read are noted."""
    layer = Linear(8, 8, device="cuda")
    x = layer(torch.ones(3, 8, device="cuda"))
    assert not watch.waits and not watch.mixed
    with pytest.raises(Exception, match="(?i)device"):
        x + torch.ones(3, 8)
    x[torch.tensor([0, 2])]
    assert {name for name, _ in watch.mixed} == {"add", "index"} and not watch.waits
    with contextlib.suppress(Exception):
        x.detach().sum().item()
        torch.ones(3).to("cuda")
    assert {name for name, _ in watch.waits} == {"_local_scalar_dense", "copy"}
