"""The backward kernels of attention, their launch tables, and the function that runs them.

With P and lse as in the forward pass:
    delta = rowsum(O * dO)
    dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q
P is computed again from Q, K and lse (Dao et al. 2022, arXiv:2205.14135).

Two kernels, one owning query rows and one owning key rows. Each output element is written by exactly one program and nothing
is added atomically, so results repeat bit for bit. dK and dV are computed from S^T = K Q^T directly: transposing an
accumulator instead has been miscompiled for Hopper by released compilers.
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
def delta_kernel(
    out_ptr, grad_out_ptr, delta_ptr,
    stride_ob, stride_on, stride_ol,
    stride_gb, stride_gn, stride_gl,
    heads, query_length,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(O * dO): the part of dS that does not depend on the key."""
    tiles = tl.cdiv(query_length, BLOCK_L)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    rows = (tl.program_id(0) % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_K)
    out_base = out_ptr + batch * stride_ob + head * stride_on
    grad_base = grad_out_ptr + batch * stride_gb + head * stride_gn
    out = load_rows(out_base, rows, columns, stride_ol, query_length, HEAD_WIDTH, True).to(tl.float32)
    grad_out = load_rows(grad_base, rows, columns, stride_gl, query_length, HEAD_WIDTH, True).to(tl.float32)
    tl.store(delta_ptr + sequence * query_length + rows, tl.sum(out * grad_out, 1), mask=rows < query_length)


