"""The synthetic dataset: one coloured shape moving over a plain dark background, with a caption that says so.

Every clip is a pure function of (seed, split, number), so a dataset can be rendered again anywhere. Twelve of the 72
combinations of colour, shape and direction never occur in training: they tell following a prompt from remembering one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import numpy as np

SIZE = 64  # pixels, height and width
FRAMES = 9
FPS = 8

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 50, 50),
    "green": (50, 200, 70),
    "blue": (60, 90, 235),
    "yellow": (235, 215, 60),
    "magenta": (220, 60, 210),
    "cyan": (60, 210, 220),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)

_LONG_DIRECTION = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
_PHRASINGS = (
    "a {colour} {shape} moving {direction}",
    "a {colour} {shape} moves {direction}",
    "the {colour} {shape} slides {long_direction}",
    "a {colour} {shape} moving {long_direction}",
    "{colour} {shape} going {direction}",
    "a video of a {colour} {shape} that moves {long_direction}",
)
_MARGIN = 2.0  # pixels kept free between the shape and the border over the whole clip


@dataclass(frozen=True, order=True)
class Combination:
    """What a caption says: a colour, a shape and a direction."""

    colour: str
    shape: str
    direction: str


@dataclass(frozen=True)
class SyntheticClip:
    """All that is needed to render one clip; positions and sizes in pixels, y downwards."""

    combination: Combination
    caption: str
    half_size: float
    start_x: float  # centre of the shape in the first frame
    start_y: float
    displacement: float  # from the first to the last frame, along the direction
    background: int  # grey level


def _held_out() -> tuple[Combination, ...]:
    # Two per colour, four per shape, three per direction, and never two that share colour and shape (or colour and
    # direction): each pair of attributes is still seen in training.
    colours, directions = list(COLOURS), list(DIRECTIONS)
    first = [Combination(c, SHAPES[i % 3], directions[i % 4]) for i, c in enumerate(colours)]
    second = [Combination(c, SHAPES[(i + 1) % 3], directions[(i + 2) % 4]) for i, c in enumerate(colours)]
    return tuple(sorted(first + second))


COMBINATIONS: tuple[Combination, ...] = tuple(Combination(*parts) for parts in product(COLOURS, SHAPES, DIRECTIONS))
HELD_OUT: tuple[Combination, ...] = _held_out()
TRAINED: tuple[Combination, ...] = tuple(c for c in COMBINATIONS if c not in HELD_OUT)


def captions_of(combination: Combination) -> list[str]:
    """Every phrasing of the caption of one combination."""
    long_direction = _LONG_DIRECTION[combination.direction]
    return [
        p.format(
            colour=combination.colour,
            shape=combination.shape,
            direction=combination.direction,
            long_direction=long_direction,
        )
        for p in _PHRASINGS
    ]


def draw_clip(seed: int, split: str, number: int) -> SyntheticClip:
    """Clip `number` of a split ("train" or "test").

    Train clips go round the 60 trained combinations; test clips alternate between held-out and trained ones.
    """
    if split == "train":
        choices, place = TRAINED, number
    elif split == "test":
        choices, place = (HELD_OUT, TRAINED)[number % 2], number // 2
    else:
        raise ValueError(f"split={split!r} must be train or test")
    # A string seed is hashed by `random` in a documented, version-independent way, and random() keeps its sequence
    # across Python versions; its other methods and numpy's distributions promise less.
    uniform = random.Random(f"synthetic/{seed}/{split}/{number}").random
    combination = choices[place % len(choices)]
    half_size = 7.0 + 5.0 * uniform()
    displacement = 20.0 + 16.0 * uniform()
    dx, dy = DIRECTIONS[combination.direction]
    low, high = half_size + _MARGIN, SIZE - half_size - _MARGIN
    # The centre moves over [start, start + displacement * d]: leave room for it on the side it moves to.
    start_x = low + max(0, -dx) * displacement + uniform() * (high - low - abs(dx) * displacement)
    start_y = low + max(0, -dy) * displacement + uniform() * (high - low - abs(dy) * displacement)
    captions = captions_of(combination)
    return SyntheticClip(
        combination=combination,
        caption=captions[int(uniform() * len(captions))],
        half_size=half_size,
        start_x=start_x,
        start_y=start_y,
        displacement=displacement,
        background=24 + int(uniform() * 33),
    )


def render_clip(clip: SyntheticClip) -> np.ndarray:
    """Anti-aliased frames, uint8 [T, H, W, 3]."""
    dx, dy = DIRECTIONS[clip.combination.direction]
    travelled = np.linspace(0.0, clip.displacement, FRAMES)
    pixel = np.arange(SIZE) + 0.5  # pixel centres
    x = pixel[None, None, :] - (clip.start_x + dx * travelled)[:, None, None]  # [T, 1, W]
    y = pixel[None, :, None] - (clip.start_y + dy * travelled)[:, None, None]  # [T, H, 1]
    distance = _signed_distance(clip.combination.shape, x, y, clip.half_size)  # [T, H, W], negative inside
    coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]  # [T, H, W, 1]
    colour = np.asarray(COLOURS[clip.combination.colour], dtype=np.float64)
    frames = clip.background * (1.0 - coverage) + colour * coverage  # [T, H, W, 3]
    return np.rint(frames).astype(np.uint8)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, half_size: float) -> np.ndarray:
    if shape == "circle":
        return np.hypot(x, y) - half_size
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - half_size
    if shape == "triangle":  # apex (0, -half), base from (-half, half) to (half, half)
        return np.maximum(y - half_size, (2.0 * np.abs(x) - y - half_size) / np.sqrt(5.0))
    raise ValueError(f"shape={shape!r} must be one of {', '.join(SHAPES)}")
