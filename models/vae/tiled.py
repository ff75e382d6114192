"""Decoding frames in tiles, for frames so large that not even those of one latent frame fit into memory."""

import torch
from torch import Tensor

from .autoencoder import VideoVAE


@torch.no_grad()
def decode_tiled(vae: VideoVAE, latents: Tensor, *, tile: int, overlap: int) -> Tensor:
    """Raw latents [B, z, T', H', W'] -> pixels [B, 3, T, H, W], in squares of `tile` latent positions a side.

    Neighbours share `overlap` positions, over which one fades into the other. Close to `decode`, not equal: near its edges a tile
    lacks what lies beyond, and attention stays within a tile. Raises ValueError for an overlap that is not in 1..tile/2.
    """
    if not 1 <= overlap <= tile // 2:
        raise ValueError(f"overlap={overlap} must be at least 1 and at most half of tile={tile}")
    config = vae.config
    batch, _, frames, height, width = latents.shape
    frames, stride = 1 + (frames - 1) * config.temporal_stride, config.spatial_stride
    pixels = torch.zeros(
        (batch, config.in_channels, frames, height * stride, width * stride),
        dtype=vae.post_quant_conv.weight.dtype,
        device=latents.device,
    )
    for top, bottom in _spans(height, tile, overlap):
        rows = _fade(top, bottom, height, overlap, stride).to(pixels)[:, None]
        for left, right in _spans(width, tile, overlap):
            columns = _fade(left, right, width, overlap, stride).to(pixels)
            place = pixels[..., top * stride : bottom * stride, left * stride : right * stride]
            done = 0
            for part in vae.decode_chunked(latents[..., top:bottom, left:right], latent_frames_per_chunk=1):
                place[:, :, done : done + part.shape[2]] += part * rows * columns
                done += part.shape[2]
    return pixels


def _spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Start and end of each tile; the last may be shorter, but is longer than the overlap."""
    return [(start, min(start + tile, size)) for start in range(0, max(1, size - overlap), tile - overlap)]


def _fade(start: int, end: int, size: int, overlap: int, stride: int) -> Tensor:
    """Weight of each pixel row of a tile; those of two neighbours add up to 1."""
    weights = torch.ones((end - start) * stride)
    rise = torch.arange(overlap * stride) / (overlap * stride)
    if start > 0:
        weights[: len(rise)] = rise
    if end < size:
        weights[-len(rise) :] = 1 - rise
    return weights
