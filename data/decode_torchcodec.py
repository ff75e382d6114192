"""Frames by torchcodec, for those who ask for it: it needs FFmpeg's libraries and loads torch, 370 MB, in each decoding process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from .decode_common import (
    TIME_TOLERANCE_SECONDS,
    DecodeError,
    check_container,
    check_count,
    check_duration,
    check_end,
    display_size,
    short_reason,
    with_size,
)


@cache
def load_fault() -> str | None:
    """Why torchcodec cannot be used here, None if it can."""
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except ModuleNotFoundError as error:
        return f"is not installed ({error})"
    except Exception as error:  # without FFmpeg's libraries or with another torch: RuntimeError, OSError
        return f"is installed but does not load ({short_reason(error)})"
    return None


def read(data: bytes, times_seconds: Sequence[float]) -> np.ndarray:
    """See `decode.read_frames`; it goes by the time of each frame and so needs no `seekable`."""
    if fault := load_fault():
        raise DecodeError(f"torchcodec {fault}")
    check_container(data)
    from torchcodec.decoders import VideoDecoder

    try:
        reader = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu")
        facts = reader.metadata
        begin, end = float(facts.begin_stream_seconds), float(facts.end_stream_seconds)
    except Exception as error:  # RuntimeError, ValueError, KeyError and json's errors
        raise DecodeError(f"torchcodec cannot open it: {short_reason(error)}") from error
    width, height = _checked_size(facts, len(reader))
    check_duration(end - begin)
    seconds = [begin + t + TIME_TOLERANCE_SECONDS for t in times_seconds]
    inside = [s for s in seconds if s < end]
    try:
        first = reader.get_frame_at(0)
        pictures = list(reader.get_frames_played_at(inside).data.numpy()) if inside else []
        if len(inside) < len(seconds):  # the last frame, whose length need not be told, or too late
            last = reader.get_frame_at(len(reader) - 1)
            length = last.duration_seconds or 1 / (facts.average_fps or math.inf)
            check_end(times_seconds[-1], last.pts_seconds + length - begin)
            pictures += [last.data.numpy()] * (len(seconds) - len(inside))
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"torchcodec cannot decode it: {short_reason(error)}") from error
    if abs(first.pts_seconds - begin) > TIME_TOLERANCE_SECONDS:  # all times count from there
        raise DecodeError("torchcodec cannot decode it: frames at its start are hidden or cannot be decoded")
    return np.stack([with_size(picture, width=width, height=height) for picture in pictures])


def _checked_size(facts: Any, frames: int) -> tuple[int, int]:
    check_count(frames)
    # Measured: more than 8 bits of full range come out as limited, off by up to 15 levels, and the range is not told.
    if (facts.pixel_format or "").endswith(("le", "be")):  # as names of more than 8 bits do
        raise DecodeError(f"torchcodec cannot decode it: the range of {facts.pixel_format} is not certain")
    # Told upright, while a pixel's aspect is that of the stored frame.
    is_sideways = round((facts.rotation or 0) / 90) % 2 == 1
    width, height = (facts.height, facts.width) if is_sideways else (facts.width, facts.height)
    return display_size(width, height, pixel_aspect=facts.pixel_aspect_ratio, degrees=facts.rotation or 0)
