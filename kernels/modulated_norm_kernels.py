"""The kernels of the residual and its norm, and the functions that run them. Formulas: modulated_norm.py.

Forward: one program per token; its row is read once and stays in registers. Neighbouring tokens read the same row of shift,
scale and gate, which stays in cache. Backward: one program walks over a chunk of tokens, adds up the gradients of those rows
in registers and stores its partial sums, which torch adds. Nothing is added atomically.
"""
# mypy: disable-error-code=assignment
# (Rows are tuples that start empty and grow.)

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import on_device_of, with_unit_stride
from .compile_case import CompileCase
from .row_tiles import (
    add_partial_sums,
    add_rows,
    bf16_compile_case,
    empty_partial_sums,
    launch_constants,
    load_row,
    multiply_rows,
    plan_tokens,
    row_strides,
    store_row,
    sum_row,
    table_offset,
    token_range,
    tokens_per_row,
    zero_row,
)


@triton.jit(do_not_specialize=["tokens", "tokens_per_gate", "tokens_per_norm"])
def residual_norm_kernel(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, stream_ptr, normed_ptr, mean_ptr, rstd_ptr,
    stride_gate_b, stride_gate_r, stride_scale_b, stride_scale_r, stride_shift_b, stride_shift_r,
    tokens, tokens_per_gate, tokens_per_norm, eps,
    OFFSET: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per token. `branch_ptr` is None for the norm alone, `gate_ptr` where nothing is gated."""
    token = tl.program_id(0)
    here = token.to(tl.int64) * WIDTH
    x = load_row(x_ptr + here, WIDTH, TILE)
    if branch_ptr is not None:
        branch = load_row(branch_ptr + here, WIDTH, TILE)
        if gate_ptr is not None:
            offset = table_offset(token, tokens, tokens_per_gate, stride_gate_b, stride_gate_r)
            branch = multiply_rows(branch, load_row(gate_ptr + offset, WIDTH, TILE))
        x = _round(add_rows(x, branch), stream_ptr)  # the norm sees what backward will read
        store_row(stream_ptr + here, x, WIDTH, TILE)

    mean = sum_row(x) / WIDTH
    centred = _centre(x, mean, WIDTH, TILE)
    rstd = tl.math.rsqrt(sum_row(multiply_rows(centred, centred)) / WIDTH + eps)
    tl.store(mean_ptr + token, mean)
    tl.store(rstd_ptr + token, rstd)

    offset = table_offset(token, tokens, tokens_per_norm, stride_scale_b, stride_scale_r)
    scale = load_row(scale_ptr + offset, WIDTH, TILE)
    offset = table_offset(token, tokens, tokens_per_norm, stride_shift_b, stride_shift_r)
    shift = load_row(shift_ptr + offset, WIDTH, TILE)
    normed = ()
    for i in tl.static_range(len(x)):
        normed = normed + (centred[i] * rstd * (OFFSET + scale[i]) + shift[i],)
    store_row(normed_ptr + here, normed, WIDTH, TILE)


@triton.jit(do_not_specialize=["tokens", "segment", "chunk", "tokens_per_gate", "tokens_per_norm"])
def residual_norm_backward_kernel(
    grad_stream_ptr, grad_normed_ptr, stream_ptr, mean_ptr, rstd_ptr, branch_ptr, gate_ptr, scale_ptr,
    grad_x_ptr, grad_branch_ptr, grad_gate_ptr, grad_scale_ptr, grad_shift_ptr,
    stride_gate_b, stride_gate_r, stride_scale_b, stride_scale_r,
    tokens, segment, chunk, tokens_per_gate, tokens_per_norm,
    GATE_PER_TOKEN: tl.constexpr, NORM_PER_TOKEN: tl.constexpr,
    OFFSET: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per chunk of tokens. Pointers to gradients that nobody needs, or that are zero, are None."""
    program = tl.program_id(0)
    first, last = token_range(program, segment, chunk)
    grad_gate, grad_scale, grad_shift = zero_row(WIDTH, TILE), zero_row(WIDTH, TILE), zero_row(WIDTH, TILE)
    for token in range(first, last):
        # Everything is loaded before the sums over the row, at which the warps wait for each other.
        here = tl.cast(token, tl.int64) * WIDTH
        stream = load_row(stream_ptr + here, WIDTH, TILE)
        grad_normed = load_row(grad_normed_ptr + here, WIDTH, TILE)
        if grad_stream_ptr is not None:
            grad_stream = load_row(grad_stream_ptr + here, WIDTH, TILE)
        if grad_gate_ptr is not None:
            branch = load_row(branch_ptr + here, WIDTH, TILE)
        offset = table_offset(token, tokens, tokens_per_norm, stride_scale_b, stride_scale_r)
        scale = load_row(scale_ptr + offset, WIDTH, TILE)
        mean, rstd = tl.load(mean_ptr + token), tl.load(rstd_ptr + token)

        unit, grad_unit = (), ()  # n and its gradient
        for i in tl.static_range(len(stream)):
            unit = unit + ((stream[i] - mean) * rstd,)
            grad_unit = grad_unit + (grad_normed[i] * (OFFSET + scale[i]),)
        if grad_shift_ptr is not None:
            if NORM_PER_TOKEN:
                store_row(grad_shift_ptr + here, grad_normed, WIDTH, TILE)
            else:
                grad_shift = add_rows(grad_shift, grad_normed)
        if grad_scale_ptr is not None:
            if NORM_PER_TOKEN:
                store_row(grad_scale_ptr + here, multiply_rows(grad_normed, unit), WIDTH, TILE)
            else:
                grad_scale = add_rows(grad_scale, multiply_rows(grad_normed, unit))

        along_one = sum_row(grad_unit) / WIDTH
        along_unit = sum_row(multiply_rows(grad_unit, unit)) / WIDTH
        grad_x = ()
        for i in tl.static_range(len(stream)):
            grad_x = grad_x + (rstd * (grad_unit[i] - along_one - unit[i] * along_unit),)
        if grad_stream_ptr is not None:
            grad_x = add_rows(grad_x, grad_stream)
        if grad_x_ptr is not None:
            store_row(grad_x_ptr + here, grad_x, WIDTH, TILE)
        if grad_gate_ptr is not None:
            if GATE_PER_TOKEN:
                store_row(grad_gate_ptr + here, multiply_rows(grad_x, branch), WIDTH, TILE)
            else:
                grad_gate = add_rows(grad_gate, multiply_rows(grad_x, branch))
        if grad_branch_ptr is not None:
            if gate_ptr is not None:
                offset = table_offset(token, tokens, tokens_per_gate, stride_gate_b, stride_gate_r)
                grad_x = multiply_rows(grad_x, load_row(gate_ptr + offset, WIDTH, TILE))
            store_row(grad_branch_ptr + here, grad_x, WIDTH, TILE)

    partial = program.to(tl.int64) * WIDTH
    if grad_gate_ptr is not None and not GATE_PER_TOKEN:
        store_row(grad_gate_ptr + partial, grad_gate, WIDTH, TILE)
    if grad_scale_ptr is not None and not NORM_PER_TOKEN:
        store_row(grad_scale_ptr + partial, grad_scale, WIDTH, TILE)
    if grad_shift_ptr is not None and not NORM_PER_TOKEN:
        store_row(grad_shift_ptr + partial, grad_shift, WIDTH, TILE)


@triton.jit
def _round(row, like_ptr):
    """The fp32 row as it will be stored."""
    rounded = ()
    for i in tl.static_range(len(row)):
        rounded = rounded + (row[i].to(like_ptr.dtype.element_ty).to(tl.float32),)
    return rounded


@triton.jit
def _centre(row, mean, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """row - mean, with zeros past the width so that squares can be summed."""
    centred = ()
    for i in tl.static_range(len(row)):
        if WIDTH % TILE == 0:
            centred = centred + (row[i] - mean,)
        else:
            centred = centred + (tl.where(tl.arange(0, TILE) < WIDTH - i * TILE, row[i] - mean, 0.0),)
    return centred


def run_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    offset: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the stream and its norm [B, L, D], and mean and 1 / deviation [B, L]. Without a branch the stream is empty."""
    batch, tokens, width = x.shape
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    gate = None if gate is None else with_unit_stride(gate)
    scale, shift = with_unit_stride(scale), with_unit_stride(shift)
    stream, normed = x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        with on_device_of(x):
            residual_norm_kernel[(batch * tokens,)](
                x, branch, gate, scale, shift, None if branch is None else stream, normed, mean, rstd,
                *row_strides(gate), *row_strides(scale), *row_strides(shift),
                tokens, tokens_per_row(gate, tokens), tokens_per_row(scale, tokens), eps,
                OFFSET=offset, **launch_constants(width),
            )  # fmt: skip
    return stream, normed, mean, rstd


def run_backward(
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
    branch_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Returns the gradients of x, branch, gate, scale and shift, empty where `needs` has false."""
    batch, tokens, width = stream.shape
    grad_normed, stream, mean, rstd = (t.contiguous() for t in (grad_normed, stream, mean, rstd))
    grad_stream = None if grad_stream is None else grad_stream.contiguous()
    branch = None if branch is None else branch.contiguous()
    gate, scale = None if gate is None else with_unit_stride(gate), with_unit_stride(scale)
    needs_x, needs_branch, needs_gate, needs_scale, needs_shift = needs
    tables = (gate if needs_gate else None, scale if needs_scale else None, scale if needs_shift else None)
    plan = plan_tokens(batch, tokens, (table.shape[1] for table in tables if table is not None))

    grad_x = torch.empty_like(stream) if needs_x else None
    grad_branch = torch.empty_like(stream, dtype=branch_dtype) if needs_branch else None
    partial = [None if table is None else empty_partial_sums(table, tokens, plan) for table in tables]
    if stream.numel() > 0:
        with on_device_of(stream):
            residual_norm_backward_kernel[(plan.programs,)](
                grad_stream, grad_normed, stream, mean, rstd, branch, gate, scale, grad_x, grad_branch, *partial,
                *row_strides(gate), *row_strides(scale),
                tokens, plan.segment, plan.chunk, tokens_per_row(gate, tokens), tokens_per_row(scale, tokens),
                GATE_PER_TOKEN=tokens_per_row(gate, tokens) == 1, NORM_PER_TOKEN=tokens_per_row(scale, tokens) == 1,
                OFFSET=offset, **launch_constants(width),
            )  # fmt: skip
    sums = [None if p is None or t is None else add_partial_sums(p, t) for p, t in zip(partial, tables, strict=True)]
    return [stream.new_empty(0) if grad is None else grad for grad in (grad_x, grad_branch, *sums)]


# Where in a block the kernels run, as the arguments that are fixed there.
FORWARD_PLACES: dict[str, dict[str, Any]] = {
    "modulated": {"branch_ptr": None, "gate_ptr": None, "stream_ptr": None, "OFFSET": 1.0},
    "residual_modulated": {"gate_ptr": None, "OFFSET": 1.0},
    "gated_residual_affine": {"OFFSET": 0.0},
}
NO_RESIDUAL: dict[str, Any] = dict.fromkeys(
    ("grad_stream_ptr", "branch_ptr", "gate_ptr", "grad_branch_ptr", "grad_gate_ptr")
)
BACKWARD_PLACES: dict[str, dict[str, Any]] = {
    "modulated": {**NO_RESIDUAL, "OFFSET": 1.0},
    "residual_modulated": {"branch_ptr": None, "gate_ptr": None, "grad_gate_ptr": None, "OFFSET": 1.0},
    "gated_residual_affine": {"OFFSET": 0.0},
}


def compile_cases() -> Iterator[CompileCase]:
    """What the blocks of a DiT launch, in bf16 on an fp32 stream: all of it at the width with the fewest registers to spare."""
    for architecture, width in itertools.product((80, 90), (128, 1536, 5120)):
        sizes = {"width": width, "architecture": architecture}
        places = BACKWARD_PLACES if width > 128 else ["gated_residual_affine"]
        for place in places:
            yield bf16_compile_case(residual_norm_kernel, f"residual_norm/{place}", **sizes, **FORWARD_PLACES[place])
        for place, per_token in itertools.product(places, (False, True) if width == 5120 else (False,)):
            fixed = BACKWARD_PLACES[place]
            has_gate = "gate_ptr" not in fixed
            yield bf16_compile_case(
                residual_norm_backward_kernel,
                f"residual_norm_backward/{place}/{'per_token' if per_token else 'per_sample'}",
                GATE_PER_TOKEN=has_gate and per_token,
                NORM_PER_TOKEN=not has_gate and per_token,
                **sizes,
                **fixed,
            )
