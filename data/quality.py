"""Cheap figures of how a clip looks: brightness, sharpness and motion, from a few of its frames."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

_FRAMES = 8
_SPACING_SECONDS = 0.5  # at most, so that motion means the same in long and short clips
_MOTION_SIDE = 256  # pixels: film grain and block noise shall not count as motion


@dataclass(frozen=True)
class Quality:
    """Means over sampled frames. Grey levels are 0..255."""

    luma: float  # mean grey level
    sharpness: float  # variance of the Laplacian of the grey levels, at full size
    motion: float  # mean absolute change of the grey levels from one sampled frame to the next; 0 for an image


def sample_times(duration_seconds: float, *, frame_seconds: float) -> list[float]:
    """Times of the frames to measure: evenly about the middle of the clip."""
    last = max(0.0, duration_seconds - frame_seconds)
    spacing = max(min(_SPACING_SECONDS, last / (_FRAMES - 1)), frame_seconds)
    count = min(_FRAMES, 1 + int(last / spacing + 1e-6))
    start = (last - (count - 1) * spacing) / 2
    return [max(0.0, start + i * spacing) for i in range(count)]


def measure_quality(frames: np.ndarray) -> Quality:
    """The figures of frames uint8 [T, H, W, 3] in their order."""
    greys = [Image.fromarray(frame).convert("L") for frame in frames]
    small = []
    for grey in greys:
        grey = grey.copy()
        grey.thumbnail((_MOTION_SIDE, _MOTION_SIDE), Image.Resampling.BOX)
        small.append(np.asarray(grey, dtype=np.float32))
    changes = [float(np.abs(b - a).mean()) for a, b in pairwise(small)]
    return Quality(
        luma=float(np.mean([np.asarray(grey).mean() for grey in greys])),
        sharpness=float(np.mean([_laplacian_variance(np.asarray(grey, dtype=np.float32)) for grey in greys])),
        motion=float(np.mean(changes)) if changes else 0.0,
    )


def _laplacian_variance(grey: np.ndarray) -> float:
    if min(grey.shape) < 3:
        return 0.0
    centre = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre).var())
