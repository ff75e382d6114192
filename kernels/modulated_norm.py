"""The residual and its norm in one pass: x' = x + gate * branch, then LayerNorm(x') times and plus a row of modulation.

With n = (x' - mean(x')) r and r = (var(x') + eps)^(-1/2) over the width D (biased variance, two passes over the row in registers),
    y = n (offset + scale) + shift,
where offset is 1 for a modulation (adaLN, Peebles and Xie 2022, arXiv:2212.09748) and 0 for a LayerNorm's own weight and bias.

Backward, for the gradients dy of y and dx' of x' (from its other readers). With u = dy (offset + scale), the gradient of n,
    dx = r (u - mean(u) - n mean(u n)) + dx'
since the derivative of n is r times the projection away from 1 and n, both of squared length D. Then
    dbranch = gate dx,  dgate = sum dx branch,  dscale = sum dy n,  dshift = sum dy
over the tokens of a row of gate, scale or shift. n is computed again from x', mean and r, which are what is saved, with the
branch where the gate has a gradient.

Least traffic in bytes an element of [B, L, D], for an fp32 stream with branch and y in bf16 (tables of one row a sample or a frame
come from cache; a table of one row a token adds 4, and 4 for its gradient):
                    forward                         backward
    norm alone      6  (x; y)                       10  (dy, x; dx)
    with residual   12 (x, branch; x', y)           16  (dy, dx', x'; dx, dbranch), and 2 for branch where gated
The kernels move these and the partial sums of the tables' gradients: 24 D bytes a chunk of 32 tokens or so.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import KERNEL_DTYPES, Backend, has_kernel, pointwise_backend

WIDTH_LIMIT = 8192  # of a row in registers


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in `dtype`, for x [B, L, D] and shift, scale [B, R, D].

    Token t takes row t // (L / R): R is 1 for a row a sample, the frames for a row a frame, L for a row a token. The rows are
    fp32 (fp64 for fp64 x) and may be views of a larger table, which are read in place. Statistics and arithmetic are fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, D over 8192, an empty L, or an eps that is not positive.
            The rules are the same on every backend.
    """
    check_inputs("modulated_norm", x, None, {"shift": shift, "scale": scale}, dtype, eps)
    if pointwise_backend("residual_norm", x) is Backend.own:
        return residual_norm(x, None, None, scale, shift, 1.0, eps, dtype)[1]
    return reference_modulated_norm(x, shift, scale, eps=eps, dtype=dtype)


