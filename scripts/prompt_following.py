"""What a clip of the synthetic dataset shows, judged from its pixels alone: the colour, shape and direction of one object.

Plain measurements without a trained part, so that no model can have learned to please them. They share the names of the
attributes with the renderer and nothing else.
"""

import colorsys
from dataclasses import dataclass

import numpy as np

HUES = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "magenta": 300}  # degrees
SHAPES = ("circle", "square", "triangle")

MIN_CONTRAST = 40.0  # RGB distance between object and background; rendered objects have 120 and more
MIN_AREA, MAX_AREA = 0.008, 0.35  # shares of the frame; rendered objects fill 0.024 to 0.14
MIN_SATURATION = 0.25  # rendered colours have 0.7 and more
MIN_TRAVEL = 0.1  # of the frame's side over the clip; rendered objects travel 0.31 and more
MIN_OVERLAP = 0.6  # intersection over union with the best template


@dataclass(frozen=True)
class Judgement:
    """The attributes that a clip shows; None where there is no telling, which never counts as right."""

    colour: str | None
    shape: str | None
    direction: str | None


def judge_clip(frames: np.ndarray) -> Judgement:
    """What frames uint8 [T, H, W, 3] show.

    Nothing is told of a clip in which fewer than half of the frames hold one whole object on an even background.
    Raises ValueError for frames of another form.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames of {frames.dtype} {list(frames.shape)} must be uint8 [T, H, W, 3]")
    pixels = frames.astype(np.float32)
    distance = _distance_from_background(pixels)  # [T, H, W]
    masks, is_whole = _find_objects(distance)
    if is_whole.sum() < max(2, len(frames) / 2):
        return Judgement(colour=None, shape=None, direction=None)
    masks = masks[is_whole]
    return Judgement(
        colour=_judge_colour(pixels[is_whole], masks, distance[is_whole]),
        shape=_judge_shape(masks),
        direction=_judge_direction(masks, np.flatnonzero(is_whole)),
    )


def _distance_from_background(pixels: np.ndarray) -> np.ndarray:
    """RGB distance [T, H, W] of every pixel from the clip's background, the median of the frames' borders."""
    border = np.ones(pixels.shape[1:3], dtype=bool)
    border[2:-2, 2:-2] = False
    background = np.median(pixels[:, border], axis=(0, 1))  # [3]
    return np.linalg.norm(pixels - background, axis=-1)


def _find_objects(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The object's mask in every frame, bool [T, H, W], and whether there is a single whole one, bool [T]."""
    length, height, width = distance.shape
    # An object fills more than 1.5 % of its frame, so the farthest 1.5 % of the pixels tell how far it stands out.
    count = max(1, round(0.015 * height * width))
    contrast = np.partition(distance.reshape(length, -1), -count, axis=1)[:, -count:].mean(axis=1)  # [T]
    far = distance > contrast[:, None, None] / 2
    masks = _connected_to_peak(far, distance)
    area = masks.mean(axis=(1, 2))
    is_single = masks.sum(axis=(1, 2)) > 0.6 * far.sum(axis=(1, 2))
    is_cut_off = masks[:, [0, -1], :].any(axis=(1, 2)) | masks[:, :, [0, -1]].any(axis=(1, 2))
    is_whole = (contrast > MIN_CONTRAST) & (area > MIN_AREA) & (area < MAX_AREA) & is_single & ~is_cut_off
    return masks, is_whole


def _connected_to_peak(far: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The part of `far` [T, H, W] that hangs together with the frame's most distant spot (4-neighbours)."""
    padded = np.pad(distance, ((0, 0), (1, 1), (1, 1)), mode="edge")
    # A mean over 3x3 keeps a lone bright pixel from being the peak.
    spots = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).mean(axis=(-1, -2))
    peak = np.where(far, spots, -1.0).reshape(len(far), -1).argmax(axis=1)
    mask = np.zeros_like(far)
    mask.reshape(len(far), -1)[np.arange(len(far)), peak] = True
    while True:
        grown = mask.copy()
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        grown[:, :, 1:] |= mask[:, :, :-1]
        grown[:, :, :-1] |= mask[:, :, 1:]
        grown &= far
        if np.array_equal(grown, mask):
            return mask
        mask = grown


def _judge_colour(pixels: np.ndarray, masks: np.ndarray, distance: np.ndarray) -> str | None:
    """The name of the nearest hue to that of the object's inside, or None for grey."""
    inside = masks & (distance >= np.median(distance[masks]))  # leaves out the blended edge
    red, green, blue = np.median(pixels[inside], axis=0) / 255
    hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < MIN_SATURATION:
        return None
    return min(HUES, key=lambda name: abs((360 * hue - HUES[name] + 180) % 360 - 180))


def _judge_shape(masks: np.ndarray) -> str | None:
    """The shape whose template, stretched to the object's bounding box, overlaps best over the frames."""
    overlaps = {shape: float(np.mean([_overlap(mask, shape) for mask in masks])) for shape in SHAPES}
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= MIN_OVERLAP else None


def _overlap(mask: np.ndarray, shape: str) -> float:
    """Intersection over union of the mask and the shape that fills its bounding box."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape
    y = (2 * np.arange(height)[:, None] + 1) / height - 1  # pixel centres in [-1, 1], downwards
    x = (2 * np.arange(width)[None, :] + 1) / width - 1
    if shape == "circle":
        template = x**2 + y**2 <= 1
    elif shape == "triangle":
        template = np.abs(x) <= (y + 1) / 2
    else:
        template = np.ones_like(box)
    return float((box & template).sum() / (box | template).sum())


def _judge_direction(masks: np.ndarray, times: np.ndarray) -> str | None:
    """Where the object's centroid goes, or None if it stays, or goes neither clearly across nor clearly up or down."""
    height, width = masks.shape[1:]
    area = masks.sum(axis=(1, 2))
    x = masks.sum(axis=1) @ (np.arange(width) / width) / area  # [T], in frame widths
    y = masks.sum(axis=2) @ (np.arange(height) / height) / area
    # The slope of a straight line times the time that passed: a single wrong frame cannot decide it.
    dx, dy = (np.polyfit(times, position, 1)[0] * (times[-1] - times[0]) for position in (x, y))
    if max(abs(dx), abs(dy)) < MIN_TRAVEL or 0.7 * max(abs(dx), abs(dy)) < min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"
