"""The synthetic clips show what their captions say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from muybridge.data.synthetic import (
    COLOURS,
    COMBINATIONS,
    DIRECTIONS,
    FRAMES,
    HELD_OUT,
    SHAPES,
    SIZE,
    TRAINED,
    captions_of,
    draw_clip,
    render_clip,
)


def test_twelve_combinations_are_held_out_evenly() -> None:
    assert len(COMBINATIONS) == 72
    assert len(set(HELD_OUT)) == 12
    assert set(HELD_OUT) | set(TRAINED) == set(COMBINATIONS)
    assert Counter(c.colour for c in HELD_OUT) == dict.fromkeys(COLOURS, 2)
    assert Counter(c.shape for c in HELD_OUT) == dict.fromkeys(SHAPES, 4)
    assert Counter(c.direction for c in HELD_OUT) == dict.fromkeys(DIRECTIONS, 3)


def test_training_sees_every_pair_of_attributes() -> None:
    assert len({(c.colour, c.shape) for c in TRAINED}) == 18
    assert len({(c.colour, c.direction) for c in TRAINED}) == 24
    assert len({(c.shape, c.direction) for c in TRAINED}) == 12


def test_held_out_combinations_are_in_the_test_split_only() -> None:
    train = {draw_clip(0, "train", n).combination for n in range(200)}
    test = {draw_clip(0, "test", n).combination for n in range(200)}
    assert train == set(TRAINED)
    assert test == set(COMBINATIONS)


@pytest.mark.parametrize("number", range(0, 60, 7))
def test_a_clip_moves_as_its_caption_says_and_stays_inside(number: int) -> None:
    clip = draw_clip(1, "train", number)
    frames = render_clip(clip).astype(np.float64)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3)
    weight = np.abs(frames - clip.background).max(-1)  # [T, H, W]
    border = np.ones((SIZE, SIZE), dtype=bool)
    border[1:-1, 1:-1] = False
    assert not weight[:, border].any()
    weight /= weight.sum(axis=(1, 2), keepdims=True)
    places = np.arange(SIZE)
    centres = np.stack([weight.sum(1) @ places, weight.sum(2) @ places], axis=1)  # [T, (x, y)]
    steps = np.diff(centres, axis=0)
    expected = np.array(DIRECTIONS[clip.combination.direction]) * clip.displacement / (FRAMES - 1)
    assert np.abs(steps - expected).max() < 0.05
    assert 20 <= clip.displacement <= 36
    assert 7 <= clip.half_size <= 12
    middle = frames[0, round(centres[0, 1]), round(centres[0, 0])]
    assert np.array_equal(middle, COLOURS[clip.combination.colour])


def test_shapes_have_the_area_of_their_formula() -> None:
    areas = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # in units of the half-size squared
    for number in range(12):
        clip = draw_clip(2, "train", number)
        colour = np.array(COLOURS[clip.combination.colour], dtype=np.float64)
        coverage = (render_clip(clip)[4] - float(clip.background)) @ (colour - clip.background)
        area = coverage.sum() / np.square(colour - clip.background).sum()
        assert area == pytest.approx(areas[clip.combination.shape] * clip.half_size**2, rel=0.02)


def test_captions_name_colour_shape_and_direction_in_several_phrasings() -> None:
    for combination in COMBINATIONS:
        captions = captions_of(combination)
        assert len(set(captions)) >= 4
        for caption in captions:
            words = caption.replace("upwards", "up").replace("downwards", "down").split()
            assert combination.colour in words
            assert combination.shape in words
            assert combination.direction in words
    assert len({draw_clip(0, "train", 60 * n).caption for n in range(40)}) == len(captions_of(COMBINATIONS[0]))


def test_a_clip_is_a_function_of_its_key() -> None:
    assert draw_clip(0, "train", 5) == draw_clip(0, "train", 5)
    assert len({draw_clip(seed, split, 5) for seed in (0, 1) for split in ("train", "test")}) == 4
    with pytest.raises(ValueError, match="split='dev' must be train or test"):
        draw_clip(0, "dev", 0)
