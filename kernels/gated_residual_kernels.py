"""The kernels of the gated residual, and the functions that run them. Formulas: gated_residual.py; programs: row_tiles.py."""

import itertools
from collections.abc import Iterator, Sequence

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
    table_offset,
    token_range,
    tokens_per_row,
    zero_row,
)


@triton.jit(do_not_specialize=["tokens", "tokens_per_gate"])
def gated_residual_kernel(
    x_ptr, branch_ptr, gate_ptr, out_ptr, stride_gate_b, stride_gate_r, tokens, tokens_per_gate,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    token = tl.program_id(0)
    here = token.to(tl.int64) * WIDTH
    x = load_row(x_ptr + here, WIDTH, TILE)
    branch = load_row(branch_ptr + here, WIDTH, TILE)
    offset = table_offset(token, tokens, tokens_per_gate, stride_gate_b, stride_gate_r)
    gate = load_row(gate_ptr + offset, WIDTH, TILE)
    store_row(out_ptr + here, add_rows(x, multiply_rows(branch, gate)), WIDTH, TILE)


@triton.jit(do_not_specialize=["tokens", "segment", "chunk", "tokens_per_gate"])
def gated_residual_backward_kernel(
    grad_ptr, branch_ptr, gate_ptr, grad_branch_ptr, grad_gate_ptr,
    stride_gate_b, stride_gate_r, tokens, segment, chunk, tokens_per_gate,
    GATE_PER_TOKEN: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per chunk of tokens. Pointers to gradients that nobody needs are None."""
    program = tl.program_id(0)
    first, last = token_range(program, segment, chunk)
    grad_gate = zero_row(WIDTH, TILE)
    for token in range(first, last):
        here = tl.cast(token, tl.int64) * WIDTH
        grad = load_row(grad_ptr + here, WIDTH, TILE)
        if grad_branch_ptr is not None:
            offset = table_offset(token, tokens, tokens_per_gate, stride_gate_b, stride_gate_r)
            gate = load_row(gate_ptr + offset, WIDTH, TILE)
            store_row(grad_branch_ptr + here, multiply_rows(grad, gate), WIDTH, TILE)
        if grad_gate_ptr is not None:
            product = multiply_rows(grad, load_row(branch_ptr + here, WIDTH, TILE))
            if GATE_PER_TOKEN:
                store_row(grad_gate_ptr + here, product, WIDTH, TILE)
            else:
                grad_gate = add_rows(grad_gate, product)
    if grad_gate_ptr is not None and not GATE_PER_TOKEN:
        store_row(grad_gate_ptr + program.to(tl.int64) * WIDTH, grad_gate, WIDTH, TILE)


def run_forward(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Returns x + gate * branch [B, L, D]."""
    batch, tokens, width = x.shape
    x, branch, gate = x.contiguous(), branch.contiguous(), with_unit_stride(gate)
    out = torch.empty_like(x)
    if x.numel() > 0:
        with on_device_of(x):
            gated_residual_kernel[(batch * tokens,)](
                x, branch, gate, out, *row_strides(gate), tokens, tokens_per_row(gate, tokens),
                **launch_constants(width),
            )  # fmt: skip
    return out


def run_backward(
    grad: Tensor, branch: Tensor | None, gate: Tensor, *, branch_dtype: torch.dtype, needs: Sequence[bool]
) -> list[Tensor]:
    """Returns the gradients of branch and gate, empty where `needs` has false; `branch` is read for the gate's only."""
    batch, tokens, width = grad.shape
    grad, branch, gate = grad.contiguous(), None if branch is None else branch.contiguous(), with_unit_stride(gate)
    needs_branch, needs_gate = needs
    plan = plan_tokens(batch, tokens, [gate.shape[1]] if needs_gate else [])
    grad_branch = torch.empty_like(grad, dtype=branch_dtype) if needs_branch else None
    partial = empty_partial_sums(gate, tokens, plan) if needs_gate else None
    if grad.numel() > 0:
        with on_device_of(grad):
            gated_residual_backward_kernel[(plan.programs,)](
                grad, branch, gate, grad_branch, partial, *row_strides(gate),
                tokens, plan.segment, plan.chunk, tokens_per_row(gate, tokens),
                GATE_PER_TOKEN=tokens_per_row(gate, tokens) == 1, **launch_constants(width),
            )  # fmt: skip
    grad_gate = None if partial is None else add_partial_sums(partial, gate)
    return [grad.new_empty(0) if result is None else result for result in (grad_branch, grad_gate)]


def compile_cases() -> Iterator[CompileCase]:
    """The end of a block, in bf16 on an fp32 stream."""
    for architecture, width in itertools.product((80, 90), (1536, 5120)):
        yield bf16_compile_case(gated_residual_kernel, "gated_residual", width=width, architecture=architecture)
        for per_token in (False, True) if width == 5120 else (False,):
            yield bf16_compile_case(
                gated_residual_backward_kernel,
                f"gated_residual_backward/{'per_token' if per_token else 'per_sample'}",
                width=width,
                architecture=architecture,
                GATE_PER_TOKEN=per_token,
            )
