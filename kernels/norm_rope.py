"""RMSNorm over all heads together and rotary positions of (frame, row, column), in one pass over the projections.

`rms_norm_rope` prepares queries and keys of self-attention, `rms_norm_heads` those of cross-attention, which have no positions.
A `Rope` says where each token is. On CUDA both call the operator `muybridge::rms_norm_rope`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from .dispatch import KERNEL_DTYPES, Backend, has_kernel, pointwise_backend

THETA = 10000.0


def rope_axis_pairs(head_width: int) -> tuple[int, int, int]:
    """Pairs of channels of a head that turn with the frame, the row and the column, as Wan splits them; 128 gives 22, 21, 21."""
    spatial = head_width // 6
    return head_width // 2 - 2 * spatial, spatial, spatial


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary positions of L tokens (Su et al. 2021, arXiv:2104.09864), each axis turning its own share of a head's pairs.

    The pair p of channels (2p, 2p + 1) turns by the angle position * frequency[p], where the position is the token's frame for
    the first `axis_pairs[0]` pairs, its row for the next `axis_pairs[1]` and its column for the rest.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """

    # Cosine and sine of every angle, fp32 [P, K/2, 2]: a row for each of P positions, a column for each pair.
    table: Tensor
    # Frame, row and column of each token, int16 [L, 3] for all samples or [B, L, 3]; each in [0, P).
    coordinates: Tensor
    axis_pairs: tuple[int, int, int]

    def __post_init__(self) -> None:
        table, coordinates = self.table, self.coordinates
        if table.dim() != 3 or table.shape[1:] != (sum(self.axis_pairs), 2) or table.dtype != torch.float32:
            rule = f"the table must be [P, {sum(self.axis_pairs)}, 2] in float32, {self.axis_pairs} pairs an axis"
        elif coordinates.dim() not in (2, 3) or coordinates.shape[-1] != 3 or coordinates.dtype != torch.int16:
            rule = "coordinates must be [L, 3] or [B, L, 3] in int16"
        elif table.device != coordinates.device:
            rule = "table and coordinates must be on one device"
        else:
            return
        described = ", ".join(_describe(n, t) for n, t in (("table", table), ("coordinates", coordinates)))
        raise ValueError(f"Rope: {described}: {rule}")

    @property
    def rotations(self) -> Tensor:
        """Unit complex numbers [L, 1, K/2] or [B, L, 1, K/2], for machines without the kernel: one product turns all heads."""
        if torch.compiler.is_compiling():  # which cannot look into a cached property
            return _rotations(self.table, self.coordinates, self.axis_pairs)
        return self._cached_rotations

    @cached_property
    def _cached_rotations(self) -> Tensor:
        # Born under inference mode (sampling between two training steps), it could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            return _rotations(self.table, self.coordinates, self.axis_pairs)


@lru_cache(maxsize=8)
def build_rope(frames: int, height: int, width: int, *, head_width: int, device: torch.device) -> Rope:
    """Positions of a grid of tokens in raster order; cached, because a run sees a handful of grids."""
    with torch.inference_mode(False), torch.no_grad():
        axes = [torch.arange(size, dtype=torch.int16, device=device) for size in (frames, height, width)]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    table = rope_table(max(frames, height, width), head_width=head_width, device=device)
    return Rope(table, coordinates, rope_axis_pairs(head_width))


def build_packed_rope(coordinates: Tensor, *, positions: int, head_width: int, device: torch.device) -> Rope:
    """Positions of tokens at any coordinates (frame, row, column) below `positions`: [L, 3] or [B, L, 3], on the CPU.

    Raises:
        ValueError: a coordinate outside [0, positions), or coordinates on a GPU, where looking would stall it.
    """
    if coordinates.device.type != "cpu":
        raise ValueError(f"build_packed_rope: coordinates on {coordinates.device} must be on the CPU")
    if coordinates.numel() > 0 and not 0 <= coordinates.min() <= coordinates.max() < positions:
        low, high = int(coordinates.min()), int(coordinates.max())
        raise ValueError(f"build_packed_rope: coordinates from {low} to {high} must be in [0, positions={positions})")
    table = rope_table(positions, head_width=head_width, device=device)
    return Rope(table, coordinates.to(torch.int16).to(device, non_blocking=True), rope_axis_pairs(head_width))


