"""The judge is right about real clips and claims nothing about noise."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from muybridge.data.decode import frame_times, read_frames
from muybridge.data.mp4 import write_mp4
from muybridge.data.synthetic import COLOURS, COMBINATIONS, DIRECTIONS, FPS, FRAMES, SHAPES, draw_clip, render_clip
from muybridge.scripts.prompt_following import HUES, Judgement, judge_clip
from muybridge.scripts.prompt_following import SHAPES as JUDGED_SHAPES

NOTHING = Judgement(colour=None, shape=None, direction=None)


def through_h264(frames: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    write_mp4(file, frames, fps=FPS)
    return read_frames(file.getvalue(), frame_times(FRAMES, fps=FPS))


def accuracy(change: Callable[[np.ndarray], np.ndarray], *, clips: int) -> tuple[float, float, float]:
    """Shares of right colours, shapes and directions over test clips after `change`."""
    hits = []
    for number in range(clips):
        clip = draw_clip(5, "test", number)
        seen = judge_clip(change(render_clip(clip)))
        wanted = clip.combination
        hits.append((seen.colour == wanted.colour, seen.shape == wanted.shape, seen.direction == wanted.direction))
    colour, shape, direction = np.mean(hits, axis=0)
    return float(colour), float(shape), float(direction)


def test_real_test_clips_are_judged_right_after_h264() -> None:
    assert min(accuracy(through_h264, clips=120)) >= 0.98


def test_the_judge_knows_every_name_of_the_dataset() -> None:
    assert set(HUES) == set(COLOURS)
    assert set(JUDGED_SHAPES) == set(SHAPES)
    assert {combination.direction for combination in COMBINATIONS} == set(DIRECTIONS)


def test_noise_and_blur_of_a_trained_model_do_not_mislead() -> None:
    random = np.random.default_rng(0)

    def spoil(frames: np.ndarray) -> np.ndarray:
        blurred = np.stack([np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(1))) for frame in frames])
        return (blurred + random.normal(0, 12, frames.shape)).clip(0, 255).astype(np.uint8)

    assert min(accuracy(spoil, clips=60)) >= 0.95


@pytest.mark.parametrize("kind", ["uniform", "faint", "patches", "still patches"])
def test_noise_scores_nothing(kind: str) -> None:
    random = np.random.default_rng(1)
    patch = np.ones((1, 8, 8, 1))
    for _ in range(20):
        frames = {
            "uniform": lambda: random.uniform(0, 256, (9, 64, 64, 3)),
            "faint": lambda: random.normal(128, 10, (9, 64, 64, 3)),
            "patches": lambda: np.kron(random.normal(100, 60, (9, 8, 8, 3)), patch),
            "still patches": lambda: np.kron(random.normal(100, 60, (1, 8, 8, 3)), patch).repeat(9, axis=0),
        }[kind]()
        assert judge_clip(frames.clip(0, 255).astype(np.uint8)) == NOTHING


def test_empty_frames_show_nothing() -> None:
    assert judge_clip(np.full((9, 64, 64, 3), 40, dtype=np.uint8)) == NOTHING


def test_a_random_walk_of_random_colours_scores_no_better_than_chance() -> None:
    random = np.random.default_rng(2)
    hits = np.zeros(3)
    clips = 120
    for number in range(clips):
        frames = np.full((9, 64, 64, 3), 40, dtype=np.uint8)
        corner = random.integers(10, 38, 2)
        colour = random.integers(0, 256, 3)
        for frame in frames:
            corner = (corner + random.integers(-4, 5, 2)).clip(3, 45)
            frame[corner[0] : corner[0] + 16, corner[1] : corner[1] + 16] = colour
        wanted, seen = draw_clip(5, "test", number).combination, judge_clip(frames)
        hits += [seen.colour == wanted.colour, seen.shape == wanted.shape, seen.direction == wanted.direction]
    chance = np.array([1 / 6, 1 / 3, 1 / 4])
    assert np.all(hits / clips < chance + 3 * np.sqrt(chance * (1 - chance) / clips))


def square_clip(corners: list[tuple[int, int]], colour: tuple[int, int, int] = (230, 50, 50)) -> np.ndarray:
    """A 16 px square with its top left at (row, column) in each frame."""
    frames = np.full((len(corners), 64, 64, 3), 40, dtype=np.uint8)
    for frame, (row, column) in zip(frames, corners, strict=True):
        frame[row : row + 16, column : column + 16] = colour
    return frames


def test_what_stands_still_has_no_direction() -> None:
    assert judge_clip(square_clip([(20, 20)] * 9)) == Judgement(colour="red", shape="square", direction=None)


def test_a_diagonal_has_no_direction() -> None:
    assert judge_clip(square_clip([(8 + 3 * t, 8 + 3 * t) for t in range(9)])).direction is None


def test_a_grey_object_has_no_colour() -> None:
    seen = judge_clip(square_clip([(20, 8 + 3 * t) for t in range(9)], colour=(200, 200, 200)))
    assert seen == Judgement(colour=None, shape="square", direction="right")


def test_an_object_cut_off_by_the_border_in_most_frames_is_not_judged() -> None:
    assert judge_clip(square_clip([(20, 48)] * 6 + [(20, 30)] * 3)) == NOTHING


def test_two_equal_objects_are_not_one() -> None:
    frames = square_clip([(8, 8 + 2 * t) for t in range(9)])
    assert judge_clip(np.maximum(frames, frames[:, ::-1])) == NOTHING


@pytest.mark.parametrize("frames", [np.zeros((64, 64, 3), dtype=np.uint8), np.zeros((9, 64, 64, 3), dtype=np.float32)])
def test_frames_of_another_form_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        judge_clip(frames)
