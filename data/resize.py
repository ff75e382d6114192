"""Frames of any size to frames of the training size: keep the aspect ratio, cover the target, crop the rest."""

from __future__ import annotations

import numpy as np
from PIL import Image


def cover_crop(
    frames: np.ndarray, *, height: int, width: int, crop_x: float, crop_y: float, out: np.ndarray | None = None
) -> np.ndarray:
    """Crops frames uint8 [T, H, W, 3] to the target's aspect ratio and resizes them (bicubic, antialiased).

    `crop_x` and `crop_y` in [0, 1] place the crop: 0 is left or top, 0.5 the centre. Returns uint8 [T, height, width, 3], which is
    `out` where that is given. Raises ValueError where `out` has another shape.
    """
    shape = (len(frames), height, width, 3)
    if out is not None and out.shape != shape:
        raise ValueError(f"out of shape {out.shape} must have the shape {shape}")
    source_height, source_width = frames.shape[1:3]
    scale = min(source_height / height, source_width / width)
    crop_height, crop_width = height * scale, width * scale
    left = (source_width - crop_width) * crop_x
    top = (source_height - crop_height) * crop_y
    # Rounding must not push the box beyond the picture, which Pillow refuses.
    box = (left, top, min(left + crop_width, source_width), min(top + crop_height, source_height))
    if (crop_height, crop_width) == (height, width) and left == int(left) and top == int(top):
        cropped = frames[:, int(top) : int(top) + height, int(left) : int(left) + width]
        if out is None:
            return cropped
        out[:] = cropped
        return out
    if out is None:
        out = np.empty(shape, dtype=np.uint8)
    for frame, target in zip(frames, out):
        target[:] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box))
    return out
