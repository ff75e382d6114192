"""Small dataset folders of real videos and pictures, some of them damaged before anyone took their checksum."""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from muybridge.data.index import Clip, ClipIndex
from muybridge.data.media_info import index_fields, inspect_media
from muybridge.data.mp4 import write_mp4
from muybridge.data.shards import DatasetWriter, shard_key
from muybridge.data.synthetic import FPS, draw_clip, render_clip

Damage = Callable[[bytes], bytes]


def video(number: int, frames: int) -> bytes:
    """A moving shape as an mp4 of 64x48 pixels, which a square crop must cut, and at most 17 frames."""
    there = render_clip(draw_clip(0, "train", number))[:, 8:56]
    file = io.BytesIO()
    write_mp4(file, np.concatenate((there, there[-2::-1]))[:frames], fps=FPS)
    return file.getvalue()


def small_video(number: int) -> bytes:
    """Five frames of 32x32 pixels."""
    file = io.BytesIO()
    write_mp4(file, render_clip(draw_clip(0, "train", number))[:5, 16:48, 16:48], fps=FPS)
    return file.getvalue()


def picture(number: int) -> bytes:
    """The first frame of such a video as a PNG."""
    file = io.BytesIO()
    Image.fromarray(render_clip(draw_clip(0, "train", number))[0, 8:56]).save(file, "PNG")
    return file.getvalue()


def write_folder(
    folder: Path, media: Iterable[bytes], *, damage: dict[int, Damage] | None = None, alike: bool = False
) -> ClipIndex:
    """A dataset of these files, each with two captions, in several shards.

    A row of `damage` is changed after its frames were counted and before its checksum is taken. Where all files are `alike`, only
    the first is looked at.
    """
    info = None
    with DatasetWriter(folder, kind="raw", description={"source": "test"}, shard_bytes=20_000) as writer:
        for row, data in enumerate(media):
            if info is None or not alike:
                info = index_fields(inspect_media(data))
            captions = [f"{folder.name} {row}", f"clip {row} of {folder.name}"]
            clip = Clip(key=shard_key(row, folder.name), caption=captions[0], **info)
            clip = replace(clip, caption_choices=json.dumps(captions))
            writer.add(clip, (damage or {}).get(row, bytes)(data), extension="bin")
        return writer.close()


def cut(data: bytes) -> bytes:
    """What a copy that broke off leaves: the head of the file."""
    return data[:64]


def garbled(data: bytes) -> bytes:
    """The same file with noise for its frames; header and table stay."""
    start = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    return data[:start] + np.random.default_rng(0).bytes(end - start) + data[end:]
