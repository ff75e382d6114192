"""What is drawn for a clip each time it comes: where it starts, what is cropped, which caption it gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .keyed import keyed_bits, keyed_uniform


@dataclass(frozen=True)
class Draws:
    """The first three are places in [0, 1): of the clip in the video, and of the crop in the picture from left and top."""

    start: float
    crop_x: float
    crop_y: float
    caption: int | None  # place in the clip's captions; None where it is dropped


# For validation and caches: the middle of video and picture, the first caption.
MIDDLE = Draws(0.5, 0.5, 0.5, 0)


def draw(
    seed: int,
    dataset: str,
    row: int,
    pass_number: int,
    *,
    captions: int,
    caption_dropout: float,
    only_caption: bool = False,
) -> Draws:
    """The draws of a row of a dataset in one pass, for a clip with this number of captions.

    With `only_caption` all else is the middle, as in a latent cache; the caption is the same.
    """
    key = (dataset, row, pass_number)
    caption: int | None = keyed_bits(seed, "caption_choice", *key) % captions
    if keyed_uniform(seed, "caption", *key) < caption_dropout:
        caption = None
    if only_caption:
        return replace(MIDDLE, caption=caption)
    start, crop_x, crop_y = (keyed_uniform(seed, purpose, *key) for purpose in ("start", "crop_x", "crop_y"))
    return Draws(start, crop_x, crop_y, caption)
