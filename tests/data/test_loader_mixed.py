"""Datasets of pictures and videos, and of several captions a clip."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muybridge.data import worker
from muybridge.data.config import DataConfig, build_buckets
from muybridge.data.index import Clip, ClipIndex
from muybridge.data.loader import VideoLoader
from muybridge.data.media_info import index_fields, inspect_media
from muybridge.data.pixels import to_frames
from muybridge.data.shards import DatasetWriter

CAPTIONS = '["a dog","a brown dog","a dog runs"]'


def picture(upright: np.ndarray, *, sideways: bool = False) -> bytes:
    """A PNG, or a JPEG that is stored lying on its side and asks to be turned upright."""
    file = io.BytesIO()
    if not sideways:
        Image.fromarray(upright).save(file, "PNG")
        return file.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    Image.fromarray(np.rot90(upright)).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def halves() -> np.ndarray:
    """80x64 pixels, red above blue: uint8 [80, 64, 3]."""
    frame = np.zeros((80, 64, 3), dtype=np.uint8)
    frame[:40, :, 0] = frame[40:, :, 2] = 255
    return frame


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ClipIndex:
    """A video, a picture, a picture on its side, and a video; the first has three captions."""
    with DatasetWriter(tmp_path_factory.mktemp("mixed"), kind="raw", description={}) as writer:
        for number, media in enumerate((None, picture(halves()), picture(halves(), sideways=True), None)):
            if media is None:
                info, media = worker.synthesize(0, "train", number)
                info = {name: value for name, value in info.items() if name not in ("caption", "labels")}
            else:
                info = index_fields(inspect_media(media))
            clip = Clip(key=f"k{number}", caption="a dog", **info)
            writer.add(replace(clip, caption_choices="" if number else CAPTIONS), media, extension="bin")
        return writer.close()


def build(index: ClipIndex, **changes: Any) -> VideoLoader:
    config = DataConfig(**{"path": str(index.folder), "frames": 1, "workers": 0, "caption_dropout": 0.0, **changes})
    buckets = build_buckets(config, global_batch=4, micro_batch=4, world_size=1)
    return VideoLoader(config, buckets=buckets, rank=0, world_size=1, seed=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_are_clips_of_one_frame_beside_videos(mixed: ClipIndex, workers: int) -> None:
    loader = build(mixed, workers=workers)
    [batch] = loader.every_row(4)
    drawn = next(loader.steps(0))[0]
    loader.close()
    assert sorted(drawn.keys) == batch.keys == ["k0", "k1", "k2", "k3"]
    assert batch.pixels.shape == (4, 3, 1, 64, 64)
    frames = to_frames(batch.pixels)[:, 0]
    for frame in frames[1:3].astype(int):  # the middle 64 of 80 lines
        assert np.abs(frame[:28] - [255, 0, 0]).max() < 20
        assert np.abs(frame[36:] - [0, 0, 255]).max() < 20
    assert loader.counts()["fallback_decodes"] == loader.counts()["bad_clips"] == 0


def test_pictures_are_left_out_of_longer_clips(mixed: ClipIndex, caplog: pytest.LogCaptureFixture) -> None:
    assert [batch.keys for batch in build(mixed, frames=5).every_row(4)] == [["k0", "k3"]]
    assert "2 of 4 clips are left out; 2 still images, which have no 5 frames: k1 (1.00 s), k2 (1.00 s)" in caplog.text


def test_a_damaged_picture_is_an_unreadable_clip(tmp_path: Path) -> None:
    good = picture(halves())
    with DatasetWriter(tmp_path, kind="raw", description={}) as writer:
        for number, media in enumerate((good, good[: len(good) // 2])):
            writer.add(Clip(key=f"k{number}", caption="c", **index_fields(inspect_media(good))), media, extension="png")
        loader = build(writer.close())
    assert [batch.keys for batch in loader.every_row(4)] == [["k0"]]
    assert next(loader.steps(0))[0].keys == ["k0"] * 4


def test_one_of_several_captions_is_drawn_by_key(mixed: ClipIndex) -> None:
    def captions(start: int, count: int) -> list[str]:
        steps = islice(build(mixed, filter="not is_image").steps(start), count)
        return [text for [batch] in steps for key, text in zip(batch.keys, batch.captions) if key == "k0"]

    drawn = captions(0, 60)
    assert len(drawn) == 120
    assert set(Counter(drawn)) == {"a dog", "a brown dog", "a dog runs"}
    assert min(Counter(drawn).values()) > 25
    assert captions(20, 5) == drawn[40:50]
    assert next(build(mixed).every_row(1)).captions == ["a dog"]
