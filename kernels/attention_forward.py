"""The forward kernels of attention, their launch tables, and the function that runs them.

With s = scale * log2(e) folded into one factor, so that the kernels use exp2 only:
    P = exp2(s Q K^T - lse),  lse = log2(rowsum(exp2(s Q K^T)))   [L], one number per query row
    O = P V
The kernels keep a running maximum and a running sum (Milakov and Gimelshein 2018, arXiv:1805.02867; the tiling is that of Dao
et al. 2022, arXiv:2205.14135). Rows and heads are addressed in 64 bits (a long video's activations pass 2^31 elements).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import empty_token_major
from .attention_mask import MASK_TILE
from .attention_tiles import (
    Launch,
    MaskTensors,
    can_describe,
    describable_strides,
    describe,
    is_allowed,
    is_hopper,
    launch_constants,
    load_described_rows,
    load_rows,
    on_device_of,
    padded_head_width,
    store_rows,
    with_unit_stride,
)
from .compile_case import CompileCase


@triton.jit
def _attend(q, k, v, allowed, maximum, total, out, scale_log2, CAN_BE_EMPTY: tl.constexpr):
    """One step of the online softmax: folds a tile of keys into the running maximum, sum and unnormalised output."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if allowed is not None:
        scores = tl.where(allowed, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    shift = new_maximum
    if CAN_BE_EMPTY:  # a row that has met no key yet: -inf minus -inf would be NaN
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.math.exp2(scores * scale_log2 - shift[:, None])
    correction = tl.math.exp2(maximum - shift)
    out = tl.dot(weights.to(v.dtype), v, out * correction[:, None], input_precision="ieee")
    return new_maximum, total * correction + tl.sum(weights, 1), out


@triton.jit
def _load(
    source, batch, head, start, columns, row_stride, length,
    HEAD_WIDTH: tl.constexpr, ROWS: tl.constexpr, MASK_ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows start, start + 1, ... of one head: `source` is a descriptor, or a pointer to the head's first row."""
    if DESCRIPTORS:
        tile = load_described_rows(source, batch, head, start)
    else:
        tile = load_rows(source, start + tl.arange(0, ROWS), columns, row_stride, length, HEAD_WIDTH, MASK_ROWS)
    return tile


@triton.jit
def _first_key(tile_list, step, BLOCK_S: tl.constexpr, TILE: tl.constexpr):
    """Where step number `step` starts to read keys; a listed tile takes TILE / BLOCK_S steps."""
    if tile_list is None:
        start = step * BLOCK_S
    else:
        start = tl.load(tile_list + step // (TILE // BLOCK_S)) * TILE + step % (TILE // BLOCK_S) * BLOCK_S
    return start


@triton.jit
def _place(heads, query_length, BLOCK_L: tl.constexpr):
    """What a program owns: the index into the flattened [B * N], batch, head, and the first of its BLOCK_L query rows.

    Programs of a head are neighbours, to share its K and V in L2. They go from the last rows to the first, since under a
    causal mask the last have the most keys.
    """
    programs = tl.cdiv(query_length, BLOCK_L)
    sequence = (tl.program_id(0) // programs).to(tl.int64)
    first = (programs - 1 - tl.program_id(0) % programs) * BLOCK_L
    return sequence, sequence // heads, sequence % heads, first


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qn, stride_ql,
    stride_kb, stride_kn, stride_kl,
    stride_vb, stride_vn, stride_vl,
    stride_ob, stride_on, stride_ol,
    heads, query_length, key_length, scale_log2,
    key_tiles_ptr, key_counts_ptr, query_low_ptr, query_high_ptr, key_position_ptr, mask_step,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    TILE: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Every mask, dtype and stride: q, k and v come as descriptors or as pointers, the mask as five tensors or as None."""
    sequence, batch, head, first = _place(heads, query_length, BLOCK_L)
    rows = first + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_K)
    if not DESCRIPTORS:
        q_ptr += batch * stride_qb + head * stride_qn
        k_ptr += batch * stride_kb + head * stride_kn
        v_ptr += batch * stride_vb + head * stride_vn
    # Full steps take no mask. Without tile lists only a ragged last tile needs one.
    tile_list = None
    full_steps = key_length // BLOCK_S
    steps = tl.cdiv(key_length, BLOCK_S)
    if MASKED:
        mask_index = batch * mask_step
        query_tile = mask_index * tl.cdiv(query_length, TILE) + first // TILE
        tile_list = key_tiles_ptr + query_tile * tl.cdiv(key_length, TILE)
        full_steps = tl.load(key_counts_ptr + query_tile * 2) * (TILE // BLOCK_S)
        steps = tl.load(key_counts_ptr + query_tile * 2 + 1) * (TILE // BLOCK_S)
        # Nothing lies between 0 and 0: rows past the end meet no key in partial tiles.
        query_low = tl.load(query_low_ptr + mask_index * query_length + rows, mask=rows < query_length, other=0)
        query_high = tl.load(query_high_ptr + mask_index * query_length + rows, mask=rows < query_length, other=0)

    q = _load(q_ptr, batch, head, first, columns, stride_ql, query_length, HEAD_WIDTH, BLOCK_L, True, DESCRIPTORS)
    maximum = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    out = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    for step in range(full_steps):
        start = _first_key(tile_list, step, BLOCK_S, TILE)
        k = _load(k_ptr, batch, head, start, columns, stride_kl, key_length, HEAD_WIDTH, BLOCK_S, False, DESCRIPTORS)
        v = _load(v_ptr, batch, head, start, columns, stride_vl, key_length, HEAD_WIDTH, BLOCK_S, False, DESCRIPTORS)
        maximum, total, out = _attend(q, k, v, None, maximum, total, out, scale_log2, False)
    # A loop also where it turns at most once: straight-line code instead spills registers.
    for step in tl.range(full_steps, steps, num_stages=None if MASKED else 1):
        start = _first_key(tile_list, step, BLOCK_S, TILE)
        k = _load(k_ptr, batch, head, start, columns, stride_kl, key_length, HEAD_WIDTH, BLOCK_S, True, DESCRIPTORS)
        v = _load(v_ptr, batch, head, start, columns, stride_vl, key_length, HEAD_WIDTH, BLOCK_S, True, DESCRIPTORS)
        keys = start + tl.arange(0, BLOCK_S)
        if MASKED:
            position_ptr = key_position_ptr + mask_index * key_length + keys
            allowed = is_allowed(query_low, query_high, tl.load(position_ptr, mask=keys < key_length, other=-1))
        else:
            allowed = keys[None, :] < key_length
        maximum, total, out = _attend(q, k, v, allowed, maximum, total, out, scale_log2, MASKED)

    if MASKED:  # a row without keys: output 0, and (from a log-sum-exp of infinity) weights of 0 in the backward pass
        maximum = tl.where(total == 0.0, float("inf"), maximum)
        total = tl.where(total == 0.0, 1.0, total)
    lse = maximum + tl.math.log2(total)
    tl.store(lse_ptr + sequence * query_length + rows, lse, mask=rows < query_length)
    out_base = out_ptr + batch * stride_ob + head * stride_on
    store_rows(out_base, out / total[:, None], rows, columns, stride_ol, query_length, HEAD_WIDTH)


@triton.jit
def specialized_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qn, stride_ql,
    stride_ob, stride_on, stride_ol,
    heads, query_length, key_length, scale_log2,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Dense: one group of warps loads K and V while two others multiply, each with half of the query rows.

    The compiler takes one loop only, without pointer loads in it or into it, and halves the tile of Q. A descriptor made by
    the host cannot be halved (Triton 3.6 then loads wrong rows without a word), so Q's is made here.
    """
    sequence, batch, head, first = _place(heads, query_length, BLOCK_L)
    rows, columns = first + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_K)
    q_rows = tl.make_tensor_descriptor(
        q_ptr + batch * stride_qb + head * stride_qn,
        shape=[query_length, HEAD_WIDTH], strides=[stride_ql, 1], block_shape=[BLOCK_L, BLOCK_K],
    )  # fmt: skip
    q = q_rows.load([first, 0])
    maximum = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    out = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    for start in tl.range(0, key_length, BLOCK_S, warp_specialize=True):
        k = load_described_rows(k_ptr, batch, head, start)
        v = load_described_rows(v_ptr, batch, head, start)
        allowed = (start + tl.arange(0, BLOCK_S))[None, :] < key_length if RAGGED else None
        maximum, total, out = _attend(q, k, v, allowed, maximum, total, out, scale_log2, False)
    tl.store(lse_ptr + sequence * query_length + rows, maximum + tl.math.log2(total), mask=rows < query_length)
    out_base = out_ptr + batch * stride_ob + head * stride_on
    store_rows(out_base, out / total[:, None], rows, columns, stride_ol, query_length, HEAD_WIDTH)


# Keyed by the head width padded to 64, 128 or 256. The machine-code test compiles every entry ahead of time and holds it to its
# limits (shared memory, no register spills, tensor cores). No entry has been timed yet.
HOPPER_FORWARD = {
    64: Launch(128, 64, 4, 3, descriptors=True),
    128: Launch(128, 128, 8, 2, descriptors=True),
    256: Launch(128, 64, 8, 2, descriptors=True),
}
# With tile lists the compiler spends half of the stages (less one) on loading the next tile's number ahead of its keys.
HOPPER_MASKED_FORWARD = {
    64: Launch(128, 64, 4, 5, descriptors=True),
    128: Launch(128, 128, 8, 3, descriptors=True),
    256: Launch(128, 64, 8, 3, descriptors=True),
}
# For every other GPU, so within the 99 KiB of shared memory that compute capabilities 8.6, 8.9 and 12.0 have (8.0: 163 KiB), and
# for Hopper where descriptors cannot address the inputs.
AMPERE_FORWARD = {
    64: Launch(128, 32, 4, 4),
    128: Launch(128, 32, 8, 3),
    256: Launch(64, 32, 8, 2),
}
AMPERE_MASKED_FORWARD = {
    64: Launch(128, 32, 4, 3),
    128: Launch(128, 32, 8, 3),
    256: Launch(64, 32, 8, 3),
}
# To be tried against HOPPER_FORWARD on a GPU; nothing chooses it yet.
SPECIALIZED_FORWARD = {
    64: Launch(128, 128, 4, 3, descriptors=True, warp_specialize=True),
    128: Launch(128, 128, 4, 2, descriptors=True, warp_specialize=True),
}
# fp32 runs on ordinary cores, since tensor cores would round it to tf32: small tiles, the same on every GPU.
FP32_FORWARD = {
    64: Launch(16, 16, 4, 1),
    128: Launch(16, 16, 4, 1),
    256: Launch(16, 16, 8, 1),
}


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], *, scale: float, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """The output [B, N, L, K] (token-major in memory) and the base-2 log-sum-exp of the scaled scores [B, N, L].

    `mask` holds the tensors of a TileMask, or nothing. A query without keys gives an output of 0 and a log-sum-exp of infinity.
    `launch` overrides the tables; one with descriptors needs inputs that `can_describe` accepts.
    """
    q, k, v = map(with_unit_stride, (q, k, v))
    batch, heads, query_length, head_width = q.shape
    out, lse = empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    launch = launch or _launch(q, k, v, masked=len(mask) > 0)
    grid = (triton.cdiv(query_length, launch.queries) * batch * heads,)
    tensors = (q, k, v)
    if launch.descriptors:
        tensors = (describe(q, launch.queries), describe(k, launch.keys), describe(v, launch.keys))
    sizes = (heads, query_length, k.shape[2], scale * math.log2(math.e))
    constants = launch_constants(launch, head_width)
    with on_device_of(q):
        if launch.warp_specialize:
            assert not mask
            triton.set_allocator(_allocate)
            specialized_forward_kernel[grid](
                q, *tensors[1:], out, lse, *describable_strides(q)[:3], *out.stride()[:3], *sizes,
                **constants, RAGGED=k.shape[2] % launch.keys != 0,
            )  # fmt: skip
        else:
            forward_kernel[grid](
                *tensors, out, lse,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *sizes,
                **_mask_arguments(mask), **constants, **_switches(launch, masked=len(mask) > 0),
            )  # fmt: skip
    return out, lse


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where the kernel writes the descriptors that it makes; PyTorch aligns to at least 256 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _launch(q: Tensor, k: Tensor, v: Tensor, *, masked: bool) -> Launch:
    width = padded_head_width(q.shape[-1])
    if q.dtype == torch.float32:
        return FP32_FORWARD[width]
    hopper, ampere = _tables(masked=masked)
    if is_hopper(q.device) and all(map(can_describe, (q, k, v))):
        return hopper[width]
    return ampere[width]


def _tables(*, masked: bool) -> tuple[dict[int, Launch], dict[int, Launch]]:
    """For Hopper, and for every other GPU."""
    return (HOPPER_MASKED_FORWARD, AMPERE_MASKED_FORWARD) if masked else (HOPPER_FORWARD, AMPERE_FORWARD)


def _mask_arguments(mask: Sequence[Tensor]) -> dict[str, Any]:
    tensors = MaskTensors(*mask) if mask else None
    return {
        "key_tiles_ptr": tensors and tensors.key_tiles,
        "key_counts_ptr": tensors and tensors.key_counts,
        "query_low_ptr": tensors and tensors.query_low,
        "query_high_ptr": tensors and tensors.query_high,
        "key_position_ptr": tensors and tensors.key_position,
        "mask_step": tensors and tensors.step,
    }


def _switches(launch: Launch, *, masked: bool) -> dict[str, Any]:
    return {"TILE": MASK_TILE, "DESCRIPTORS": launch.descriptors, "MASKED": masked}


def compile_cases() -> Iterator[CompileCase]:
    """Every launch of the tables, and a padded head width, as tensors with aligned strides launch them."""
    for masked in (False, True):
        hopper, ampere = _tables(masked=masked)
        for width in (64, 96, 128, 256):
            yield _forward_case(hopper, width, masked=masked, architecture=90)
            yield _forward_case(ampere, width, masked=masked, architecture=80)
        for width in FP32_FORWARD:
            yield _forward_case(FP32_FORWARD, width, masked=masked, architecture=80, dtype="fp32")
        yield _forward_case(ampere, 128, masked=masked, architecture=90)  # where descriptors cannot address the inputs
    for width, ragged in ((64, True), (128, True), (128, False)):
        kind = "specialized/ragged" if ragged else "specialized"
        launch = SPECIALIZED_FORWARD[width]
        yield _case(specialized_forward_kernel, kind, launch, width, {"RAGGED": ragged}, architecture=90)


def _forward_case(
    table: dict[int, Launch], width: int, *, masked: bool, architecture: int, dtype: str = "bf16"
) -> CompileCase:
    launch = table[padded_head_width(width)]
    kind = ("masked" if masked else "dense") + ("/descriptors" if launch.descriptors else "/pointers")
    constants = _switches(launch, masked=masked) | ({} if masked else _mask_arguments(()))
    return _case(forward_kernel, kind, launch, width, constants, architecture=architecture, dtype=dtype)


def _case(
    kernel: Any, kind: str, launch: Launch, width: int, more: dict[str, Any], *, architecture: int, dtype: str = "bf16"
) -> CompileCase:
    constants = launch_constants(launch, width) | more
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    types = {name: _type(name, launch, width, dtype) for name in kernel.arg_names if name not in constants}
    return CompileCase(
        name=f"attention_forward/{dtype}/{width}/{kind}",
        kernel=kernel,
        types=types,
        constants=constants,
        warps=warps,
        stages=stages,
        architecture=architecture,
        aligned=tuple(name for name in types if name.startswith("stride_")),
        has_matmul=dtype != "fp32",
    )


def _type(name: str, launch: Launch, width: int, dtype: str) -> str:
    """How Triton writes the type of a kernel's argument."""
    rows = {"q_ptr": launch.queries, "k_ptr": launch.keys, "v_ptr": launch.keys}.get(name)
    if rows is not None and launch.descriptors and not (launch.warp_specialize and name == "q_ptr"):
        return f"tensordesc<{dtype}[1,1,{rows},{padded_head_width(width)}]>"
    if rows is not None or name == "out_ptr":
        return f"*{dtype}"
    return {"lse_ptr": "*fp32", "scale_log2": "fp32"}.get(name, "*i32" if name.endswith("_ptr") else "i32")
