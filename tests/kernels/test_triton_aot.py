"""Every kernel compiles for A100 and H100/H200 without a GPU, and the compiled code keeps to what was designed.

The host code that starts the kernels in earnest runs on CPU tensors; its launches become compiles (aot.py).
What is held: nothing spills to memory, half-precision products are matrix instructions of the target (HGMMA on
sm_90, HMMA on sm_80), shared memory fits, and kernels bound by memory move 16 bytes a thread at once.  The table is
printed with -s, or by

    python -m tests.kernels.triton.aot tests.kernels.test_triton_aot:default 90
"""

import re

import pytest

from .triton import ROOT, compiled, table

triton = pytest.importorskip("triton")

# heads, key heads, head size, dtype: MiniMind-3, and what else is allowed.
DEFAULT = [(8, 4, 96, "bfloat16")]
OTHERS = [(8, 2, 64, "bfloat16"), (8, 4, 96, "float32"), (8, 4, 128, "bfloat16"), (8, 2, 96, "bfloat16"),
          (8, 8, 96, "float16"), (8, 1, 96, "bfloat16"), (4, 2, 64, "bfloat16"), (8, 8, 64, "float16"),
          (8, 8, 32, "float16"), (8, 1, 32, "bfloat16"), (4, 2, 80, "bfloat16"), (4, 4, 48, "bfloat16"),
          (4, 2, 112, "bfloat16"), (6, 2, 96, "bfloat16"), (8, 4, 128, "float32"), (8, 8, 64, "float32"),
          (8, 2, 32, "float32")]


