"""The kernels of `gelu_tanh` and the functions that run them: elementwise over memory, in whatever order it lies.

Least traffic for bf16, with U = 2 bytes an element: 2U forward (x in, result out), 3U backward (gradient and x in, gradient out).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import on_device_of
from .compile_case import CompileCase
from .gelu import CUBIC, SLOPE

# Elements of a program: two loads of 16 bytes a thread in bf16.
BLOCK = 2048
WARPS = 4


@triton.jit
def _sigmoid(x, SLOPE: tl.constexpr, CUBIC: tl.constexpr):
    """s and s (1 - s) of x, without cancellation, and k (1 + 3 a x^2), the slope of the sigmoid's argument."""
    near = tl.minimum(tl.maximum(x, -12.0), 12.0)  # beyond, s is 0 or 1 in fp32, and the cube could overflow
    small = tl.exp(-tl.abs(SLOPE * near * (1 + CUBIC * near * near)))
    large = 1 / (1 + small)
    return tl.where(x > 0, large, small * large), small * large * large, SLOPE * (1 + 3 * CUBIC * near * near)


@triton.jit
def forward_kernel(x_ptr, out_ptr, elements, SLOPE: tl.constexpr, CUBIC: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < elements, other=0.0).to(tl.float32)
    sigmoid, _, _ = _sigmoid(x, SLOPE, CUBIC)
    tl.store(out_ptr + offsets, (x * sigmoid).to(out_ptr.dtype.element_ty), mask=offsets < elements)


@triton.jit
def backward_kernel(
    grad_out_ptr, x_ptr, grad_x_ptr, elements, SLOPE: tl.constexpr, CUBIC: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < elements, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + offsets, mask=offsets < elements, other=0.0).to(tl.float32)
    sigmoid, variance, slope = _sigmoid(x, SLOPE, CUBIC)
    grad_x = grad_out * (sigmoid + x * variance * slope)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=offsets < elements)


def run_forward(x: Tensor) -> Tensor:
    """Returns gelu(x), with x's strides where x has no gaps."""
    out = torch.empty_like(x)
    if out.numel() > 0:
        with on_device_of(x):
            forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                _as_laid_out(x, out), out, x.numel(), SLOPE, CUBIC, BLOCK, num_warps=WARPS
            )
    return out


def run_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of x, laid out as the result of the forward pass."""
    grad_x = torch.empty_like(x)
    if grad_x.numel() > 0:
        with on_device_of(x):
            backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                _as_laid_out(grad_out, grad_x), _as_laid_out(x, grad_x), grad_x, x.numel(), SLOPE, CUBIC, BLOCK,
                num_warps=WARPS,
            )  # fmt: skip
    return grad_x


def _as_laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory order of `like`, which has no gaps; copied only if it is not already."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def compile_cases() -> Iterator[CompileCase]:
    """Every dtype that needs another vector length, for a tensor of a multiple of 16 elements."""
    for architecture in (80, 90):
        for dtype in ("bf16", "fp32"):
            for direction, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
                pointers = [p.name for p in kernel.params if p.name.endswith("_ptr")]
                yield CompileCase(
                    name=f"gelu_{direction}/{dtype}",
                    kernel=kernel,
                    types=dict.fromkeys(pointers, f"*{dtype}") | {"elements": "i64"},
                    constants={"SLOPE": SLOPE, "CUBIC": CUBIC, "BLOCK": BLOCK},
                    warps=WARPS,
                    stages=3,
                    architecture=architecture,
                    aligned=("elements",),
                )
