"""Splits the tokens of a clip over the processes of a sequence group (Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

Every process takes a stretch of neighbouring tokens through all blocks. Only self-attention needs the others': there, the processes
trade tokens of all heads for all tokens of some heads, attend, and trade back. What comes out of the model is whole on all of them.

Gradients: all processes of a group compute the same loss, and the gradient of a weight is, on each, the part that comes through its
own tokens; their sum is the gradient. Nothing is scaled here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels import Rope, TileMask
from ..kernels.attention_mask import build_mask
from ..models.blocks import DiTBlock
from ..models.dit import DiT
from ..models.token_layout import TokenLayout
from .mesh import Axis

# By name, for operators take no process groups.
_GROUPS: dict[str, dist.ProcessGroup] = {}


def split_sequence(dit: DiT, axis: Axis) -> None:
    """Make the model share the tokens of its clips with the processes of `axis`, which have to call it together, with equal inputs.

    Inputs and outputs stay as they are, whole on every process. Any number of tokens and heads will do: what the processes do not
    divide is filled up with zeros, which cost what tokens and heads cost. An axis of one process changes nothing.
    """
    if axis.size == 1:
        return
    assert axis.group is not None
    name = axis.group.group_name
    _GROUPS[name] = axis.group
    dit.run_blocks = _SplitBlocks(dit.run_blocks, axis, name)
    for block in dit.blocks:
        assert isinstance(block, DiTBlock)
        block.attn1.attend = partial(exchanged_attention, attend=block.attn1.attend, processes=axis.size, group=name)


@dataclass(frozen=True, eq=False)
class WholeSequence:
    """The tokens of all processes together: how many they are, without padding, and which attend to each other (None: all)."""

    length: int
    mask: TileMask | None


class _SplitBlocks:
    """The way through all blocks for this process's tokens, and the tokens of all at the end."""

    def __init__(self, run_blocks: Callable[..., Tensor], axis: Axis, group: str) -> None:
        self._run_blocks = run_blocks
        self._axis = axis
        self._group = group
        self._layouts: WeakKeyDictionary[TokenLayout, TokenLayout] = WeakKeyDictionary()

    def __call__(
        self, x: Tensor, timestep: Tensor, text: Tensor, layout: TokenLayout, image_features: Tensor | None
    ) -> Tensor:
        """Tokens [B, L, D], timestep [B, R] and text -> [B, L, c], each the same on all processes."""
        length, rows, processes = x.shape[1], timestep.shape[1], self._axis.size
        if rows > 1:
            # Rows that the processes divide lie with their tokens; others, such as those of 21 frames, become a row a token.
            timestep = self._own(timestep if rows % processes == 0 else timestep.repeat_interleave(length // rows, 1))
        own = self._own_layout(layout, length)
        tokens = self._run_blocks(self._own(x), timestep, text, own, image_features)  # [B, L/P, c]
        gathered = gather_first(tokens.transpose(0, 1).contiguous(), self._axis.rank, processes, self._group)
        return gathered.transpose(0, 1)[:, :length]

    def _own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's stretch of a dim, with zeros at the end where the processes do not divide it."""
        count = -(-x.shape[dim] // self._axis.size)
        first = min(self._axis.rank * count, x.shape[dim])
        own = x.narrow(dim, first, min(count, x.shape[dim] - first))
        if missing := count - own.shape[dim]:
            return F.pad(own, (0, 0) * (x.dim() - 1 - dim) + (0, missing))
        # A view would keep the tokens of all processes alive until the backward, and one sample's strides would compile anew.
        return own.clone(memory_format=torch.contiguous_format)

    def _own_layout(self, layout: TokenLayout, length: int) -> TokenLayout:
        """The layout of this process's tokens; made once for each that the model keeps."""
        if (known := self._layouts.get(layout)) is not None:
            return known
        # Tensors born under inference mode (sampling between two training steps) could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            rope, text_mask = layout.rope, layout.text_mask
            if text_mask is not None:
                # Padding has an empty interval, from 0 to 0. Intervals are all there is to masks of packed clips.
                assert text_mask.kind == "packed"
                low, high = (self._own(bound) for bound in (text_mask.query_low, text_mask.query_high))
                text_mask = build_mask(text_mask.kind, low, high, text_mask.key_position)
            own = TokenLayout(
                Rope(rope.table, self._own(rope.coordinates, rope.coordinates.dim() - 2), rope.axis_pairs),
                mask=WholeSequence(length, layout.mask),  # type: ignore[arg-type]  # goes to `exchanged_attention` as it is
                text_mask=text_mask,
            )
        self._layouts[layout] = own
        return own


def exchanged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: WholeSequence,
    attend: Callable[..., Tensor],
    processes: int,
    group: str,
) -> Tensor:
    """Attention of this process's queries to the keys of all: q, k, v [B, N, L/P, K], all heads -> the same of the output."""
    heads = q.shape[1]
    # All three in one message. It costs no copy, for a process's heads have to be brought together in any case; and with tokens
    # in front of samples, what arrives is in order as it lies: attention reads it in place.
    sent = torch.stack([_by_process(x, processes) for x in (q, k, v)], dim=3)  # [P, L/P, B, 3, N/P, K]
    arrived = all_to_all(sent, group).flatten(0, 1)[: mask.length]  # [L, B, 3, N/P, K]
    out = attend(*(x.permute(1, 2, 0, 3) for x in arrived.unbind(2)), mask=mask.mask)  # [B, N/P, L, K]
    if missing := processes * q.shape[2] - mask.length:
        out = F.pad(out, (0, 0, 0, missing))
    sent = out.permute(2, 0, 1, 3).unflatten(0, (processes, -1)).contiguous()  # [P, L/P, B, N/P, K]
    arrived = all_to_all(sent, group)
    return arrived.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :heads].transpose(1, 2)  # [B, N, L/P, K]


def _by_process(x: Tensor, processes: int) -> Tensor:
    """[B, N, L/P, K] -> [P, L/P, B, N/P, K], the heads of one process after those of another; zeros fill up the last."""
    if missing := -x.shape[1] % processes:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (processes, -1)).permute(1, 3, 0, 2, 4)


