"""Rotary position embedding over (frame, row, column), as Wan uses it: each axis turns its own share of the head's channels."""

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def rope_axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head that encode the frame, the row and the column; 128 gives 44, 42, 42."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@lru_cache(maxsize=8)
def rope_table(frames: int, height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Unit complex rotations [L, 1, K/2] of a token grid in raster order, complex64, computed in float64.

    Cached, because a run sees a handful of grids and the table is the same in every block of every step.
    """
    # A table born under inference mode (sampling between two training steps) could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        angles = []
        for axis, (size, channels) in enumerate(zip((frames, height, width), rope_axis_dims(head_dim), strict=True)):
            frequencies = THETA ** -(torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
            positions = torch.arange(size, dtype=torch.float64, device=device)
            shape = [1, 1, 1, channels // 2]
            shape[axis] = size
            angle = torch.outer(positions, frequencies).view(shape)
            angles.append(angle.expand(frames, height, width, channels // 2))
        angle = torch.cat(angles, dim=-1).flatten(0, 2)  # [L, K/2]
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).unsqueeze(1)  # [L, 1, K/2]


def apply_rope(heads: Tensor, table: Tensor) -> Tensor:
    """Rotate float32 heads [B, L, N, K] by the table; channels are paired (0, 1), (2, 3), ... as complex numbers."""
    # One complex product is a single launch; the same written with cosines and sines takes seven.
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))  # [B, L, N, K/2]
    return torch.view_as_real(pairs * table).flatten(-2)  # [B, L, N, K]
