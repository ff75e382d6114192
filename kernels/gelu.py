"""GELU with the tanh approximation, in one pass each way, that saves only its input.

`gelu_tanh` is the public name. On CUDA it calls the operator `muybridge::gelu_tanh`; elsewhere it is PyTorch's own.
The formula is that of Hendrycks and Gimpel 2016 (arXiv:1606.08415), here with s = sigmoid(k (x + a x^3)) and k = sqrt(8 / pi),
since tanh(z) = 2 sigmoid(2 z) - 1:
    gelu(x) = x (1 + tanh(k / 2 (x + a x^3))) / 2 = x s,  d gelu / dx = s + x s (1 - s) k (1 + 3 a x^2)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import KERNEL_DTYPES, Backend, has_kernel, pointwise_backend

SLOPE = math.sqrt(8 / math.pi)  # k
CUBIC = 0.044715  # a


def reference_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    """The mathematics of the backward kernel."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sigmoid = torch.sigmoid(SLOPE * (wide + CUBIC * wide**3))
    slope = sigmoid + wide * sigmoid * (1 - sigmoid) * SLOPE * (1 + 3 * CUBIC * wide**2)
    return (grad_out * slope).to(x.dtype)


@torch.library.custom_op("muybridge::gelu_tanh", mutates_args=())
def gelu_forward(x: Tensor) -> Tensor:
    """The operator behind `gelu_tanh`."""
    if has_kernel(x):
        from .gelu_kernels import run_forward  # here, so that machines without Triton can import this module

        return run_forward(x)
    return torch.empty_like(x).copy_(F.gelu(x, approximate="tanh"))


@torch.library.custom_op("muybridge::gelu_tanh_backward", mutates_args=())
def gelu_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    """The gradient of x."""
    if has_kernel(x):
        from .gelu_kernels import run_backward

        return run_backward(grad_out, x)
    return torch.empty_like(x).copy_(reference_backward(grad_out, x))


@gelu_forward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@gelu_backward.register_fake
def _(grad_out: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> Tensor:
    return gelu_backward(grad_out, *ctx.saved_tensors)


gelu_forward.register_autograd(_backward, setup_context=_save_for_backward)


def gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh") of a tensor of any shape, in fp32 inside (fp64 for fp64). Nothing is cast under autocast.

    A tensor without gaps keeps its strides, whatever their order; another one is copied.

    Raises:
        ValueError: a dtype that is not a float.
    """
    if x.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(
            f"gelu_tanh: x {list(x.shape)} {x.dtype} on {x.device} must be float32, float16, bfloat16 or float64"
        )
    if pointwise_backend("gelu", x) is Backend.own:
        return gelu_forward(x)
    return F.gelu(x, approximate="tanh")
