"""Rows of the model width D held in registers, for kernels whose programs work on whole tokens; and how programs share tokens.

Triton's blocks have power-of-two sizes, which common widths (1536, 3072, 5120) are not. A row is therefore a tuple of blocks,
as 3 x 512 or 5 x 1024, and blocks are masked only where no such split fits (at most 8 blocks). Lanes past the width load as
zeros and are not stored.
"""
# mypy: disable-error-code=assignment
# (The tuples start empty and grow.)

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase


@triton.jit
def load_row(base, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """WIDTH numbers from `base`, as a tuple of fp32 blocks."""
    row = ()
    for i in tl.static_range((WIDTH + TILE - 1) // TILE):
        lanes = tl.arange(0, TILE)
        if WIDTH % TILE == 0:
            row = row + (tl.load(base + i * TILE + lanes).to(tl.float32),)
        else:
            row = row + (tl.load(base + i * TILE + lanes, mask=lanes < WIDTH - i * TILE, other=0.0).to(tl.float32),)
    return row


@triton.jit
def store_row(base, row, WIDTH: tl.constexpr, TILE: tl.constexpr):
    for i in tl.static_range(len(row)):
        lanes = tl.arange(0, TILE)
        values = row[i].to(base.dtype.element_ty)
        if WIDTH % TILE == 0:
            tl.store(base + i * TILE + lanes, values)
        else:
            tl.store(base + i * TILE + lanes, values, mask=lanes < WIDTH - i * TILE)


@triton.jit
def zero_row(WIDTH: tl.constexpr, TILE: tl.constexpr):
    row = ()
    for _ in tl.static_range((WIDTH + TILE - 1) // TILE):
        row = row + (tl.zeros([TILE], tl.float32),)
    return row


@triton.jit
def add_rows(a, b):
    row = ()
    for i in tl.static_range(len(a)):
        row = row + (a[i] + b[i],)
    return row


@triton.jit
def multiply_rows(a, b):
    row = ()
    for i in tl.static_range(len(a)):
        row = row + (a[i] * b[i],)
    return row


@triton.jit
def sum_row(row):
    """The sum over a row: blocks first, so that threads exchange one number each."""
    total = row[0]
    for i in tl.static_range(1, len(row)):
        total += row[i]
    return tl.sum(total, 0)


@triton.jit
def table_offset(token, tokens, tokens_per_row, stride_b, stride_r):
    """Where the row of a token, of all [B * L], begins in a table [B, R, D]."""
    sample, row = (
        token // tokens,
        token % tokens // tokens_per_row,
    )  # in 32 bits: dividing 64 takes a hundred instructions
    return tl.cast(sample, tl.int64) * stride_b + tl.cast(row, tl.int64) * stride_r


@triton.jit
def token_range(program, segment, chunk):
    """First token and last + 1 of a program, of all [B * L]: up to `chunk` tokens inside one segment."""
    chunks = tl.cdiv(segment, chunk)
    start = program // chunks * segment
    first = start + (program % chunks) * chunk
    return first, tl.minimum(first + chunk, start + segment)


def launch_constants(width: int) -> dict[str, int]:
    """The block size that masks the fewest lanes with at most 8 blocks (the largest such), and warps for it.

    A thread has 4 neighbouring numbers of a block, one load of 16 bytes in fp32. With 8 of them (16 bytes in bf16) the wide rows'
    backward kernels spill registers, and the blocks pass through shared memory between loads and stores.
    """
    sizes = [size for size in (1024, 512, 256, 128, 64, 32, 16) if triton.cdiv(width, size) <= 8]
    tile = min(sizes, key=lambda size: triton.cdiv(width, size) * size)
    return {"WIDTH": width, "TILE": tile, "num_warps": max(1, tile // 128)}


@dataclass(frozen=True)
class TokenPlan:
    """How many programs walk over how many tokens. A segment is a run of tokens with the same row of every table."""

    programs: int
    segment: int
    chunk: int


def plan_tokens(batch: int, tokens: int, table_rows: Iterable[int]) -> TokenPlan:
    """For L tokens in B samples and the number of rows R of each table whose gradient is added up.

    The plan depends on sizes only, so that sums are the same on every GPU. A thousand programs fill the largest GPUs; the partial
    sums of three tables over chunks of 32 tokens (480p) are 4 % of the traffic.
    """
    segment = tokens // max((rows for rows in table_rows if rows < tokens), default=1)
    chunk = min(max(triton.next_power_of_2(triton.cdiv(batch * tokens, 1024)), 4), 64)
    return TokenPlan(batch * (tokens // segment) * triton.cdiv(segment, chunk), segment, chunk)


def empty_partial_sums(table: Tensor, tokens: int, plan: TokenPlan) -> Tensor:
    """Room for the gradient of a table [B, R, D]: a row a program, or a row a token where each token has its own."""
    batch, rows, width = table.shape
    return table.new_empty(batch * tokens if rows == tokens else plan.programs, width)


def add_partial_sums(partial: Tensor, table: Tensor) -> Tensor:
    """The gradient of a table from what the programs stored; they are numbered in the order of their tokens."""
    if partial.numel() == table.numel():
        return partial.view(table.shape)
    batch, rows, width = table.shape
    return partial.view(batch, rows, -1, width).sum(2)


def tokens_per_row(table: Tensor | None, tokens: int) -> int:
    return tokens if table is None else tokens // table.shape[1]


def row_strides(table: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if table is None else table.stride()[:2]


def bf16_compile_case(kernel: Any, name: str, *, width: int, architecture: int, **constants: Any) -> CompileCase:
    """A launch on an fp32 stream with bf16 branches and outputs; pointers in `constants` are None, for absent tensors."""
    half = {"branch_ptr", "normed_ptr", "grad_normed_ptr", "grad_branch_ptr"}
    launch = launch_constants(width)
    warps = launch.pop("num_warps")
    arguments = [p.name for p in kernel.params if p.name not in constants and p.name not in launch]
    types = {name: "*fp32" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32" for name in arguments}
    types |= dict.fromkeys(half & set(arguments), "*bf16")
    strides = tuple(name for name in arguments if name.startswith("stride_"))
    return CompileCase(
        f"{name}/bf16/{width}", kernel, types, constants | launch, warps, 3, architecture, aligned=strides
    )