@triton.jit
def _add_grad_query(
    grad_q, q, grad_out, lse, delta, k_base, v_base, keys, columns, stride_kl, stride_vl, key_length, scale_log2,
    HEAD_WIDTH: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """Adds dS K of one tile of keys to grad_q."""
    k = load_rows(k_base, keys, columns, stride_kl, key_length, HEAD_WIDTH, MASK_KEYS)
    v = load_rows(v_base, keys, columns, stride_vl, key_length, HEAD_WIDTH, MASK_KEYS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASK_KEYS:  # a key of zeros scores 0, and exp2(0 - lse) overflows where all true scores are far below 0
        scores = tl.where(keys[None, :] < key_length, scores, float("-inf"))
    weights = tl.math.exp2(scores * scale_log2 - lse[:, None])
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")


@triton.jit
def grad_query_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    stride_qb, stride_qn, stride_ql,
    stride_kb, stride_kn, stride_kl,
    stride_vb, stride_vn, stride_vl,
    stride_gb, stride_gn, stride_gl,
    stride_dqb, stride_dqn, stride_dql,
    heads, query_length, key_length, scale, scale_log2,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_L query rows of one head and walks over the keys."""
    tiles = tl.cdiv(query_length, BLOCK_L)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    rows = (tl.program_id(0) % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_K)
    k_base = k_ptr + batch * stride_kb + head * stride_kn
    v_base = v_ptr + batch * stride_vb + head * stride_vn

    q_base = q_ptr + batch * stride_qb + head * stride_qn
    q = load_rows(q_base, rows, columns, stride_ql, query_length, HEAD_WIDTH, True)
    grad_base = grad_out_ptr + batch * stride_gb + head * stride_gn
    grad_out = load_rows(grad_base, rows, columns, stride_gl, query_length, HEAD_WIDTH, True)
    lse = tl.load(lse_ptr + sequence * query_length + rows, mask=rows < query_length, other=0.0)
    delta = tl.load(delta_ptr + sequence * query_length + rows, mask=rows < query_length, other=0.0)
    grad_q = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    full = key_length // BLOCK_S * BLOCK_S
    for start in range(0, full, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        grad_q = _add_grad_query(
            grad_q, q, grad_out, lse, delta, k_base, v_base, keys, columns, stride_kl, stride_vl, key_length, scale_log2,
            HEAD_WIDTH, False,
        )  # fmt: skip
    for start in tl.range(full, key_length, BLOCK_S, num_stages=1):
        keys = start + tl.arange(0, BLOCK_S)
        grad_q = _add_grad_query(
            grad_q, q, grad_out, lse, delta, k_base, v_base, keys, columns, stride_kl, stride_vl, key_length, scale_log2,
            HEAD_WIDTH, True,
        )  # fmt: skip
    grad_q_base = grad_q_ptr + batch * stride_dqb + head * stride_dqn
    store_rows(grad_q_base, grad_q * scale, rows, columns, stride_dql, query_length, HEAD_WIDTH)


@triton.jit
def grad_key_value_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    stride_qb, stride_qn, stride_ql,
    stride_kb, stride_kn, stride_kl,
    stride_vb, stride_vn, stride_vl,
    stride_gb, stride_gn, stride_gl,
    stride_dkb, stride_dkn, stride_dkl,
    heads, query_length, key_length, scale, scale_log2,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_S key rows of one head and walks over the queries; grad_k and grad_v share one layout."""
    tiles = tl.cdiv(key_length, BLOCK_S)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    keys = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_K)
    q_base = q_ptr + batch * stride_qb + head * stride_qn
    grad_base = grad_out_ptr + batch * stride_gb + head * stride_gn
    lse_base = lse_ptr + sequence * query_length
    delta_base = delta_ptr + sequence * query_length

    k = load_rows(k_ptr + batch * stride_kb + head * stride_kn, keys, columns, stride_kl, key_length, HEAD_WIDTH, True)
    v = load_rows(v_ptr + batch * stride_vb + head * stride_vn, keys, columns, stride_vl, key_length, HEAD_WIDTH, True)
    grad_k = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    grad_v = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    # Query rows past the end load as zeros (q, dO, lse and delta alike), weigh 1 and add exactly 0: no mask on the scores.
    # Key rows past the end only reach rows that are not stored.
    for start in range(0, query_length, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        q = load_rows(q_base, rows, columns, stride_ql, query_length, HEAD_WIDTH, True)
        lse = tl.load(lse_base + rows, mask=rows < query_length, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_S, BLOCK_L]
        weights = tl.math.exp2(scores * scale_log2 - lse[None, :])
        grad_out = load_rows(grad_base, rows, columns, stride_gl, query_length, HEAD_WIDTH, True)
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        delta = tl.load(delta_base + rows, mask=rows < query_length, other=0.0)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    offset = batch * stride_dkb + head * stride_dkn
    store_rows(grad_k_ptr + offset, grad_k * scale, keys, columns, stride_dkl, key_length, HEAD_WIDTH)
    store_rows(grad_v_ptr + offset, grad_v, keys, columns, stride_dkl, key_length, HEAD_WIDTH)


# Keyed by the padded head width; see attention_forward.py for the rules of the three tables.
HOPPER_GRAD_QUERY = {
    64: Launch(128, 64, 8, 3),
    128: Launch(128, 64, 8, 2),
    256: Launch(128, 32, 8, 2),
}
HOPPER_GRAD_KEY_VALUE = {
    64: Launch(64, 128, 8, 3),
    128: Launch(64, 128, 8, 2),
    256: Launch(32, 64, 8, 2),
}
AMPERE_GRAD_QUERY = {
    64: Launch(64, 64, 4, 2),
    128: Launch(64, 64, 8, 2),
    256: Launch(64, 32, 8, 1),
}
AMPERE_GRAD_KEY_VALUE = {
    64: Launch(64, 64, 4, 2),
    128: Launch(64, 64, 8, 2),
    256: Launch(32, 32, 8, 1),
}
FP32_GRAD_QUERY = {
    64: Launch(16, 16, 4, 1),
    128: Launch(16, 16, 4, 1),
    256: Launch(16, 16, 8, 1),
}
FP32_GRAD_KEY_VALUE = {
    64: Launch(16, 16, 4, 1),
    128: Launch(16, 16, 4, 1),
    256: Launch(16, 16, 4, 1),
}
DELTA_LAUNCH = Launch(queries=32, keys=0, warps=4, stages=1)


def run_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Sequence[Tensor],
    *,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, token-major in memory, from what `run_forward` took and returned."""
    assert not mask
    assert deterministic
    grad_out, q, k, v, out = map(with_unit_stride, (grad_out, q, k, v, out))
    lse = lse.contiguous()
    batch, heads, query_length, head_width = q.shape
    key_length = k.shape[2]
    grad_q, grad_k, grad_v = empty_token_major(q), empty_token_major(k), empty_token_major(k)
    delta = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3])
    sizes = (heads, query_length, key_length, scale, scale * math.log2(math.e))
    if grad_q.numel() > 0:
        with on_device_of(q):
            delta_kernel[(triton.cdiv(query_length, DELTA_LAUNCH.queries) * batch * heads,)](
                out, grad_out, delta, *out.stride()[:3], *grad_out.stride()[:3], heads, query_length,
                HEAD_WIDTH=head_width, BLOCK_K=padded_head_width(head_width), BLOCK_L=DELTA_LAUNCH.queries,
                num_warps=DELTA_LAUNCH.warps,
            )  # fmt: skip
            launch = _launch(q, HOPPER_GRAD_QUERY, AMPERE_GRAD_QUERY, FP32_GRAD_QUERY)
            grad_query_kernel[(triton.cdiv(query_length, launch.queries) * batch * heads,)](
                q, k, v, grad_out, lse, delta, grad_q, *strides, *grad_q.stride()[:3], *sizes,
                **launch_constants(launch, head_width),
            )  # fmt: skip
            launch = _launch(q, HOPPER_GRAD_KEY_VALUE, AMPERE_GRAD_KEY_VALUE, FP32_GRAD_KEY_VALUE)
            grad_key_value_kernel[(triton.cdiv(key_length, launch.keys) * batch * heads,)](
                q, k, v, grad_out, lse, delta, grad_k, grad_v, *strides, *grad_k.stride()[:3], *sizes,
                **launch_constants(launch, head_width),
            )  # fmt: skip
    return grad_q, grad_k, grad_v


def _launch(q: Tensor, hopper: dict[int, Launch], ampere: dict[int, Launch], fp32: dict[int, Launch]) -> Launch:
    width = padded_head_width(q.shape[-1])
    if q.dtype == torch.float32:
        return fp32[width]
    return (hopper if is_hopper(q.device) else ampere)[width]
