"""Attention: softmax(scale Q K^T) V over all keys or those of a mask, on kernels of our own, cuDNN's or PyTorch's.

`attention` is the public name; dispatch.py chooses. Our kernels stand behind the operator `muybridge::attention`, which
torch.compile, activation checkpointing and meta tensors see as one opaque step with a known shape and gradient.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from .attention_mask import TileMask, dense_mask, mask_density
from .dispatch import KERNEL_DTYPES, Backend, attention_backend, has_kernel, is_deterministic

HEAD_WIDTH_MULTIPLE = 16
HEAD_WIDTH_LIMIT = 256


def reference_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], *, scale: float
) -> tuple[Tensor, Tensor]:
    """The mathematics of the forward kernel: output [B, N, L, K] and base-2 log-sum-exp of the scaled scores [B, N, L].

    `mask` holds the seven tensors of a TileMask, or nothing. A row that meets no key gives 0, with a log-sum-exp of +inf, so
    that its weights exp(score - lse) are 0 in the backward pass, too.
    """
    scores = _masked_scores(q, k, mask) * scale
    lse = torch.logsumexp(scores, -1)
    lse = torch.where(lse == -math.inf, math.inf, lse)
    out = torch.exp(scores - lse[..., None]) @ _at_least_fp32(v)
    return out.to(q.dtype), (lse / math.log(2)).float()


def reference_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Sequence[Tensor],
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mathematics of the backward kernels: gradients of q [B, N, L, K], k and v [B, N, S, K]."""
    grad_out, q32, k32, v32, out = map(_at_least_fp32, (grad_out, q, k, v, out))
    weights = torch.exp2(_masked_scores(q, k, mask) * (scale / math.log(2)) - lse[..., None])
    delta = (out * grad_out).sum(-1, keepdim=True)
    grad_scores = weights * (grad_out @ v32.mT - delta)
    grad_q, grad_k, grad_v = scale * grad_scores @ k32, scale * grad_scores.mT @ q32, weights.mT @ grad_out
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _masked_scores(q: Tensor, k: Tensor, mask: Sequence[Tensor]) -> Tensor:
    scores = _at_least_fp32(q) @ _at_least_fp32(k).mT  # [B, N, L, S]
    return scores.masked_fill(~dense_mask(mask)[:, None], -math.inf) if mask else scores


@torch.library.custom_op("muybridge::attention", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """The operator behind `attention`: output and base-2 log-sum-exp, which the backward pass needs.

    `mask` is TileMask.tensors(), or empty for attention to all keys.
    """
    if has_kernel(q):
        from .attention_forward import run_forward  # here, so that machines without Triton can import this module

        return run_forward(q, k, v, mask, scale=scale)
    out, lse = reference_forward(q, k, v, mask, scale=scale)
    return _to_token_major(out), lse


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    return empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("muybridge::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Sequence[Tensor],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; where `deterministic`, the same inputs give the same bits."""
    if has_kernel(q):
        from .attention_backward import run_backward

        return run_backward(grad_out, q, k, v, out, lse, mask, scale=scale, deterministic=deterministic)
    grad_q, grad_k, grad_v = reference_backward(grad_out, q, k, v, out, lse, mask, scale=scale)
    return _to_token_major(grad_q), _to_token_major(grad_k), _to_token_major(grad_v)


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Sequence[Tensor],
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_token_major(q), empty_token_major(k), empty_token_major(v)


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Sequence[Tensor], float, bool], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, mask, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, *mask)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _grad_lse: None) -> tuple[Any, ...]:
    q, k, v, out, lse, *mask = ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_out is not None:
        grads = attention_backward(grad_out, q, k, v, out, lse, mask, ctx.scale, ctx.deterministic)
    return *grads, [None] * len(mask), None, None


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula([torch.ops.muybridge.attention], get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return _matmul_flops(2, q, k, mask)


@register_flop_formula([torch.ops.muybridge.attention_backward], get_raw=True)
def _backward_flops(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Sequence[Tensor],
    *_: Any,
    **__: Any,
) -> int:
    return _matmul_flops(5, q, k, mask)


def _matmul_flops(products: int, q: Tensor, k: Tensor, mask: Sequence[Tensor]) -> int:
    """Operations of so many products of [L, K] by [K, S], counted as torch counts them, over the mask's tiles where known."""
    flops = products * 2 * q.numel() * k.shape[2]
    if not mask or q.is_meta or isinstance(q, FakeTensor):  # the lists of a mask without values cannot be read
        return flops
    return round(flops * mask_density(mask))


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: TileMask | None = None) -> Tensor:
    """Attends from each query to the keys that `mask` allows: q [B, N, L, K], k and v [B, N, S, K] -> [B, N, L, K].

    `scale` multiplies the scores before the softmax; None is 1 / sqrt(K). Without a mask every query attends to every key. A
    query that may attend to none gives 0 and takes part in no gradient. Padding must still be finite. Any strides are taken as
    they are, except that a head width without unit stride is copied. Our kernels lay the output out as [B, L, N, K] and cast
    nothing, also under autocast. fp64 runs on PyTorch's own attention everywhere.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an empty L or S, a head width that is not a multiple of 16
            up to 256, a scale that is not positive and finite, or a mask for other lengths, another batch or device. The rules
            are the same on every backend.
    """
    _check(q, k, v, scale)
    if mask is not None:
        _check_mask(q, k, mask)
    backend = attention_backend(q, mask="none" if mask is None else mask.kind, key_length=k.shape[2])
    if backend is Backend.own:
        tensors = [] if mask is None else mask.tensors()
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return attention_forward(q, k, v, tensors, scale, is_deterministic())[0]
    if backend is Backend.cudnn:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # cuDNN takes no other
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    allowed = mask.dense()[:, None]  # [M, 1, L, S]
    meets = allowed.any(-1, keepdim=True)
    # A row without keys would divide 0 by 0, in some of PyTorch's kernels and their gradients.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | ~meets, scale=scale)
    return torch.where(meets, out, 0.0)


