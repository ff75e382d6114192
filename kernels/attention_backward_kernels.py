"""The Triton kernels of attention's backward pass; attention_backward.py has their mathematics and runs them.

What they share. A program owns a tile of rows of one head and walks over tiles of the other side, in order or, with a mask,
along a list (attention_mask.py). lse and delta come padded to whole mask tiles, so that their loads need no bounds. Only the steps
that need one pay for a mask: a branch that all threads take alike.
"""

import triton
import triton.language as tl

from .attention_tiles import is_allowed, load_described_rows, load_rows, store_rows


@triton.jit
def delta_kernel(
    out_ptr, grad_out_ptr, lse_ptr, padded_lse_ptr, delta_ptr,
    stride_ob, stride_on, stride_ol,
    stride_gb, stride_gn, stride_gl,
    heads, query_length,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(O * dO), and a copy of lse; rows past the end get what makes their weights and gradients exactly 0."""
    padded_length = tl.cdiv(query_length, TILE) * TILE
    sequence, batch, head, start = _locate(padded_length, heads, BLOCK_L)
    rows = start + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_K)
    out_base = out_ptr + batch * stride_ob + head * stride_on
    grad_base = grad_out_ptr + batch * stride_gb + head * stride_gn
    out = load_rows(out_base, rows, columns, stride_ol, query_length, HEAD_WIDTH, True).to(tl.float32)
    grad_out = load_rows(grad_base, rows, columns, stride_gl, query_length, HEAD_WIDTH, True).to(tl.float32)
    lse = tl.load(lse_ptr + sequence * query_length + rows, mask=rows < query_length, other=float("inf"))
    tl.store(padded_lse_ptr + sequence * padded_length + rows, lse)
    tl.store(delta_ptr + sequence * padded_length + rows, tl.sum(out * grad_out, 1))


@triton.jit
def grad_query_kernel(
    q_rows, k_rows, v_rows, grad_out_rows, lse_ptr, delta_ptr, grad_q_ptr,
    key_tiles_ptr, key_counts_ptr, query_low_ptr, query_high_ptr, key_position_ptr,
    stride_qb, stride_qn, stride_ql,
    stride_kb, stride_kn, stride_kl,
    stride_vb, stride_vn, stride_vl,
    stride_gb, stride_gn, stride_gl,
    stride_dqb, stride_dqn, stride_dql,
    heads, query_length, key_length, mask_step, scale, scale_log2,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    TILE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_L query rows of one head and walks over the keys. No mask: None for its five pointers."""
    sequence, batch, head, first_row = _locate(query_length, heads, BLOCK_L)
    rows = first_row + tl.arange(0, BLOCK_L)
    q = _load_tile(
        q_rows, batch, head, first_row, stride_qb, stride_qn, stride_ql, query_length,
        HEAD_WIDTH, BLOCK_K, BLOCK_L, DESCRIBED,
    )  # fmt: skip
    grad_out = _load_tile(
        grad_out_rows, batch, head, first_row, stride_gb, stride_gn, stride_gl, query_length,
        HEAD_WIDTH, BLOCK_K, BLOCK_L, DESCRIBED,
    )  # fmt: skip
    padded_length = tl.cdiv(query_length, TILE) * TILE
    lse = _load_numbers(lse_ptr, sequence, first_row, padded_length, BLOCK_L, False)
    delta = _load_numbers(delta_ptr, sequence, first_row, padded_length, BLOCK_L, False)
    MASKED: tl.constexpr = key_tiles_ptr is not None
    if MASKED:
        mask = batch * mask_step
        tiles_ptr, full, steps = _listed_steps(
            key_tiles_ptr, key_counts_ptr, mask, first_row, query_length, key_length, BLOCK_S, TILE
        )
        query_low = tl.load(query_low_ptr + mask * query_length + rows, mask=rows < query_length, other=0)
        query_high = tl.load(query_high_ptr + mask * query_length + rows, mask=rows < query_length, other=0)
    else:
        tiles_ptr, full, steps = None, key_length // BLOCK_S, tl.cdiv(key_length, BLOCK_S)

    grad_q = tl.zeros([BLOCK_L, BLOCK_K], tl.float32)
    for step in range(steps):
        start = _step_start(tiles_ptr, step, BLOCK_S, TILE)
        k = _load_tile(
            k_rows, batch, head, start, stride_kb, stride_kn, stride_kl, key_length,
            HEAD_WIDTH, BLOCK_K, BLOCK_S, DESCRIBED,
        )  # fmt: skip
        v = _load_tile(
            v_rows, batch, head, start, stride_vb, stride_vn, stride_vl, key_length,
            HEAD_WIDTH, BLOCK_K, BLOCK_S, DESCRIBED,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_L, BLOCK_S]
        if step >= full:
            keys = start + tl.arange(0, BLOCK_S)
            if MASKED:
                key_position = tl.load(key_position_ptr + mask * key_length + keys, mask=keys < key_length, other=-1)
                scores = tl.where(is_allowed(query_low, query_high, key_position), scores, float("-inf"))
            else:  # a key of zeros scores 0, and exp2(0 - lse) overflows where all true scores are far below 0
                scores = tl.where(keys[None, :] < key_length, scores, float("-inf"))
        weights = tl.math.exp2(scores * scale_log2 - lse[:, None])
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")
    grad_q_base = grad_q_ptr + batch * stride_dqb + head * stride_dqn
    store_rows(grad_q_base, grad_q * scale, rows, tl.arange(0, BLOCK_K), stride_dql, query_length, HEAD_WIDTH)


@triton.jit
def grad_key_value_kernel(
    q_rows, k_rows, v_rows, grad_out_rows, lse_rows, delta_rows, grad_k_ptr, grad_v_ptr, grad_q_sums,
    query_tiles_ptr, query_counts_ptr, query_low_ptr, query_high_ptr, key_position_ptr,
    stride_qb, stride_qn, stride_ql,
    stride_kb, stride_kn, stride_kl,
    stride_vb, stride_vn, stride_vl,
    stride_gb, stride_gn, stride_gl,
    stride_dkb, stride_dkn, stride_dkl,
    heads, query_length, key_length, mask_step, scale, scale_log2,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    TILE: tl.constexpr, DESCRIBED: tl.constexpr, BULK_ADD: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_S key rows of one head and walks over the queries; grad_k and grad_v share one layout.

    With grad_q_sums [B * N * QT * BLOCK_K, TILE] in fp32 it also adds its share of dQ^T / scale there, atomically: through a
    descriptor with BULK_ADD (the bulk copy engine adds, in its own time), else through a pointer. Everything follows from the
    transposed scores S^T = K Q^T, so that no product needs another's result transposed.
    """
    sequence, batch, head, first_key = _locate(key_length, heads, BLOCK_S)
    keys = first_key + tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_K)
    k = _load_tile(
        k_rows, batch, head, first_key, stride_kb, stride_kn, stride_kl, key_length,
        HEAD_WIDTH, BLOCK_K, BLOCK_S, DESCRIBED,
    )  # fmt: skip
    v = _load_tile(
        v_rows, batch, head, first_key, stride_vb, stride_vn, stride_vl, key_length,
        HEAD_WIDTH, BLOCK_K, BLOCK_S, DESCRIBED,
    )  # fmt: skip
    padded_length = tl.cdiv(query_length, TILE) * TILE
    FUSED: tl.constexpr = grad_q_sums is not None
    MASKED: tl.constexpr = query_tiles_ptr is not None
    if MASKED:
        mask = batch * mask_step
        tiles_ptr, full, steps = _listed_steps(
            query_tiles_ptr, query_counts_ptr, mask, first_key, key_length, query_length, BLOCK_L, TILE
        )
    else:
        tiles_ptr, steps = None, tl.cdiv(query_length, BLOCK_L)

    grad_k = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    grad_v = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for step in range(steps):
        start = _step_start(tiles_ptr, step, BLOCK_L, TILE)
        rows = start + tl.arange(0, BLOCK_L)
        q = _load_tile(
            q_rows, batch, head, start, stride_qb, stride_qn, stride_ql, query_length,
            HEAD_WIDTH, BLOCK_K, BLOCK_L, DESCRIBED,
        )  # fmt: skip
        lse = _load_numbers(lse_rows, sequence, start, padded_length, BLOCK_L, DESCRIBED)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_S, BLOCK_L]
        if MASKED:
            if step >= full:
                position_ptr = key_position_ptr + mask * key_length
                key_position = tl.load(position_ptr + keys, mask=keys < key_length, other=-1)
                query_low = tl.load(query_low_ptr + mask * query_length + rows, mask=rows < query_length, other=0)
                query_high = tl.load(query_high_ptr + mask * query_length + rows, mask=rows < query_length, other=0)
                allowed = (query_low[None, :] <= key_position[:, None]) & (key_position[:, None] < query_high[None, :])
                scores = tl.where(allowed, scores, float("-inf"))
        elif FUSED:  # else keys past the end only reach rows that are not stored
            if first_key + BLOCK_S > key_length:
                scores = tl.where(keys[:, None] < key_length, scores, float("-inf"))
        elif DESCRIBED and BLOCK_K <= 128:  # noqa: SIM102 (decided when compiling)
            # Queries past the end weigh 0 by their lse. The branch is for Hopper's assembler, which without any in this loop makes
            # each product wait for the one before.
            if start + BLOCK_L > query_length:
                scores = tl.where(rows[None, :] < query_length, scores, float("-inf"))
        weights = tl.math.exp2(scores * scale_log2 - lse[None, :])
        grad_out = _load_tile(
            grad_out_rows, batch, head, start, stride_gb, stride_gn, stride_gl, query_length,
            HEAD_WIDTH, BLOCK_K, BLOCK_L, DESCRIBED,
        )  # fmt: skip
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        delta = _load_numbers(delta_rows, sequence, start, padded_length, BLOCK_L, DESCRIBED)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[None, :])).to(q.dtype)
        # Hopper's assembler makes all products wait for each other if dQ comes before dK; for others that order saves registers.
        if FUSED and not DESCRIBED:
            _add_grad_query(grad_q_sums, k, grad_scores, sequence, start, columns, padded_length, TILE, BULK_ADD)
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
        if FUSED and DESCRIBED:
            _add_grad_query(grad_q_sums, k, grad_scores, sequence, start, columns, padded_length, TILE, BULK_ADD)
    offset = batch * stride_dkb + head * stride_dkn
    store_rows(grad_k_ptr + offset, grad_k * scale, keys, columns, stride_dkl, key_length, HEAD_WIDTH)
    store_rows(grad_v_ptr + offset, grad_v, keys, columns, stride_dkl, key_length, HEAD_WIDTH)


@triton.jit
def _add_grad_query(
    grad_q_sums, k, grad_scores, sequence, start, columns, padded_length, TILE: tl.constexpr, BULK_ADD: tl.constexpr
):  # fmt: skip
    """Adds K^T dS^T, [BLOCK_K, BLOCK_L], to the sums of the queries from `start` on."""
    share = tl.dot(tl.trans(k), grad_scores, input_precision="ieee")
    first_sum = (sequence * (padded_length // TILE) + start // TILE) * columns.shape[0]
    if BULK_ADD:
        grad_q_sums.atomic_add([first_sum.to(tl.int32), start % TILE], share)
    else:
        places = start % TILE + tl.arange(0, grad_scores.shape[1])
        tl.atomic_add(grad_q_sums + (first_sum + columns)[:, None] * TILE + places[None, :], share, sem="relaxed")


@triton.jit
def finish_grad_query_kernel(
    grad_q_sums, grad_q_ptr,
    stride_dqb, stride_dqn, stride_dql,
    heads, query_length, scale,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dQ from the sums [B * N * QT * BLOCK_K, TILE] that grad_key_value_kernel left."""
    sequence, batch, head, start = _locate(query_length, heads, BLOCK_L)
    rows = start + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_K)
    first_sum = (sequence * tl.cdiv(query_length, TILE) + start // TILE) * BLOCK_K
    sums = tl.load(grad_q_sums + (first_sum + columns)[:, None] * TILE + (rows % TILE)[None, :])
    grad_q_base = grad_q_ptr + batch * stride_dqb + head * stride_dqn
    store_rows(grad_q_base, tl.trans(sums) * scale, rows, columns, stride_dql, query_length, HEAD_WIDTH)


@triton.jit
def _locate(length, heads, BLOCK: tl.constexpr):
    """This program's index into the flattened [B * N], its batch and head, and the first of the rows that it owns."""
    tiles = tl.cdiv(length, BLOCK)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    return sequence, sequence // heads, sequence % heads, (tl.program_id(0) % tiles) * BLOCK


@triton.jit
def _listed_steps(tiles_ptr, counts_ptr, mask, first, length, other_length, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The list of tiles that the owned tile at `first` meets, and the steps along it: how many need no mask, and all."""
    tile = mask * tl.cdiv(length, TILE) + first // TILE
    full = tl.load(counts_ptr + tile * 2) * (TILE // BLOCK)
    steps = tl.load(counts_ptr + tile * 2 + 1) * (TILE // BLOCK)
    return tiles_ptr + tile * tl.cdiv(other_length, TILE), full, steps


@triton.jit
def _step_start(tiles_ptr, step, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The first row of a step: in order, or in the listed tile."""
    STEPS: tl.constexpr = TILE // BLOCK
    if tiles_ptr is None:
        start = step * BLOCK
    else:
        start = tl.load(tiles_ptr + step // STEPS) * TILE + step % STEPS * BLOCK
    return start


@triton.jit
def _load_tile(
    source, batch, head, start, stride_b, stride_n, stride_row, row_limit,
    HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Loads [BLOCK_ROWS, BLOCK_K] of one head with zeros outside the tensor; `source` is a pointer or a descriptor."""
    if DESCRIBED:
        tile = load_described_rows(source, batch, head, start)
    else:
        base = source + batch * stride_b + head * stride_n
        rows = start + tl.arange(0, BLOCK_ROWS)
        tile = load_rows(base, rows, tl.arange(0, BLOCK_K), stride_row, row_limit, HEAD_WIDTH, True)
    return tile


@triton.jit
def _load_numbers(source, sequence, start, padded_length, BLOCK: tl.constexpr, DESCRIBED: tl.constexpr):
    """Loads one number a row from the [B * N, padded_length]; `source` is a pointer or a descriptor."""
    if DESCRIBED:
        numbers = source.load([sequence.to(tl.int32), start]).reshape(BLOCK)
    else:
        numbers = tl.load(source + sequence * padded_length + start + tl.arange(0, BLOCK))
    return numbers
