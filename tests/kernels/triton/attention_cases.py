"""Named cases of attention over packed documents, and the reference in fp64 that every kernel is held against."""

import torch

from minimind_ds.kernels import reference

# name: segment lengths (the last one a row's padding tail), heads, key heads, head size, dtype.
CASES = {
    "around 64, head 96": ([1, 63, 64, 65, 127, 3], 4, 2, 96, torch.bfloat16),
    "a long one": ([300, 17], 2, 1, 64, torch.float16),
    "no groups, head 32": ([33, 64, 1, 5], 4, 4, 32, torch.bfloat16),
    "groups of 4, head 128": ([65, 7], 8, 2, 128, torch.bfloat16),
    "groups of 8, head 32": ([70, 2], 8, 1, 32, torch.float16),
    "groups of 3": ([20, 66], 6, 2, 32, torch.bfloat16),
    "head 80 is 64 + 16": ([66, 1], 2, 1, 80, torch.bfloat16),
    "head 112 is padded": ([66, 1], 2, 2, 112, torch.bfloat16),
    "head 6": ([40], 2, 1, 6, torch.float16),
    "an empty segment": ([5, 0, 3], 2, 2, 64, torch.bfloat16),
    "fp32 around 32": ([1, 31, 32, 33, 65], 2, 1, 96, torch.float32),
    "fp32, groups of 2, head 64": ([40, 9], 4, 2, 64, torch.float32),
    "fp64": ([1, 15, 17, 33], 2, 1, 32, torch.float64),
}
SLOW = {
    "fp32 of every length": ([1, 63, 64, 65, 127, 300, 20], 4, 2, 96, torch.float32),
    "fp32, head 128": ([1, 63, 64, 65, 127], 4, 2, 128, torch.float32),
    "real sizes": ([226, 208, 365, 124, 101], 8, 4, 96, torch.bfloat16),
    "one of 1,000": ([1000, 24], 4, 2, 96, torch.bfloat16),
}
# ||ours - exact|| / ||exact||: three times what was seen; fp64 thirty times, since the
# interpreter's exponentials are numpy's, whose last places are a processor's own.
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-13}


def cu_seqlens(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(lengths, H, HKV, D, dtype, scale=1.0, seed=0):
    """q, k, v and the gradient of the output; q and k large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), heads, D) for heads in (H, HKV, HKV, H)]
    q, k, v, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype) for x in (q * scale, k * scale, v, dout)]


def run(function, q, k, v, dout, bounds):
    """out, dq, dk, dv."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, bounds, int(bounds.diff().max()), dropout_p=0.0)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def exact(q, k, v, dout, bounds):
    return run(reference.attention, *(x.double() for x in (q, k, v, dout)), bounds)


def errors(got, want):
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(got, want, strict=True)]


def within(found, bound):
    """Not max(): it loses NaN."""
    return all(error <= bound for error in found)