@lru_cache(maxsize=8)
def rope_table(positions: int, *, head_width: int, device: torch.device) -> Tensor:
    """Cosine and sine [P, K/2, 2] of position * theta^(-i/n) for the n pairs i of each axis, in float64 inside, float32 outside.

    Raises:
        ValueError: positions that an int16 coordinate cannot name.
    """
    if not 0 < positions <= torch.iinfo(torch.int16).max + 1:
        raise ValueError(f"rope_table: positions={positions} must be from 1 to 32768, for coordinates are int16")
    with torch.inference_mode(False), torch.no_grad():
        axes = [torch.arange(n, dtype=torch.float64, device=device) / n for n in rope_axis_pairs(head_width)]
        angles = torch.outer(torch.arange(positions, dtype=torch.float64, device=device), THETA ** -torch.cat(axes))
        return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def reference_forward(
    x: Tensor, weight: Tensor, rotations: Tensor | None, *, heads: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The mathematics of the forward kernel: heads [B, L, N, K] in `dtype`, x / rms(x) [B, L, D] and 1 / rms(x) [B, L]."""
    x = _at_least_fp32(x)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    rstd = square.div_(x.shape[-1]).add_(eps).rsqrt_()  # [B, L, 1]
    normed = x * rstd
    out = (normed * weight).unflatten(-1, (heads, -1))  # [B, L, N, K]
    if rotations is not None:
        # One complex product is a single launch; the same written with cosines and sines takes seven.
        out = torch.view_as_real(_as_complex(out) * rotations).flatten(-2)
    return out.to(dtype).contiguous(), normed, rstd.squeeze(-1)


def reference_backward(
    grad_out: Tensor, normed: Tensor, weight: Tensor, rstd: Tensor, rotations: Tensor | None, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The mathematics of the backward kernel: gradients of x [B, L, D] in `dtype` and of the weight [D]."""
    grad = _at_least_fp32(grad_out)
    if rotations is not None:
        pairs = _as_complex(grad)
        # Not conj(), which is lazy: inside an operator of a compiled graph the product does not see it.
        turned = torch.empty_like(pairs, memory_format=torch.contiguous_format)
        grad = torch.view_as_real(torch.mul(pairs, rotations.conj_physical(), out=turned))
    grad = grad.reshape(normed.shape)
    grad_normed = grad * normed
    grad_weight = grad_normed.flatten(0, -2).sum(0)
    mean = (grad_normed @ weight.to(normed.dtype)).div_(weight.numel()).unsqueeze(-1)  # [B, L, 1]
    grad_x = (grad * weight).addcmul_(normed, mean, value=-1).mul_(rstd.unsqueeze(-1))
    return grad_x.to(dtype), grad_weight.to(weight.dtype)


@torch.library.custom_op("muybridge::rms_norm_rope", mutates_args=())
def norm_rope_forward(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    coordinates: Tensor | None,
    axis_pairs: Sequence[int],
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The operator behind `rms_norm_rope`: heads [B, L, N, K] in `dtype` and 1 / rms(x) [B, L], which the backward pass needs."""
    if has_kernel(x):
        from .norm_rope_kernels import run_forward  # here, so that machines without Triton can import this module

        return run_forward(x, weight, table, coordinates, axis_pairs, heads=heads, eps=eps, dtype=dtype)
    rotations = None if table is None or coordinates is None else _rotations(table, coordinates, axis_pairs)
    out, _, rstd = reference_forward(x, weight, rotations, heads=heads, eps=eps, dtype=dtype)
    return out, rstd


@norm_rope_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    table: Tensor | None,
    coordinates: Tensor | None,
    axis_pairs: Sequence[int],
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    out = x.new_empty(batch, length, heads, width // heads, dtype=dtype)
    return out, x.new_empty(batch, length, dtype=_at_least_fp32_dtype(x.dtype))


@torch.library.custom_op("muybridge::rms_norm_rope_backward", mutates_args=())
def norm_rope_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    table: Tensor | None,
    coordinates: Tensor | None,
    axis_pairs: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weight; the same inputs give the same bits."""
    if has_kernel(x):
        from .norm_rope_kernels import run_backward

        return run_backward(grad_out, x, weight, rstd, table, coordinates, axis_pairs)
    normed = _at_least_fp32(x) * rstd.unsqueeze(-1)
    rotations = None if table is None or coordinates is None else _rotations(table, coordinates, axis_pairs)
    grad_x, grad_weight = reference_backward(grad_out, normed, weight, rstd, rotations, dtype=x.dtype)
    return grad_x.contiguous(), grad_weight


@norm_rope_backward.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    table: Tensor | None,
    coordinates: Tensor | None,
    axis_pairs: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, table, coordinates, ctx.axis_pairs, _heads, _eps, _dtype = inputs
    rstd = output[1]
    ctx.save_for_backward(x, weight, rstd, table, coordinates)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, _grad_rstd: None) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None, None)
    if grad_out is not None:
        grads = norm_rope_backward(grad_out, *ctx.saved_tensors, ctx.axis_pairs)
    return *grads, None, None, None, None, None, None


norm_rope_forward.register_autograd(_backward, setup_context=_save_for_backward)


