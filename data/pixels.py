"""Between uint8 frames, as videos have them, and float pixels, as models want them."""

from __future__ import annotations

import numpy as np
import torch


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """Clips uint8 [B, T, H, W, 3] as float32 [B, 3, T, H, W] in [-1, 1]."""
    pixels = frames.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(127.5).sub_(1.0)


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """The inverse of `to_pixels`: float [B, 3, T, H, W], clamped to [-1, 1], as uint8 [B, T, H, W, 3]."""
    levels = pixels.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).cpu().contiguous().numpy()
