"""The forward kernel of attention, its launch table, and the function that runs it.

With s = scale * log2(e) folded into one factor, so that the kernel uses exp2 only:
    P = exp2(s Q K^T - lse),  lse = log2(rowsum(exp2(s Q K^T)))   [L], one number per query row
    O = P V
The kernel keeps a running maximum and a running sum (Milakov and Gimelshein 2018, arXiv:1805.02867; the tiling is that of Dao
et al. 2022, arXiv:2205.14135). Rows and heads are addressed in 64 bits (a long video's activations pass 2^31 elements).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import empty_token_major
from .attention_tiles import (
    Launch,
    is_hopper,
    launch_constants,
    load_rows,
    on_device_of,
    padded_head_width,
    store_rows,
    with_unit_stride,
)


@triton.jit
def _attend(
    q, maximum, total, out, k_base, v_base, keys, columns, stride_kl, stride_vl, key_length, scale_log2,
    HEAD_WIDTH: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: folds a tile of keys into the running maximum, sum and unnormalised output."""
    k = load_rows(k_base, keys, columns, stride_kl, key_length, HEAD_WIDTH, MASK_KEYS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASK_KEYS:
        scores = tl.where(keys[None, :] < key_length, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    weights = tl.math.exp2(scores * scale_log2 - new_maximum[:, None])
    correction = tl.math.exp2(maximum - new_maximum)
    v = load_rows(v_base, keys, columns, stride_vl, key_length, HEAD_WIDTH, MASK_KEYS)
    out = tl.dot(weights.to(v.dtype), v, out * correction[:, None], input_precision="ieee")
    return new_maximum, total * correction + tl.sum(weights, 1), out


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qn, stride_ql,
    stride_kb, stride_kn, stride_kl,
    stride_vb, stride_vn, stride_vl,
    stride_ob, stride_on, stride_ol,
    heads, query_length, key_length, scale_log2,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_L query rows of one head. Programs of a head are neighbours, to share its K and V in L2."""
    tiles = tl.cdiv(query_length, BLOCK_L)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)  # index into the flattened [B * N]
    batch, head = sequence // heads, sequence % heads
    rows = (tl.program_id(0) % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_K)
    k_base = k_ptr + batch * stride_kb + head * stride_kn
    v_base = v_ptr + batch * stride_vb + head * stride_vn

    q_base = q_ptr + batch * stride_qb + head * stride_qn
    q = load_rows(q_base, rows, columns, stride_ql, query_length, HEAD_WIDTH, True)
    maximum = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    out = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    # Only a ragged last tile needs a mask: a second loop of at most one turn. (Straight-line code instead spills registers.)
    full = key_length // BLOCK_S * BLOCK_S
    for start in range(0, full, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        maximum, total, out = _attend(
            q, maximum, total, out, k_base, v_base, keys, columns, stride_kl, stride_vl, key_length, scale_log2,
            HEAD_WIDTH, False,
        )  # fmt: skip
    for start in tl.range(full, key_length, BLOCK_S, num_stages=1):
        keys = start + tl.arange(0, BLOCK_S)
        maximum, total, out = _attend(
            q, maximum, total, out, k_base, v_base, keys, columns, stride_kl, stride_vl, key_length, scale_log2,
            HEAD_WIDTH, True,
        )  # fmt: skip

    lse = maximum + tl.math.log2(total)
    tl.store(lse_ptr + sequence * query_length + rows, lse, mask=rows < query_length)
    out_base = out_ptr + batch * stride_ob + head * stride_on
    store_rows(out_base, out / total[:, None], rows, columns, stride_ol, query_length, HEAD_WIDTH)


# Keyed by the head width padded to 64, 128 or 256. The machine-code test compiles every entry ahead of time and holds it to its
# limits (shared memory, no register spills, tensor cores). No entry has been timed yet.
HOPPER_FORWARD = {
    64: Launch(128, 64, 4, 3),
    128: Launch(128, 128, 8, 2),
    256: Launch(128, 64, 8, 2),
}
# For every other GPU, so within the 99 KiB of shared memory that compute capabilities 8.6, 8.9 and 12.0 have (8.0: 163 KiB).
AMPERE_FORWARD = {
    64: Launch(128, 64, 4, 3),
    128: Launch(128, 64, 8, 2),
    256: Launch(64, 32, 8, 2),
}
# fp32 runs on ordinary cores, since tensor cores would round it to tf32: small tiles, the same on every GPU.
FP32_FORWARD = {
    64: Launch(16, 16, 4, 1),
    128: Launch(16, 16, 4, 1),
    256: Launch(16, 16, 8, 1),
}


def run_forward(q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], *, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the output [B, N, L, K] (token-major in memory) and the base-2 log-sum-exp of the scaled scores [B, N, L]."""
    assert not mask
    q, k, v = map(with_unit_stride, (q, k, v))
    batch, heads, query_length, head_width = q.shape
    out, lse = empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch = _launch(q)
    if out.numel() > 0:
        with on_device_of(q):
            forward_kernel[(triton.cdiv(query_length, launch.queries) * batch * heads,)](
                q, k, v, out, lse,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                heads, query_length, k.shape[2], scale * math.log2(math.e),
                **launch_constants(launch, head_width),
            )  # fmt: skip
    return out, lse


def _launch(q: Tensor) -> Launch:
    width = padded_head_width(q.shape[-1])
    if q.dtype == torch.float32:
        return FP32_FORWARD[width]
    return (HOPPER_FORWARD if is_hopper(q.device) else AMPERE_FORWARD)[width]
