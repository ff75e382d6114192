"""Resizing keeps the aspect ratio, covers the target and does not alias."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from muybridge.data.pixels import to_frames, to_pixels
from muybridge.data.resize import cover_crop


def gradient(height: int, width: int) -> np.ndarray:
    """Two frames whose red grows to the right and whose green grows downwards, from 0 to 200."""
    frame = np.zeros((2, height, width, 3), dtype=np.uint8)
    frame[..., 0] = np.linspace(0, 200, width).round().astype(np.uint8)
    frame[..., 1] = np.linspace(0, 200, height).round().astype(np.uint8)[:, None]
    return frame


@pytest.mark.parametrize(("crop_x", "left", "right"), [(0.0, 0, 100), (0.5, 50, 150), (1.0, 100, 200)])
def test_a_wide_picture_is_cropped_at_the_sides(crop_x: float, left: int, right: int) -> None:
    out = cover_crop(gradient(60, 120), height=32, width=32, crop_x=crop_x, crop_y=0.5).astype(int)
    assert out.shape == (2, 32, 32, 3)
    assert out[0, 16, 0, 0] == pytest.approx(left, abs=4)
    assert out[0, 16, -1, 0] == pytest.approx(right, abs=4)
    assert out[0, 0, 16, 1] == pytest.approx(0, abs=5)
    assert out[0, -1, 16, 1] == pytest.approx(200, abs=5)


def test_a_tall_picture_is_cropped_above_and_below() -> None:
    out = cover_crop(gradient(120, 60), height=32, width=32, crop_x=0.5, crop_y=1.0).astype(int)
    assert out[0, 0, 16, 1] == pytest.approx(100, abs=4)
    assert out[0, -1, 16, 1] == pytest.approx(200, abs=4)


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (97, 41), (480, 720), (20, 30), (1, 1)])
@pytest.mark.parametrize("crop", [0.0, 0.37, 1.0])
def test_any_size_fits(size: tuple[int, int], crop: float) -> None:
    frames = gradient(*size)
    assert cover_crop(frames, height=48, width=80, crop_x=crop, crop_y=crop).shape == (2, 48, 80, 3)


def test_the_right_size_is_left_alone() -> None:
    frames = gradient(48, 80)
    assert np.array_equal(cover_crop(frames, height=48, width=80, crop_x=0.3, crop_y=0.9), frames)


def test_fine_patterns_turn_grey_instead_of_aliasing() -> None:
    stripes = np.zeros((1, 256, 256, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    out = cover_crop(stripes, height=48, width=48, crop_x=0.5, crop_y=0.5)
    assert np.abs(out.astype(int) - 128).max() < 12


def test_frames_and_pixels_are_inverse() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    pixels = to_pixels(torch.from_numpy(frames))
    assert pixels.shape == (2, 3, 3, 4, 5)
    assert pixels.is_contiguous()
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert pixels[1, 2, 0, 3, 4] == pytest.approx(frames[1, 0, 3, 4, 2] / 127.5 - 1)
    assert np.array_equal(to_frames(pixels), frames)
    assert np.array_equal(to_frames(torch.full((1, 3, 1, 2, 2), 7.0)), np.full((1, 1, 2, 2, 3), 255, np.uint8))
