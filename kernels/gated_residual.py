"""The end of a branch: x + gate * branch in one pass.

    dx = dout,  dbranch = gate dout,  dgate = sum dout branch over the tokens of a row of the gate
The branch is saved for the gate's gradient only. Least traffic in bytes an element of [B, L, D], for an fp32 stream with the branch
in bf16 and one row of the gate a sample or a frame: 10 forward (x, branch; out) and 8 backward (dout, branch; dbranch: dx is dout
itself). A row a token adds 4 to each, and 4 for the gate's gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import Backend, has_kernel, pointwise_backend
from .modulated_norm import check_inputs, per_token, reference_residual, sum_tokens


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch in the dtype of x, for x and branch [B, L, D] and gate [B, R, D], of which token t takes row t // (L / R).

    R is 1 for a row a sample, the frames for a row a frame, L for a row a token. The gate is fp32 (fp64 for fp64 x) and may be
    a view of a larger table, which is read in place. Arithmetic is fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, D over 8192, or an empty L, on every backend alike.
    """
    check_inputs("gated_residual", x, branch, {"gate": gate}, x.dtype, eps=1.0)
    if pointwise_backend("gated_residual", x) is Backend.own:
        return gated_residual_forward(x, branch, gate)
    return reference_residual(x, branch, gate)


@torch.library.custom_op("muybridge::gated_residual", mutates_args=())
def gated_residual_forward(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """The operator behind `gated_residual`."""
    if has_kernel(x) and has_kernel(branch):
        from .gated_residual_kernels import run_forward  # here, so that machines without Triton can import this module

        return run_forward(x, branch, gate)
    return reference_residual(x, branch, gate).contiguous()


@gated_residual_forward.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("muybridge::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    grad: Tensor, branch: Tensor | None, gate: Tensor, branch_dtype: torch.dtype, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of branch and gate, empty where `needs` has false; the same inputs give the same bits.

    `branch` is only read for the gradient of the gate.
    """
    if has_kernel(grad) and (branch is None or has_kernel(branch)):
        from .gated_residual_kernels import run_backward

        return run_backward(grad, branch, gate, branch_dtype=branch_dtype, needs=needs)
    needs_branch, needs_gate = needs
    wide = grad.to(gate.dtype).contiguous()
    grad_branch = (wide * per_token(gate, grad)).to(branch_dtype)
    grad_gate = None if branch is None else sum_tokens(wide * branch, gate)
    return [
        grad_branch if needs_branch else grad.new_empty(0),
        grad_gate if needs_gate and grad_gate is not None else grad.new_empty(0),
    ]


@gated_residual_backward.register_fake
def _(
    grad: Tensor, branch: Tensor | None, gate: Tensor, branch_dtype: torch.dtype, needs: Sequence[bool]
) -> list[Tensor]:
    needs_branch, needs_gate = needs
    return [
        grad.new_empty(grad.shape, dtype=branch_dtype) if needs_branch else grad.new_empty(0),
        gate.new_empty(gate.shape) if needs_gate else grad.new_empty(0),
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _x, branch, gate = inputs
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    branch, gate = ctx.saved_tensors
    _, needs_branch, needs_gate = ctx.needs_input_grad
    if not needs_branch and not needs_gate:
        return grad, None, None
    grad_branch, grad_gate = gated_residual_backward(grad, branch, gate, ctx.branch_dtype, [needs_branch, needs_gate])
    return grad, grad_branch if needs_branch else None, grad_gate if needs_gate else None


gated_residual_forward.register_autograd(_backward, setup_context=_save_for_backward)
