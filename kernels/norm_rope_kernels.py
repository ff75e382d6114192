"""The kernels of `rms_norm_rope` and the functions that run them: a row of all heads is read once, kept in registers, written once.

With a row x [D] of one token, its weight w [D] and the rotation R that turns each pair of channels (0, 1), (2, 3), ...:
    r = (mean(x^2) + eps)^(-1/2),  n = r x,  out = R (n * w)
R is orthogonal, so g = R^T d_out undoes the turn, and with u = g * w:
    dw = sum over tokens of g * n,  dx = r (u - n mean(u * n))
because dr = -r^3 mean(x dx). The backward pass needs x and r only, and reads x and d_out once.

Least traffic for bf16, with U = 2 B L D bytes: 2U forward (x in, out out) and 3U backward (x and d_out in, dx out). The rest
is small: 4 bytes of r and 6 of coordinates a token, the table and the weight (which stay in cache), the partial sums of dw.
"""
# mypy: disable-error-code=assignment
# (a tuple that grows tile by tile has a new type each time)

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import on_device_of, with_unit_stride
from .compile_case import CompileCase


@triton.jit
def _load_tile(row, i, HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The i-th TILE heads of a row as fp32 pairs: even and odd channels, each [TILE, BLOCK_K / 2], zero outside the row."""
    heads, columns = tl.arange(0, TILE), tl.arange(0, BLOCK_K)
    pointers = row + i * (TILE * HEAD_WIDTH) + (heads[:, None] * HEAD_WIDTH + columns[None, :])
    # Neighbours are loaded together and then parted: loads of every other channel would not be vectors.
    if HEADS % TILE > 0 or BLOCK_K > HEAD_WIDTH:
        tile = tl.load(pointers, mask=(heads[:, None] < HEADS - i * TILE) & (columns[None, :] < HEAD_WIDTH), other=0.0)
    else:
        tile = tl.load(pointers)
    return tl.split(tl.reshape(tile.to(tl.float32), [TILE, BLOCK_K // 2, 2]))


@triton.jit
def _store_tile(
    row, i, even, odd, HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr
):
    heads, columns = tl.arange(0, TILE), tl.arange(0, BLOCK_K)
    pointers = row + i * (TILE * HEAD_WIDTH) + (heads[:, None] * HEAD_WIDTH + columns[None, :])
    tile = tl.reshape(tl.join(even, odd), [TILE, BLOCK_K]).to(row.dtype.element_ty)
    if HEADS % TILE > 0 or BLOCK_K > HEAD_WIDTH:
        tl.store(pointers, tile, mask=(heads[:, None] < HEADS - i * TILE) & (columns[None, :] < HEAD_WIDTH))
    else:
        tl.store(pointers, tile)


@triton.jit
def _load_rotation(
    table_ptr, coordinates,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, FRAME_PAIRS: tl.constexpr, ROW_PAIRS: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [1, BLOCK_K / 2] of one token: each pair looks up the coordinate of its own axis."""
    pairs = tl.arange(0, BLOCK_K // 2)
    frame = tl.load(coordinates).to(tl.int32)
    row = tl.load(coordinates + 1).to(tl.int32)
    column = tl.load(coordinates + 2).to(tl.int32)
    position = tl.where(pairs < FRAME_PAIRS, frame, tl.where(pairs < FRAME_PAIRS + ROW_PAIRS, row, column))
    pointers = table_ptr + position * HEAD_WIDTH + 2 * pairs
    inside = pairs < HEAD_WIDTH // 2
    cosine = tl.load(pointers, mask=inside, other=0.0)
    sine = tl.load(pointers + 1, mask=inside, other=0.0)
    return cosine[None, :], sine[None, :]


@triton.jit
def _turn(even, odd, cosine, sine):
    return even * cosine - odd * sine, even * sine + odd * cosine


@triton.jit(do_not_specialize=["length"])
def forward_kernel(
    x_ptr, weight_ptr, table_ptr, coordinates_ptr, out_ptr, rstd_ptr,
    stride_xb, stride_xl, stride_cb, length, eps,
    FRAME_PAIRS: tl.constexpr, ROW_PAIRS: tl.constexpr,
    HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program serves one token. `table_ptr` is None where nothing is turned."""
    token = tl.program_id(0)  # index into the flattened [B * L]
    batch, position = (token // length).to(tl.int64), (token % length).to(tl.int64)
    x_row = x_ptr + batch * stride_xb + position * stride_xl
    out_row = out_ptr + token.to(tl.int64) * (HEADS * HEAD_WIDTH)
    if table_ptr is not None:
        coordinates = coordinates_ptr + batch * stride_cb + position * 3
        cosine, sine = _load_rotation(table_ptr, coordinates, HEAD_WIDTH, BLOCK_K, FRAME_PAIRS, ROW_PAIRS)

    evens, odds = (), ()
    squares = tl.zeros([TILE, BLOCK_K // 2], tl.float32)
    for i in tl.static_range((HEADS + TILE - 1) // TILE):
        even, odd = _load_tile(x_row, i, HEADS, HEAD_WIDTH, TILE, BLOCK_K)
        squares += even * even + odd * odd
        evens, odds = evens + (even,), odds + (odd,)
    rstd = tl.rsqrt(tl.sum(squares) / (HEADS * HEAD_WIDTH) + eps)
    tl.store(rstd_ptr + token, rstd)

    for i in tl.static_range((HEADS + TILE - 1) // TILE):
        weight_even, weight_odd = _load_tile(weight_ptr, i, HEADS, HEAD_WIDTH, TILE, BLOCK_K)
        even, odd = evens[i] * rstd * weight_even, odds[i] * rstd * weight_odd
        if table_ptr is not None:
            even, odd = _turn(even, odd, cosine, sine)
        _store_tile(out_row, i, even, odd, HEADS, HEAD_WIDTH, TILE, BLOCK_K)


@triton.jit(do_not_specialize=["length", "tokens"])
def backward_kernel(
    grad_out_ptr, x_ptr, weight_ptr, rstd_ptr, table_ptr, coordinates_ptr, grad_x_ptr, partial_ptr,
    stride_gb, stride_gl, stride_xb, stride_xl, stride_cb, length, tokens,
    FRAME_PAIRS: tl.constexpr, ROW_PAIRS: tl.constexpr,
    HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each program walks over every so many-th token and adds up its share of the weight's gradient."""
    grad_weight_evens, grad_weight_odds = (), ()
    for _ in tl.static_range((HEADS + TILE - 1) // TILE):
        grad_weight_evens = grad_weight_evens + (tl.zeros([TILE, BLOCK_K // 2], tl.float32),)
        grad_weight_odds = grad_weight_odds + (tl.zeros([TILE, BLOCK_K // 2], tl.float32),)

    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        batch, position = tl.cast(token // length, tl.int64), tl.cast(token % length, tl.int64)
        grad_row = grad_out_ptr + batch * stride_gb + position * stride_gl
        x_row = x_ptr + batch * stride_xb + position * stride_xl
        grad_x_row = grad_x_ptr + tl.cast(token, tl.int64) * (HEADS * HEAD_WIDTH)
        rstd = tl.load(rstd_ptr + token)
        if table_ptr is not None:
            coordinates = coordinates_ptr + batch * stride_cb + position * 3
            cosine, sine = _load_rotation(table_ptr, coordinates, HEAD_WIDTH, BLOCK_K, FRAME_PAIRS, ROW_PAIRS)

        evens, odds, grad_evens, grad_odds = (), (), (), ()  # n and u
        sum_evens, sum_odds = (), ()
        products = tl.zeros([TILE, BLOCK_K // 2], tl.float32)
        for i in tl.static_range((HEADS + TILE - 1) // TILE):
            even, odd = _load_tile(x_row, i, HEADS, HEAD_WIDTH, TILE, BLOCK_K)
            even, odd = even * rstd, odd * rstd
            grad_even, grad_odd = _load_tile(grad_row, i, HEADS, HEAD_WIDTH, TILE, BLOCK_K)
            if table_ptr is not None:
                grad_even, grad_odd = _turn(grad_even, grad_odd, cosine, -sine)
            sum_evens = sum_evens + (grad_weight_evens[i] + grad_even * even,)
            sum_odds = sum_odds + (grad_weight_odds[i] + grad_odd * odd,)
            # From cache, for every token: the weight would take a third of the registers that tokens in flight need.
            weight_even, weight_odd = _load_tile(weight_ptr, i, HEADS, HEAD_WIDTH, TILE, BLOCK_K)
            grad_even, grad_odd = grad_even * weight_even, grad_odd * weight_odd
            products += grad_even * even + grad_odd * odd
            evens, odds = evens + (even,), odds + (odd,)
            grad_evens, grad_odds = grad_evens + (grad_even,), grad_odds + (grad_odd,)
        grad_weight_evens, grad_weight_odds = sum_evens, sum_odds
        mean = tl.sum(products) / (HEADS * HEAD_WIDTH)
        for i in tl.static_range((HEADS + TILE - 1) // TILE):
            even, odd = rstd * (grad_evens[i] - evens[i] * mean), rstd * (grad_odds[i] - odds[i] * mean)
            _store_tile(grad_x_row, i, even, odd, HEADS, HEAD_WIDTH, TILE, BLOCK_K)

    partial_row = partial_ptr + tl.program_id(0).to(tl.int64) * (HEADS * HEAD_WIDTH)
    for i in tl.static_range((HEADS + TILE - 1) // TILE):
        _store_tile(
            partial_row, i, grad_weight_evens[i], grad_weight_odds[i], HEADS, HEAD_WIDTH, TILE, BLOCK_K
        )  # fmt: skip


# Tokens that one multiprocessor works on at once in the backward kernel, by warps: what its registers leave room for.
RESIDENT = {1: 16, 2: 8, 4: 2, 8: 2, 16: 1}
# Of an H100 or H200. A constant, so that the weight's gradient is added up in the same order on every GPU.
MULTIPROCESSORS = 132


def run_forward(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    coordinates: Tensor | None,
    axis_pairs: Sequence[int],
    *,
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the heads [B, L, N, K] in `dtype`, and 1 / rms(x) [B, L] in fp32."""
    x, weight = with_unit_stride(x), weight.contiguous()
    batch, length, width = x.shape
    out = x.new_empty(batch, length, heads, width // heads, dtype=dtype)
    rstd = x.new_empty(batch, length, dtype=torch.float32)
    if out.numel() > 0:
        constants, warps = _launch(heads, width // heads, axis_pairs, x.element_size())
        with on_device_of(x):
            forward_kernel[(batch * length,)](
                x, weight, _contiguous(table), _contiguous(coordinates), out, rstd,
                *x.stride()[:2], _batch_stride(coordinates), length, eps,
                **constants, num_warps=warps,
            )  # fmt: skip
    return out, rstd


def run_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    table: Tensor | None,
    coordinates: Tensor | None,
    axis_pairs: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x [B, L, D] and of the weight [D]."""
    heads, head_width = grad_out.shape[2:]
    grad_out, x, weight = with_unit_stride(grad_out.flatten(2)), with_unit_stride(x), weight.contiguous()
    batch, length, width = x.shape
    grad_x = x.new_empty(x.shape)
    if grad_x.numel() == 0:
        return grad_x, torch.zeros_like(weight)
    constants, warps = _launch(heads, head_width, axis_pairs, x.element_size())
    programs = min(batch * length, MULTIPROCESSORS * RESIDENT[warps])
    partial = x.new_empty(programs, width, dtype=torch.float32)
    with on_device_of(x):
        backward_kernel[(programs,)](
            grad_out, x, weight, rstd, _contiguous(table), _contiguous(coordinates), grad_x, partial,
            *grad_out.stride()[:2], *x.stride()[:2], _batch_stride(coordinates), length, batch * length,
            **constants, num_warps=warps,
        )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


def compile_cases() -> Iterator[CompileCase]:
    """Wan 1.3B and 14B, the test model, the widest row of full precision, and a norm without positions."""
    for architecture in (80, 90):
        for heads, head_width, dtype, rope in (
            (12, 128, "bf16", True),
            (12, 128, "bf16", False),
            (40, 128, "bf16", True),
            (40, 128, "fp32", True),
            (2, 64, "bf16", True),
        ):
            pairs = head_width // 6
            axis_pairs = (head_width // 2 - 2 * pairs, pairs, pairs) if rope else ()
            constants, warps = _launch(heads, head_width, axis_pairs, 4 if dtype == "fp32" else 2)
            kinds = {"length": "i32", "tokens": "i32", "eps": "fp32", "coordinates_ptr": "*i16"}
            kinds |= dict.fromkeys(("weight_ptr", "table_ptr", "rstd_ptr", "partial_ptr"), "*fp32")
            for direction, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
                names = [p.name for p in kernel.params if not p.is_constexpr]
                absent = () if rope else ("table_ptr", "coordinates_ptr")
                yield CompileCase(
                    name=f"norm_rope_{direction}/{dtype}/{heads}x{head_width}" + ("" if rope else "/no positions"),
                    kernel=kernel,
                    types={
                        name: kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
                        for name in names
                        if name not in absent
                    },
                    constants=constants | dict.fromkeys(absent),
                    warps=warps,
                    stages=3,
                    architecture=architecture,
                    aligned=(
                        "stride_xb",
                        "stride_xl",
                        *(("stride_gb", "stride_gl") if direction == "backward" else ()),
                    ),
                )


def _launch(heads: int, head_width: int, axis_pairs: Sequence[int], itemsize: int) -> tuple[dict[str, int], int]:
    """The constants of both kernels, and as many warps as load a tile with 16 bytes a thread."""
    frame_pairs, row_pairs = axis_pairs[:2] if axis_pairs else (0, 0)
    block_k = triton.next_power_of_2(head_width)
    tile = _heads_of_a_tile(heads, block_k)
    constants = {
        "FRAME_PAIRS": frame_pairs, "ROW_PAIRS": row_pairs,
        "HEADS": heads, "HEAD_WIDTH": head_width, "TILE": tile, "BLOCK_K": block_k,
    }  # fmt: skip
    return constants, min(16, max(1, tile * block_k * itemsize // 512))


def _heads_of_a_tile(heads: int, block_k: int) -> int:
    """A power of two that divides a row into at most 6 tiles: 12 = 3 x 4, 40 = 5 x 8; another one only where none does so."""
    tile = heads & -heads
    while tile > 1 and (tile * block_k > 2048 or (tile == heads and tile * block_k >= 512)):
        tile //= 2
    return tile if heads <= 6 * tile else triton.next_power_of_2(triton.cdiv(heads, 6))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _batch_stride(coordinates: Tensor | None) -> int:
    """From one sample's coordinates to the next's; 0 where all samples share them."""
    return coordinates.shape[1] * 3 if coordinates is not None and coordinates.dim() == 3 else 0
