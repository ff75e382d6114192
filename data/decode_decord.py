"""Frames by decord: fast and wanted first, for files that are as usual files are."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any

import numpy as np

from .decode_common import (
    TIME_TOLERANCE_SECONDS,
    DecodeError,
    VideoInfo,
    check_container,
    check_count,
    check_duration,
    check_end,
    frame_rate,
    short_reason,
)

_CHUNK = 16  # frames decoded at a time while probing


def probe(data: bytes) -> tuple[VideoInfo, list[float]]:
    """Decodes every frame once; answers also with the seconds at which frames start. Raises DecodeError.

    decord tells nothing of seeking, nor of the shape of pixels.
    """
    reader, spans = _open(data)
    try:
        for start in range(0, len(spans), _CHUNK):
            batch = reader.get_batch(range(start, min(start + _CHUNK, len(spans))))
        height, width = batch.shape[1:3]
    except Exception as error:
        raise DecodeError(f"decord cannot decode it: {short_reason(error)}") from error
    starts = (spans[:, 0] - spans[0, 0]).tolist()
    fps = frame_rate(Fraction(reader.get_avg_fps()).limit_denominator(1001), starts)
    duration = float(spans[-1, 1] - spans[0, 0])
    return VideoInfo(len(spans), fps.numerator, fps.denominator, duration, width, height, seekable=False), starts


def read(data: bytes, times_seconds: Sequence[float], *, seekable: bool) -> np.ndarray:
    """See `decode.read_frames`."""
    reader, spans = _open(data)
    starts = (spans[:, 0] - spans[0, 0]).tolist()
    check_end(times_seconds[-1], float(spans[-1, 1] - spans[0, 0]))
    indices = [max(0, bisect_right(starts, t + TIME_TOLERANCE_SECONDS) - 1) for t in times_seconds]
    try:
        if seekable:
            return reader.get_batch(indices).asnumpy()
        frames: dict[int, np.ndarray] = {}
        for index in range(indices[-1] + 1):  # front to back, never seeking
            frame = reader.next()
            if index in indices:
                frames[index] = frame.asnumpy()
    except Exception as error:
        raise DecodeError(f"decord cannot decode it: {short_reason(error)}") from error
    return np.stack([frames[index] for index in indices])


def _open(data: bytes) -> tuple[Any, np.ndarray]:
    """The reader, and start and end of every frame in seconds [T, 2]."""
    # Both bring codec libraries of the same names, and a process keeps the first: with decord's older libvpx PyAV cannot write
    # VP9 any more, while decord reads with either.
    with suppress(ImportError):
        import av  # noqa: F401
    try:
        import decord
    except ImportError as error:
        raise DecodeError("decord is not installed") from error
    decord.logging.set_level(decord.logging.QUIET)
    check_container(data)
    with _opened(data) as file:
        try:
            reader = decord.VideoReader(file, num_threads=1)
            count = len(reader)
            keyframes = reader.get_key_indices() if count else []
            spans = reader.get_frame_timestamp(range(count)).astype(np.float64) if count else np.zeros((0, 2))
        except Exception as error:  # decord raises its own type, RuntimeError and others
            raise DecodeError(f"decord cannot open it: {short_reason(error).replace(str(file), 'it')}") from error
    if count == 0:
        raise DecodeError("no frames")
    check_count(count)
    check_duration(float(spans[-1, 1] - spans[0, 0]))
    # decord counts the frames before this one, and returns none of them: all its numbers are off.
    if spans[0, 0] < -TIME_TOLERANCE_SECONDS or not len(keyframes) or keyframes[0] != 0:
        raise DecodeError("decord cannot decode it: frames at its start are hidden or cannot be decoded")
    return reader, spans


@contextmanager
def _opened(data: bytes) -> Iterator[str | io.BytesIO]:
    # By name and not as bytes: of those, decord keeps one copy until a garbage collection, and two for good where it cannot open
    # them, which in time fills the memory of a process that reads large files.
    if not hasattr(os, "memfd_create"):  # only Linux has it
        yield io.BytesIO(data)
        return
    with os.fdopen(os.memfd_create("video"), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
