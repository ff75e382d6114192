"""Triton kernels for dense attention, forward and backward.

Mathematics, with s = scale * log2(e) folded into one factor so that the kernels use exp2 only:
    P = exp2(s Q K^T - lse),  lse = log2(rowsum(exp2(s Q K^T)))   [L], one number per query row
    O = P V,  delta = rowsum(O * dO)
    dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q
The forward pass keeps a running maximum and a running sum (Milakov and Gimelshein 2018, arXiv:1805.02867; the tiling and
the backward pass that recomputes P are those of Dao et al. 2022, arXiv:2205.14135).

The backward pass is two kernels, one owning query rows and one owning key rows. Each output element is written by exactly
one program and nothing is added atomically, so results repeat bit for bit. dK and dV are computed from S^T = K Q^T
directly: transposing an accumulator instead has been miscompiled for Hopper by released compilers.

Rows and heads are addressed in 64 bits (a long video's activations pass 2^31 elements); the head width has unit stride.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(base, rows, columns, row_stride, row_limit, HEAD_WIDTH: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Loads [rows, columns] with zeros outside the tensor; masks cost nothing where the tile is known to be inside."""
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    PADDED: tl.constexpr = columns.shape[0] != HEAD_WIDTH
    if MASK_ROWS and PADDED:
        tile = tl.load(pointers, mask=(rows[:, None] < row_limit) & (columns[None, :] < HEAD_WIDTH), other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=rows[:, None] < row_limit, other=0.0)
    elif PADDED:
        tile = tl.load(pointers, mask=columns[None, :] < HEAD_WIDTH, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store_tile(base, tile, rows, columns, row_stride, row_limit, HEAD_WIDTH: tl.constexpr):
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = (rows[:, None] < row_limit) & (columns[None, :] < HEAD_WIDTH)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q, maximum, total, out, k_base, v_base, keys, columns, stride_kl, stride_vl, key_length, scale_log2,
    HEAD_WIDTH: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: folds a tile of keys into the running maximum, sum and unnormalised output."""
    k = _tile(k_base, keys, columns, stride_kl, key_length, HEAD_WIDTH, MASK_KEYS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASK_KEYS:
        scores = tl.where(keys[None, :] < key_length, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    weights = tl.math.exp2(scores * scale_log2 - new_maximum[:, None])
    correction = tl.math.exp2(maximum - new_maximum)
    v = _tile(v_base, keys, columns, stride_vl, key_length, HEAD_WIDTH, MASK_KEYS)
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
    q = _tile(q_base, rows, columns, stride_ql, query_length, HEAD_WIDTH, True)
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
    _store_tile(out_base, out / total[:, None], rows, columns, stride_ol, query_length, HEAD_WIDTH)


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
    out = _tile(out_base, rows, columns, stride_ol, query_length, HEAD_WIDTH, True).to(tl.float32)
    grad_out = _tile(grad_base, rows, columns, stride_gl, query_length, HEAD_WIDTH, True).to(tl.float32)
    tl.store(delta_ptr + sequence * query_length + rows, tl.sum(out * grad_out, 1), mask=rows < query_length)


@triton.jit
def _add_grad_query(
    grad_q, q, grad_out, lse, delta, k_base, v_base, keys, columns, stride_kl, stride_vl, key_length, scale_log2,
    HEAD_WIDTH: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """Adds dS K of one tile of keys to grad_q."""
    k = _tile(k_base, keys, columns, stride_kl, key_length, HEAD_WIDTH, MASK_KEYS)
    v = _tile(v_base, keys, columns, stride_vl, key_length, HEAD_WIDTH, MASK_KEYS)
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
    q = _tile(q_base, rows, columns, stride_ql, query_length, HEAD_WIDTH, True)
    grad_base = grad_out_ptr + batch * stride_gb + head * stride_gn
    grad_out = _tile(grad_base, rows, columns, stride_gl, query_length, HEAD_WIDTH, True)
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
    _store_tile(grad_q_base, grad_q * scale, rows, columns, stride_dql, query_length, HEAD_WIDTH)


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

    k = _tile(k_ptr + batch * stride_kb + head * stride_kn, keys, columns, stride_kl, key_length, HEAD_WIDTH, True)
    v = _tile(v_ptr + batch * stride_vb + head * stride_vn, keys, columns, stride_vl, key_length, HEAD_WIDTH, True)
    grad_k = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    grad_v = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    # Query rows past the end load as zeros (q, dO, lse and delta alike), weigh 1 and add exactly 0: no mask on the scores.
    # Key rows past the end only reach rows that are not stored.
    for start in range(0, query_length, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        q = _tile(q_base, rows, columns, stride_ql, query_length, HEAD_WIDTH, True)
        lse = tl.load(lse_base + rows, mask=rows < query_length, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_S, BLOCK_L]
        weights = tl.math.exp2(scores * scale_log2 - lse[None, :])
        grad_out = _tile(grad_base, rows, columns, stride_gl, query_length, HEAD_WIDTH, True)
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        delta = tl.load(delta_base + rows, mask=rows < query_length, other=0.0)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    offset = batch * stride_dkb + head * stride_dkn
    _store_tile(grad_k_ptr + offset, grad_k * scale, keys, columns, stride_dkl, key_length, HEAD_WIDTH)
    _store_tile(grad_v_ptr + offset, grad_v, keys, columns, stride_dkl, key_length, HEAD_WIDTH)
