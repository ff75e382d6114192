"""One process of a group reads and decodes a clip, and the others get it from there: those that share a clip by its tokens."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batch import VideoBatch
from .mesh import Axis


def share_batches(batches: list[VideoBatch] | None, axis: Axis, device: torch.device) -> list[VideoBatch]:
    """The batches that the first rank along the axis passes, on all of them; what the others pass is not looked at. Collective.

    Frames, latents and text features travel between the devices. Those of a step's later micro-batches wait on the host, for the
    step's peak of memory must not grow with their number.
    """
    if axis.group is None:
        assert batches is not None
        return batches
    source = dist.get_global_rank(axis.group, 0)
    letter: list[tuple[list[VideoBatch], list[_Content]] | None] = [None]
    own: Iterator[Tensor] = iter(())
    if axis.is_first:
        assert batches is not None
        contents = [_Content(batch) for batch in batches]
        own = (tensor for batch, content in zip(batches, contents, strict=True) for tensor in content.tensors(batch))
        letter = [([replace(batch, frames=None, latents=None, text=None) for batch in batches], contents)]
    dist.broadcast_object_list(letter, src=source, group=axis.group)
    assert letter[0] is not None
    shared: list[VideoBatch] = []
    for batch, content in zip(*letter[0], strict=True):
        arrived = []
        for shape, dtype in content.parts:
            tensor = next(own).to(device) if axis.is_first else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(tensor := tensor.contiguous(), src=source, group=axis.group)
            arrived.append(tensor.cpu() if shared else tensor)
        shared.append(content.fill(batch, iter(arrived)))
    return shared


def each_shared(batches: Iterator[VideoBatch], axis: Axis, device: torch.device) -> Iterator[VideoBatch]:
    """The batches of the first rank's iterator on all ranks along the axis, one after another. Collective at each step.

    The others' iterators are not asked for anything.
    """
    if axis.group is None:
        yield from batches
        return
    while True:
        batch = next(batches, None) if axis.is_first else None
        shared = share_batches([] if batch is None else [batch], axis, device)
        if not shared:
            return
        yield from shared


class _Content:
    """Which large tensors a batch has: what the other ranks must make room for."""

    def __init__(self, batch: VideoBatch) -> None:
        self.text_lengths = None if batch.text is None else [len(rows) for rows in batch.text]
        self.has_frames, self.has_latents = batch.frames is not None, batch.latents is not None
        self.parts = [(tensor.shape, tensor.dtype) for tensor in self.tensors(batch)]

    def tensors(self, batch: VideoBatch) -> list[Tensor]:
        """Frames or latents, and the features of all captions one after another."""
        found = [tensor for tensor in (batch.frames, batch.latents) if tensor is not None]
        return found if batch.text is None else [*found, torch.cat(batch.text)]

    def fill(self, batch: VideoBatch, tensors: Iterator[Tensor]) -> VideoBatch:
        """The batch with the tensors that belong to it, which are the next ones."""
        return replace(
            batch,
            frames=next(tensors) if self.has_frames else None,
            latents=next(tensors) if self.has_latents else None,
            text=None if self.text_lengths is None else list(next(tensors).split(self.text_lengths)),
        )