class ReferenceNormRope(torch.autograd.Function):
    """The reference with its backward written out, because autograd runs twenty small kernels for it; first derivatives only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rotations: Tensor | None, heads: int, eps: float, dtype: torch.dtype
    ) -> Tensor:
        out, normed, rstd = reference_forward(x, weight, rotations, heads=heads, eps=eps, dtype=dtype)
        ctx.save_for_backward(normed, weight, rstd, rotations)
        ctx.x_dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, rstd, rotations = ctx.saved_tensors
        grads = reference_backward(grad_out, normed, weight, rstd, rotations, dtype=ctx.x_dtype)
        return *grads, None, None, None, None


def rms_norm_rope(
    x: Tensor, weight: Tensor, rope: Rope, *, heads: int, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalises x [B, L, D] over all channels, scales it by weight [D], splits it into heads and turns them: -> [B, L, N, K].

    Arithmetic is fp32 (fp64 for fp64), and the result is rounded once, to `dtype` (None: that of x). Any strides of x are taken
    as they are (one projection may have written queries, keys and values side by side), except that channels without unit
    stride are copied. The output is contiguous. Nothing is cast under autocast.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or an eps that is not positive and finite. The rules are
            the same on every backend.
    """
    _check("rms_norm_rope", x, weight, rope, heads, eps, dtype)
    if pointwise_backend("rms_norm_rope", x) is Backend.own:
        return norm_rope_forward(
            x, weight, rope.table, rope.coordinates, rope.axis_pairs, heads, eps, dtype or x.dtype
        )[0]
    return ReferenceNormRope.apply(x, weight, rope.rotations, heads, eps, dtype or x.dtype)


def rms_norm_heads(x: Tensor, weight: Tensor, *, heads: int, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """As `rms_norm_rope` for tokens without positions, such as both sides of cross-attention: [B, L, D] -> [B, L, N, K]."""
    _check("rms_norm_heads", x, weight, None, heads, eps, dtype)
    if pointwise_backend("rms_norm_rope", x) is Backend.own:
        return norm_rope_forward(x, weight, None, None, (), heads, eps, dtype or x.dtype)[0]
    return ReferenceNormRope.apply(x, weight, None, heads, eps, dtype or x.dtype)


def _rotations(table: Tensor, coordinates: Tensor, axis_pairs: Sequence[int]) -> Tensor:
    """Unit complex numbers [L, 1, K/2] or [B, L, 1, K/2]: every pair's own column of the table, at its axis's coordinate."""
    shares = torch.view_as_complex(table).split(list(axis_pairs), dim=-1)
    positions = coordinates.long().unbind(-1)
    return torch.cat([share[at] for share, at in zip(shares, positions, strict=True)], dim=-1).unsqueeze(-2)


def _as_complex(heads: Tensor) -> Tensor:
    pairs = heads.unflatten(-1, (-1, 2))
    *strides, last = pairs.stride()
    offset = 0 if torch.compiler.is_compiling() else pairs.storage_offset()  # Dynamo cannot ask for it
    if last != 1 or any(step % 2 != 0 for step in (offset, *strides)):
        pairs = pairs.clone(memory_format=torch.contiguous_format)  # the two must lie where a complex number may
    return torch.view_as_complex(pairs)


def _at_least_fp32_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(_at_least_fp32_dtype(tensor.dtype))


def _check(
    name: str, x: Tensor, weight: Tensor, rope: Rope | None, heads: int, eps: float, dtype: torch.dtype | None
) -> None:
    if x.dim() != 3 or weight.shape != x.shape[-1:]:
        rule = "must be x [B, L, D] with weight [D]"
    elif heads < 1 or x.shape[-1] == 0 or x.shape[-1] % (2 * heads) != 0:
        rule = f"must have a width that heads={heads} split into an even number of channels each"
    elif x.dtype not in (*KERNEL_DTYPES, torch.float64) or weight.dtype not in (x.dtype, torch.float32):
        rule = "must have x in float32, float16, bfloat16 (or float64, without a kernel) and the weight in float32 or the same"
    elif dtype is not None and dtype not in (*KERNEL_DTYPES, x.dtype):
        rule = f"dtype={dtype} must be float32, float16, bfloat16 or that of x"
    elif x.device != weight.device or (rope is not None and rope.table.device != x.device):
        rule = "must be on one device"
    elif rope is not None and 2 * heads * rope.table.shape[1] != x.shape[-1]:
        rule = f"the table must have half as many pairs as a head of heads={heads} has channels"
    elif rope is not None and rope.coordinates.shape[:-1] not in (x.shape[:2], x.shape[1:2]):
        rule = "coordinates must be [L, 3] or [B, L, 3]"
    elif not 0 < eps < math.inf:
        raise ValueError(f"{name}: eps={eps} must be positive and finite")
    else:
        return
    named = {"x": x, "weight": weight} | (
        {} if rope is None else {"table": rope.table, "coordinates": rope.coordinates}
    )
    raise ValueError(f"{name}: {', '.join(_describe(n, t) for n, t in named.items())}: {rule}")


def _describe(name: str, tensor: Tensor) -> str:
    return f"{name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