def compile_all(cases):
    """Attention and norm + rotary, forward and backward, started on CPU tensors."""
    import torch

    from minimind_ds.kernels.triton import attention, rope

    T, bounds = 256, torch.tensor([0, 100, 256], dtype=torch.int32)
    for H, HKV, D, name in cases:
        q, k, v = (torch.zeros(T, heads, D, dtype=getattr(torch, name)) for heads in (H, HKV, HKV))
        weight, angles = torch.ones(D, dtype=q.dtype, requires_grad=True), torch.zeros(2, T, D // 2)
        q, k = (rope.norm_rope(x, weight, *angles, 1e-6) for x in (q, k))
        attention.attention(q, k, v.requires_grad_(), bounds, 156, dropout_p=0.0).sum().backward()


def default():
    compile_all(DEFAULT)


def others():
    compile_all(OTHERS)


def elementwise():
    """Norms, SwiGLU and losses at MiniMind-3's sizes, and a vocabulary that is read twice.

    251 tokens: whether kernels move 16 bytes at once must not depend on how many tokens there are.
    """
    import torch

    from minimind_ds.kernels.triton import elementwise as triton_elementwise

    for dtype in (torch.bfloat16, torch.float32):
        x, gate = (torch.zeros(251, size, dtype=dtype, requires_grad=True) for size in (768, 2432))
        total, y = triton_elementwise.add_rms_norm(x, x, torch.ones(768, dtype=dtype), 1e-6)
        (total + y + triton_elementwise.rms_norm(x, torch.ones(768, dtype=dtype), 1e-6)).sum().backward()
        triton_elementwise.swiglu(gate, gate).sum().backward()
        for vocabulary in (6400, 40_000):
            triton_elementwise.token_losses(torch.zeros(4, vocabulary, dtype=dtype), torch.zeros(4, dtype=torch.int64))


def row(found: dict) -> str:
    sizes, counts = found["constants"], found["counts"]
    heads = f"H {sizes['H']}/{sizes['HKV']} D" if "HKV" in sizes else f"H {sizes.get('HEADS', '')} D"
    shape = f"{heads} {sizes.get('D', ''):<3} {found['dtypes'][0]:8}"
    return (f"sm_{found['arch']} {found['kernel']:21} {shape} warps {found['warps']} registers {found['registers']:3} "
            f"stack {found['stack']} shared {found['shared']:6} HGMMA {counts['HGMMA']:2} HMMA {counts['HMMA']:3} "
            f"blocks/SM {found['blocks_per_sm']} loads {found['loads']} stores {found['stores']}")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("function", ["default", pytest.param("others", marks=pytest.mark.slow)])
def test_no_spills_matrix_instructions_and_shared_memory_within_limits(function, arch):
    table = compiled(f"test_triton_aot:{function}", arch)
    cases = {"default": DEFAULT, "others": OTHERS}[function]
    # Norm + rotary is compiled once for as many heads of one size, be they queries' or keys', and whosever.
    rotated = {(heads, D, name) for H, HKV, D, name in cases for heads in (H, HKV)}
    assert len(table) == 3 * len(cases) + 2 * len(rotated)
    print("\n" + "\n".join(map(row, table)))
    # The hardware's: bytes a block may have, and two blocks to a multiprocessor, of which one computes while the other
    # waits for memory.  Registers are not counted: how many a kernel takes is each Triton's own.
    limit = {80: 166_912, 90: 232_448}[arch]
    for found in table:
        spilled = found["stack"] or found["counts"]["STL"] or found["counts"]["LDL"]
        assert not spilled and found["shared"] <= limit and found["blocks_per_sm"] >= 2, row(found)
        products = "BLOCK" in found["constants"]
        if products and found["dtypes"][0] != "float32":
            kind, other = ("HGMMA", "HMMA") if arch == 90 else ("HMMA", "HGMMA")
            assert found["counts"][kind] and not found["counts"][other], row(found)
        elif products:
            # fp32 products are fp32: no matrix instruction has rounded them to tf32.
            assert not found["counts"]["HGMMA"] and not found["counts"]["HMMA"], row(found)


@pytest.mark.parametrize("arch", [80, 90])
def test_elementwise_kernels_do_not_spill(arch):
    table = compiled("test_triton_aot:elementwise", arch)
    print("\n" + "\n".join(map(row, table)))
    # Two norms each way, SwiGLU each way, losses for two vocabularies; bf16 and fp32.
    assert len(table) == 2 * (4 + 2 + 2)
    for found in table:
        # Triton 3.7 keeps one register pair of the norm's gradient on sm_80's stack, stored and loaded once: no spill
        # in a loop, which would be counted more often.
        counts = found["counts"]
        assert found["stack"] <= 8 and max(counts["STL"], counts["LDL"]) <= 1, row(found)
        assert found["blocks_per_sm"] >= 2, row(found)


@pytest.mark.parametrize("arch", [80, 90])
def test_elementwise_kernels_move_whole_sixteen_bytes_and_read_a_row_of_logits_once(arch):
    ours = compiled("test_triton_aot:elementwise", arch) + [
        found for found in compiled("test_triton_aot:default", arch) if found["kernel"].startswith("rope")]
    router = [found for found in compiled("test_triton_moe:launches", arch) if found["kernel"].startswith("route")]
    half = [found for found in ours + router if found["dtypes"][0] == "bfloat16"]
    # Eight as above, norm + rotary of queries and of keys each way, the router each way.
    assert len(half) == 8 + 4 + 2
    for found in half:
        moved = found["loads"], found["stores"]
        # Two bytes at once is one number at once.  A router's row is four experts, 8 bytes.
        assert not any(width in way for width in ("1", "2") for way in moved), row(found)
        assert all(way.get("8" if found in router else "16") for way in moved), row(found)
    losses = [found for found in ours
              if found["kernel"] == "token_loss_kernel" and found["constants"]["V"] <= found["constants"]["BLOCK"]]
    assert [found["dtypes"][0] for found in losses] == ["bfloat16", "float32"]
    for found in losses:
        row_bytes = found["constants"]["V"] * {"bfloat16": 2, "float32": 4}[found["dtypes"][0]]
        assert row_bytes <= found["loads"]["16"] * 16 * 32 * found["warps"] < 2 * row_bytes, row(found)


@pytest.mark.parametrize("arch", [80, 90])
def test_no_loop_with_matrix_products_waits_for_what_it_has_just_asked_for(arch):
    products = [found for source in ("test_triton_aot:default", "test_triton_moe:launches")
                for found in compiled(source, arch) if found["waits"]]
    assert len({found["kernel"] for found in products}) == 7
    for found in products:
        assert found["waiting_loads"] == 0, row(found)
        # Copies have a round to arrive in.  The query gradient's have not: a fourth block on the SM hides more than a
        # third stage (timed on an H200).  Ampere's attention likewise keeps to three blocks, of two stages.
        if found["kernel"] == "query_gradient_kernel":
            assert found["blocks_per_sm"] >= 3
        elif arch == 90 or "DEPTH" in found["constants"]:
            assert min(found["waits"]) > 0, row(found)


def test_the_page_shows_what_the_compiler_makes():
    pinned = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    if triton.__version__ != pinned:
        pytest.skip(f"docs/KERNELS.md has the figures of triton {pinned}, not {triton.__version__}")
    found = [one for arch in (90, 80) for source in table.SOURCES for one in compiled(source, arch)]
    assert table.on_the_page() == table.table(found), "python -m tests.kernels.triton.table --write"