def residual_modulated_norm(
    x: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    gate: Tensor | None = None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * branch in the dtype of x, and LayerNorm(x') * (1 + scale) + shift in `dtype`; both [B, L, D].

    `gate` [B, R, D] is like shift and scale; None adds the branch as it is. The rest is as in `modulated_norm`.
    """
    tables = {"shift": shift, "scale": scale} | ({} if gate is None else {"gate": gate})
    check_inputs("residual_modulated_norm", x, branch, tables, dtype, eps)
    if pointwise_backend("residual_norm", x) is Backend.own:
        return residual_norm(x, branch, gate, scale, shift, 1.0, eps, dtype)[:2]
    stream = reference_residual(x, branch, gate)
    return stream, reference_modulated_norm(stream, shift, scale, eps=eps, dtype=dtype)


def residual_affine_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    gate: Tensor | None = None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * branch in the dtype of x, and LayerNorm(x') * weight + bias in `dtype`; both [B, L, D].

    `weight` and `bias` [D] are of any float dtype. The rest is as in `residual_modulated_norm`.
    """
    check_inputs("residual_affine_norm", x, branch, {} if gate is None else {"gate": gate}, dtype, eps)
    if not weight.shape == bias.shape == x.shape[2:] or not weight.device == bias.device == x.device:
        rule = f"must be [D] on the device of x {list(x.shape)} on {x.device}"
        raise ValueError(f"residual_affine_norm: {_described({'weight': weight, 'bias': bias})}: {rule}")
    wide = _wide(x)
    if pointwise_backend("residual_norm", x) is Backend.own:
        scale, shift = (table.to(wide).expand(x.shape[0], 1, -1) for table in (weight, bias))
        return residual_norm(x, branch, gate, scale, shift, 0.0, eps, dtype)[:2]
    stream = reference_residual(x, branch, gate)
    return stream, F.layer_norm(stream.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)


def reference_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * branch in the dtype of x."""
    if gate is None:
        return (x + branch).to(x.dtype)
    return torch.addcmul(x, branch, per_token(gate, x)).to(x.dtype)


def reference_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """`modulated_norm` in plain torch."""
    normed = F.layer_norm(x.to(_wide(x)), x.shape[2:], eps=eps)
    return torch.addcmul(per_token(shift, x), normed, per_token(1 + scale, x)).to(dtype)


def reference_backward(
    grad_stream: Tensor | None,
    grad_normed: Tensor,
    stream: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    *,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The mathematics of the backward kernel: gradients of x, branch, gate (None without branch), scale and shift."""
    wide = _wide(stream)
    unit = (stream.to(wide) - mean[..., None]) * rstd[..., None]  # n
    grad_shift = grad_normed.to(wide)
    grad_unit = grad_shift * (offset + per_token(scale, stream))  # u
    along_one, along_unit = grad_unit.mean(-1, keepdim=True), (grad_unit * unit).mean(-1, keepdim=True)
    grad_x = rstd[..., None] * (grad_unit - along_one - unit * along_unit)
    if grad_stream is not None:
        grad_x = grad_x + grad_stream
    grad_branch = grad_x if gate is None else grad_x * per_token(gate, stream)
    grad_gate = None if gate is None or branch is None else sum_tokens(grad_x * branch, gate)
    return grad_x, grad_branch, grad_gate, sum_tokens(grad_shift * unit, scale), sum_tokens(grad_shift, scale)


@torch.library.custom_op("muybridge::residual_norm", mutates_args=())
def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    offset: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator behind all norms here: x', its norm, and mean and r [B, L], which the backward pass needs.

    Without a branch x' is x, and the first output is empty: an operator may not return its input.
    """
    if _has_kernel(x, branch):
        from .modulated_norm_kernels import run_forward  # here, so that machines without Triton can import this module

        return run_forward(x, branch, gate, scale, shift, offset=offset, eps=eps, dtype=dtype)
    stream = x if branch is None else reference_residual(x, branch, gate).contiguous()
    wide = stream.to(_wide(x)).contiguous()
    mean = wide.mean(-1)
    centred = wide - mean[..., None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    normed = centred * rstd[..., None] * (offset + per_token(scale, x)) + per_token(shift, x)
    return x.new_empty(0) if branch is None else stream, normed.to(dtype), mean, rstd


@residual_norm.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    offset: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream, normed = x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=_wide(x)) for _ in range(2))
    return stream, normed, mean, rstd


@torch.library.custom_op("muybridge::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    grad_stream: Tensor | None,
    grad_normed: Tensor,
    stream: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    offset: float,
    branch_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, branch, gate, scale and shift, empty where `needs` has false; the same inputs give the same bits.

    `branch` is only read for the gradient of the gate.
    """
    if _has_kernel(stream, branch):
        from .modulated_norm_kernels import run_backward

        return run_backward(
            grad_stream, grad_normed, stream, mean, rstd, branch, gate, scale,
            offset=offset, branch_dtype=branch_dtype, needs=needs,
        )  # fmt: skip
    grads = reference_backward(grad_stream, grad_normed, stream, mean, rstd, branch, gate, scale, offset=offset)
    dtypes = (stream.dtype, branch_dtype, scale.dtype, scale.dtype, scale.dtype)
    return [
        # A copy, since gradients without a gate are one tensor, and an operator's outputs must not share memory.
        torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format).copy_(grad)
        if needed and grad is not None
        else stream.new_empty(0)
        for grad, dtype, needed in zip(grads, dtypes, needs, strict=True)
    ]


@residual_norm_backward.register_fake
def _(
    grad_stream: Tensor | None,
    grad_normed: Tensor,
    stream: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    offset: float,
    branch_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    likes = (stream, stream.to(branch_dtype), scale if gate is None else gate, scale, scale)
    return [
        like.new_empty(like.shape if needed else 0, dtype=like.dtype if needed else stream.dtype)
        for like, needed in zip(likes, needs, strict=True)
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, branch, gate, scale, _shift, ctx.offset, _eps, _dtype = inputs
    stream, _normed, mean, rstd = output
    ctx.has_branch, ctx.branch_dtype = branch is not None, x.dtype if branch is None else branch.dtype
    kept = branch if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(stream if ctx.has_branch else x, mean, rstd, kept, gate, scale)
    ctx.mark_non_differentiable(mean, rstd, *([] if ctx.has_branch else [stream]))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_stream: Tensor | None, grad_normed: Tensor | None, *_: None) -> tuple[Any, ...]:
    stream, mean, rstd, branch, gate, scale = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads: list[Tensor | None] = [None] * 5
    if grad_stream is not None or grad_normed is not None:
        if grad_normed is None:  # only x' was used
            grad_normed = torch.zeros_like(stream)
        results = residual_norm_backward(
            grad_stream, grad_normed, stream, mean, rstd, branch, gate, scale, ctx.offset, ctx.branch_dtype, needs
        )
        grads = [grad if needed else None for grad, needed in zip(results, needs, strict=True)]
    return *grads, None, None, None


residual_norm.register_autograd(_backward, setup_context=_save_for_backward)


def per_token(table: Tensor, x: Tensor) -> Tensor:
    """A table [B, R, D] so that it broadcasts over x [B, L, D]: itself for 1 or L rows, else each row L / R times."""
    tokens, rows = x.shape[1], table.shape[1]
    if rows in (1, tokens):
        return table
    return table.unsqueeze(2).expand(-1, -1, tokens // rows, -1).flatten(1, 2)


def sum_tokens(terms: Tensor, table: Tensor) -> Tensor:
    """Sums [B, L, D] over the tokens of each row of a table [B, R, D]."""
    return terms.unflatten(1, (table.shape[1], -1)).sum(2)


def check_inputs(
    op: str, x: Tensor, branch: Tensor | None, tables: dict[str, Tensor], dtype: torch.dtype, eps: float
) -> None:
    """Raise ValueError for a stream, branch and tables that do not fit together."""
    rule = _broken_rule(x, branch, tables, dtype)
    if rule:
        tensors = {"x": x} | ({} if branch is None else {"branch": branch}) | tables
        raise ValueError(f"{op}: {_described(tensors)}: must be {rule}")
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: eps={eps} must be positive and finite")


def _broken_rule(x: Tensor, branch: Tensor | None, tables: dict[str, Tensor], dtype: torch.dtype) -> str:
    """The first rule that is broken. Plain loops: a small model on the CPU notices every microsecond here."""
    allowed = (torch.float64,) if x.dtype == torch.float64 else KERNEL_DTYPES
    shape, device, wide, names = x.shape, x.device, _wide(x), ", ".join(tables)
    if len(shape) != 3 or shape[1] < 1 or not 1 <= shape[2] <= WIDTH_LIMIT:
        return f"x [B, L, D] with at least one token and a width of 1 to {WIDTH_LIMIT}"
    if branch is not None and branch.shape != shape:
        return "x and branch of one shape"
    if x.dtype not in allowed or dtype not in allowed or (branch is not None and branch.dtype not in allowed):
        return f"x, branch and output ({dtype}) of float32, float16 and bfloat16, or all of float64"
    if branch is not None and branch.device != device:
        return "on one device"
    first = None
    for table in tables.values():
        rows = table.shape
        if len(rows) != 3 or rows[0] != shape[0] or rows[2] != shape[2] or rows[1] < 1 or shape[1] % rows[1]:
            return f"[B, R, D] for {names}, where R divides the number of tokens L"
        if rows != (first or rows):
            return f"{names} of one shape"
        if table.dtype != wide:
            return f"float32 for {names} (float64 with x in float64)"
        if table.device != device:
            return "on one device"
        first = rows
    return ""


def _described(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(t.shape)} {t.dtype} on {t.device}" for name, t in tensors.items())


def _has_kernel(x: Tensor, branch: Tensor | None) -> bool:
    return has_kernel(x) and (branch is None or has_kernel(branch))


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic on x: at least fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
