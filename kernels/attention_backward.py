"""Attention's backward pass: its mathematics, and the function that runs its kernels.

With P and lse as in the forward pass:
    delta = rowsum(O * dO)
    dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q
P is computed again from Q, K and lse (Dao et al. 2022, arXiv:2205.14135).

Two forms. The deterministic one has a kernel that owns query rows and one that owns key rows: each output element is written by
exactly one program, at the price of computing S and dP twice (7 products of matrices). The fused one has only the second kernel
(5 products), which also adds its share of dQ atomically to sums in fp32: faster, but the order of the additions differs from
run to run. fp32 and head widths above 128 always take the first form: the fused kernel would not fit their registers.

Transposing the result of one product for the next has been miscompiled for Hopper by released compilers. So dK and dV come from
S^T = K Q^T directly, and the fused kernel adds up dQ^T = scale K^T dS^T, which a small kernel turns around at the end.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention import empty_token_major
from .attention_backward_kernels import (
    delta_kernel,
    finish_grad_query_kernel,
    grad_key_value_kernel,
    grad_query_kernel,
)
from .attention_backward_launches import ROWS_LAUNCH, Launches, choose_launches
from .attention_mask import MASK_TILE
from .attention_tiles import (
    Launch,
    MaskTensors,
    can_describe,
    describe,
    is_hopper,
    launch_constants,
    on_device_of,
    padded_head_width,
    with_unit_stride,
)
from .dispatch import INTERPRETED


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
    launches: Launches | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, token-major in memory, from what `run_forward` took and returned.

    `mask` holds the tensors of a TileMask, or nothing. A query without keys (lse of infinity) and a key without queries get
    gradients of exactly 0. `deterministic` asks for the same bits from the same inputs. `launches` overrides the tables.
    """
    masked = len(mask) > 0
    launches = launches or choose_launches(
        q.dtype, q.shape[-1], hopper=is_hopper(q.device), masked=masked, deterministic=deterministic
    )
    assert launches.grad_query is not None or not deterministic
    # What the bulk copy engine cannot address is rare (a gradient expanded from one number, say): a copy of it costs little.
    prepare = _describable if launches.grad_key_value.descriptors else with_unit_stride
    grad_out, q, k, v = map(prepare, (grad_out, q, k, v))
    grad_q, grad_k, grad_v = empty_token_major(q), empty_token_major(k), empty_token_major(k)
    if grad_q.numel() > 0:
        with on_device_of(q):
            _launch_all((q, k, v, grad_out), out, lse, mask, (grad_q, grad_k, grad_v), scale, launches)
    return grad_q, grad_k, grad_v


def _launch_all(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    mask: Sequence[Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
    launches: Launches,
) -> None:
    q, k, _, grad_out = inputs
    grad_q, grad_k, grad_v = grads
    batch, heads, query_length, head_width = q.shape
    key_length, sequences, width = k.shape[2], batch * heads, padded_head_width(head_width)
    row_constants = {
        "HEAD_WIDTH": head_width, "BLOCK_K": width, "BLOCK_L": ROWS_LAUNCH.queries, "TILE": MASK_TILE,
        "num_warps": ROWS_LAUNCH.warps,
    }  # fmt: skip
    strides = [stride for tensor in inputs for stride in tensor.stride()[:3]]
    m = MaskTensors(*mask) if mask else None
    rules = (m.query_low, m.query_high, m.key_position) if m else (None,) * 3
    sizes = (heads, query_length, key_length, m.step if m else 0, scale, scale * math.log2(math.e))

    padded_length = triton.cdiv(query_length, MASK_TILE) * MASK_TILE
    padded_lse, delta = q.new_empty(2, sequences, padded_length, dtype=torch.float32)
    out = with_unit_stride(out)
    delta_kernel[(triton.cdiv(padded_length, ROWS_LAUNCH.queries) * sequences,)](
        out, grad_out, lse.contiguous(), padded_lse, delta, *out.stride()[:3], *grad_out.stride()[:3], heads, query_length,
        **row_constants,
    )  # fmt: skip
    if (launch := launches.grad_query) is not None:
        lists = (m.key_tiles, m.key_counts) if m else (None, None)
        grad_query_kernel[(triton.cdiv(query_length, launch.queries) * sequences,)](
            *_sources(inputs, launch), padded_lse, delta, grad_q, *lists, *rules, *strides, *grad_q.stride()[:3], *sizes,
            **launch_constants(launch, head_width), TILE=MASK_TILE, DESCRIBED=launch.descriptors,
        )  # fmt: skip
    launch, fused = launches.grad_key_value, launches.grad_query is None
    bulk_add = fused and launch.descriptors and not INTERPRETED  # the interpreter cannot add through a descriptor
    sums = summed = None
    if fused:
        sums = q.new_zeros(sequences * padded_length // MASK_TILE * width, MASK_TILE, dtype=torch.float32)
        summed = TensorDescriptor.from_tensor(sums, [width, launch.queries]) if bulk_add else sums
    numbers: list[Any] = [padded_lse, delta]
    if launch.descriptors:
        numbers = [TensorDescriptor.from_tensor(x, [1, launch.queries]) for x in numbers]
    lists = (m.query_tiles, m.query_counts) if m else (None, None)
    grad_key_value_kernel[(triton.cdiv(key_length, launch.keys) * sequences,)](
        *_sources(inputs, launch), *numbers, grad_k, grad_v, summed, *lists, *rules, *strides, *grad_k.stride()[:3], *sizes,
        **launch_constants(launch, head_width), TILE=MASK_TILE, DESCRIBED=launch.descriptors, BULK_ADD=bulk_add,
    )  # fmt: skip
    if sums is not None:
        finish_grad_query_kernel[(triton.cdiv(query_length, ROWS_LAUNCH.queries) * sequences,)](
            sums, grad_q, *grad_q.stride()[:3], heads, query_length, scale, **row_constants
        )


def _describable(tensor: Tensor) -> Tensor:
    return tensor if can_describe(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _sources(inputs: tuple[Tensor, Tensor, Tensor, Tensor], launch: Launch) -> tuple[Any, ...]:
    """q, k, v and grad_out as the kernels of this launch read them."""
    if not launch.descriptors:
        return inputs
    rows = (launch.queries, launch.keys, launch.keys, launch.queries)
    return tuple(describe(tensor, count) for tensor, count in zip(inputs, rows, strict=True))