def empty_token_major(like: Tensor) -> Tensor:
    """An uninitialised [B, N, L, K] tensor laid out as [B, L, N, K], so that merging the heads afterwards copies nothing."""
    batch, heads, length, head_width = like.shape
    return like.new_empty(batch, length, heads, head_width).transpose(1, 2)


def _to_token_major(tensor: Tensor) -> Tensor:
    return empty_token_major(tensor).copy_(tensor)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        rule = "must be q [B, N, L, K] with k and v [B, N, S, K]"
    elif q.shape[2] < 1 or k.shape[2] < 1:
        rule = "must have at least one query and one key"
    elif q.shape[3] % HEAD_WIDTH_MULTIPLE != 0 or not 0 < q.shape[3] <= HEAD_WIDTH_LIMIT:
        rule = f"must have a head width that is a multiple of {HEAD_WIDTH_MULTIPLE} up to {HEAD_WIDTH_LIMIT}"
    elif not q.dtype == k.dtype == v.dtype or q.dtype not in (*KERNEL_DTYPES, torch.float64):
        rule = "must share one dtype of float32, float16, bfloat16 (or float64, without a kernel)"
    elif not q.device == k.device == v.device:
        rule = "must be on one device"
    elif scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"attention: scale={scale} must be positive and finite")
    else:
        return
    tensors = ", ".join(f"{n} {list(t.shape)} {t.dtype} on {t.device}" for n, t in (("q", q), ("k", k), ("v", v)))
    raise ValueError(f"attention: {tensors}: {rule}")


def _check_mask(q: Tensor, k: Tensor, mask: TileMask) -> None:
    if not isinstance(mask, TileMask):
        raise ValueError(
            f"attention: mask of type {type(mask).__name__} must be a TileMask (see packed_mask, tile_mask, ...)"
        )
    batch, _, length, _ = q.shape
    samples, *lengths = *mask.query_low.shape, mask.key_position.shape[1]
    if samples not in (1, batch) or lengths != [length, k.shape[2]]:
        rule = "must be for 1 or B samples, L queries and S keys"
    elif any(tensor.device != q.device for tensor in mask.tensors()):
        rule = "must be on one device (TileMask.to moves a mask)"
    else:
        return
    raise ValueError(
        f"attention: q {list(q.shape)} on {q.device}, k {list(k.shape)}, {mask.kind} mask {[samples, *lengths]} on"
        f" {mask.query_low.device}: the mask {rule}"
    )
