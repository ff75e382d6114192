"""Encodes one clip on all processes of a group at once, each a stretch of its frames.

The autoencoder is causal: of all earlier frames, a layer needs the last one or two of its own input. Where one process encodes a
clip in chunks, a `FrameCache` keeps them for the next chunk; here they go to the process with the next frames, layer by layer. So
all work at the same time, nothing is computed twice, and the latents are those of the whole clip.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.vae import VideoVAE
from ..models.vae.frame_cache import FrameCache
from .mesh import Axis


@torch.no_grad()
def encode_in_parallel(
    vae: VideoVAE, pixels: Tensor, axis: Axis, *, latent_frames_per_chunk: int | None = None
) -> Tensor:
    """`vae.encode_chunked(pixels).mode()` [B, z, T', H', W'] of the same pixels [B, 3, T, H, W] on all processes of `axis`.

    Collective, and the same bits on all. A process has a chunk of `encode_chunked` in memory at a time, or of two latent frames
    where such a chunk is one. Clips of fewer latent frames than processes leave some of these idle. Raises ValueError as `encode`.
    """
    if axis.size == 1:
        return vae.encode_chunked(pixels, latent_frames_per_chunk=latent_frames_per_chunk).mode()
    vae.check_pixels(pixels)
    stride, space = vae.config.temporal_stride, vae.config.spatial_stride
    batch, _, frames, height, width = pixels.shape
    count = 1 + (frames - 1) // stride  # latent frames
    at_once = axis.size * vae.chunk_length(latent_frames_per_chunk, batch, height, width)
    # In every round but a clip's only one, all processes have frames, so that the last one has some for the next round.
    rounds = max(1, min(-(-count // at_once), count // axis.size))
    latents = pixels.new_zeros(
        (batch, vae.config.z_dim, count, height // space, width // space), dtype=vae.quant_conv.weight.dtype
    )
    # NCCL wants a group's first communication to be one of all its processes.
    dist.all_reduce(latents.new_zeros(1), group=axis.group)
    cache = _NeighbourCache(axis)
    for begin, end in pairwise(_even(count, rounds)):
        parts = [begin + place for place in _even(end - begin, min(axis.size, end - begin))]
        if axis.rank < len(parts) - 1:
            first, last = parts[axis.rank : axis.rank + 2]
            cache.begin(first, last, is_last=last == count, is_last_round=end == count)
            # The first latent frame is one frame.
            own = slice(max(0, 1 + (first - 1) * stride), 1 + (last - 1) * stride)
            latents[:, :, first:last] = vae.encode_part(pixels[:, :, own], cache).mode()
    # Each latent frame is on one process, and 0 on the others.
    dist.all_reduce(latents, group=axis.group)
    return latents


def _even(count: int, parts: int) -> list[int]:
    """Where parts of nearly equal sizes begin, and where the last one ends."""
    return [count * part // parts for part in range(parts + 1)]


class _NeighbourCache(FrameCache):
    """In front of a process's frames are those of its left neighbour, and for the first process the last one's, a round before."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self._axis = axis

    def begin(self, first: int, last: int, *, is_last: bool, is_last_round: bool) -> None:
        """This process now takes latent frames first, ..., last - 1, which may be the last of the clip, in a round of all."""
        self.is_first = first == 0
        self._first, self._last, self._is_last, self._is_last_round = first, last, is_last, is_last_round

    def prepend(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """As `FrameCache`; the last frames go on to the next process."""
        assert (
            count <= 2
        )  # at any resolution of time there is 1 frame before latent frame 1, and 2 or more before later ones
        outgoing = 0 if self._is_last else min(count, self._last)
        if self._axis.is_first:
            if not self.is_first:
                x = torch.cat([self._frames.pop(layer), x], dim=2)
            # What the last process sends now is for the next round.
            incoming = _empty(x, 0 if self._is_last_round else count)
            self._exchange(x[:, :, x.shape[2] - outgoing :], incoming)
            self._frames[layer] = incoming
            return x
        incoming = _empty(x, min(count, self._first))
        if x.shape[2] >= outgoing:
            self._exchange(x[:, :, x.shape[2] - outgoing :], incoming)
            return torch.cat([incoming, x], dim=2)
        # Of what the next process needs, some comes from further left.
        self._exchange(_empty(x, 0), incoming)
        x = torch.cat([incoming, x], dim=2)
        self._exchange(x[:, :, x.shape[2] - outgoing :], _empty(x, 0))
        return x

    def _exchange(self, outgoing: Tensor, incoming: Tensor) -> None:
        """Sends to the right and receives from the left at once; no frames, no message."""
        rank, size, group = self._axis.rank, self._axis.size, self._axis.group
        messages = []
        if outgoing.shape[2]:
            messages.append(dist.P2POp(dist.isend, outgoing.contiguous(), group=group, group_peer=(rank + 1) % size))
        if incoming.shape[2]:
            messages.append(dist.P2POp(dist.irecv, incoming, group=group, group_peer=(rank - 1) % size))
        for work in dist.batch_isend_irecv(messages) if messages else []:
            work.wait()


def _empty(like: Tensor, frames: int) -> Tensor:
    return like.new_empty(*like.shape[:2], frames, *like.shape[3:])