# Both exchanges are operators, so that torch.compile and activation checkpointing see one opaque step of known shape and gradient.


@torch.library.custom_op("muybridge::all_to_all", mutates_args=())
def all_to_all(x: Tensor, group: str) -> Tensor:
    """Sends x[p] to process p of a group and returns what came from each: [P, ...], contiguous -> the same shape. Collective."""
    arrived = torch.empty_like(x)
    dist.all_to_all_single(arrived, x, group=_GROUPS[group])
    return arrived


@all_to_all.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _remember_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _all_to_all_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return all_to_all(grad.contiguous(), ctx.group), None


all_to_all.register_autograd(_all_to_all_backward, setup_context=_remember_group)


@torch.library.custom_op("muybridge::gather_first", mutates_args=())
def gather_first(x: Tensor, rank: int, processes: int, group: str) -> Tensor:
    """Puts together what all processes of a group have: [n, ...], contiguous -> [P n, ...]. Collective.

    In the backward each takes its own part of its own gradient: as all go on to compute the same, a sum would count it P times.
    """
    whole = x.new_empty(processes * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(whole, x, group=_GROUPS[group])
    return whole


@gather_first.register_fake
def _(x: Tensor, rank: int, processes: int, group: str) -> Tensor:
    return x.new_empty(processes * x.shape[0], *x.shape[1:])


def _remember_rank(ctx: Any, inputs: tuple[Tensor, int, int, str], output: Tensor) -> None:
    _, ctx.rank, ctx.processes, _ = inputs


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad.unflatten(0, (ctx.processes, -1))[ctx.rank], None, None, None


gather_first.register_autograd(_gather_backward, setup_context=_remember_rank)
