"""Encoded video bytes to frames: decord by default, PyAV where decord cannot read a file.

Frames are asked for by time, so a variable frame rate needs no special case, and both decoders return the same frames.
Call this from a worker process (`data/workers.py`) where the bytes are not known to be good: decord can crash on damaged streams.
"""

from __future__ import annotations

import importlib.util
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any

import numpy as np

# A frame counts as shown this long before its timestamp: containers round timestamps (Matroska to 1 ms).
TIME_TOLERANCE_SECONDS = 1e-3
_MAX_PIXELS = 36_000_000  # 8K; a small file can claim any size and exhaust the memory
_DECORD_CHUNK = 16  # frames decoded at a time while probing
_WORTH_SEEKING_SECONDS = 1.0  # decoding up to here from the front costs about as much as a seek


class Decoder(StrEnum):
    """The library that decodes video."""

    decord = "decord"
    pyav = "pyav"


class DecodeError(Exception):
    """These bytes cannot be decoded, now or later; the text is the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What decoding a whole file told about it."""

    frames: int
    fps_numerator: int  # average frame rate
    fps_denominator: int
    duration_seconds: float  # from the first frame's start to the last frame's end
    width: int  # pixels, after rotation
    height: int
    # False where frames shown before a keyframe come after it in the file (open groups of pictures, common in HEVC): there
    # decord lands beside the asked frame when it seeks, without an error, and PyAV past it.
    seekable: bool


def has_decoder(decoder: Decoder) -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec({Decoder.decord: "decord", Decoder.pyav: "av"}[decoder]) is not None


def available_decoder() -> Decoder:
    """decord where it is installed, else PyAV."""
    return Decoder.decord if has_decoder(Decoder.decord) else Decoder.pyav


def frame_times(count: int, *, fps: float, start_seconds: float = 0.0) -> list[float]:
    """Times of `count` frames at `fps`, in seconds from the first frame."""
    return [start_seconds + i / fps for i in range(count)]


def probe(data: bytes) -> VideoInfo:
    """Decodes every frame once with each installed decoder. Raises DecodeError.

    PyAV has the last word where it is installed, since it reads more formats and notices more damage. decord then reads the
    file too, so that a stream that crashes it does so here and not in training.
    """
    if has_decoder(Decoder.pyav):
        info = _probe_with_pyav(data)
        if has_decoder(Decoder.decord):
            with suppress(DecodeError):  # the loader reads such a clip with PyAV, and counts it
                _probe_with_decord(data)
        return info
    return _probe_with_decord(data)


def read_frames(
    data: bytes, times_seconds: Sequence[float], *, decoder: Decoder = Decoder.decord, seekable: bool = True
) -> np.ndarray:
    """The frames shown at the given ascending times after the first frame: uint8 [T, H, W, 3], upright. Raises DecodeError."""
    if not times_seconds or list(times_seconds) != sorted(times_seconds) or times_seconds[0] < 0:
        raise ValueError(f"times_seconds={list(times_seconds)} must be ascending, not negative and not empty")
    if decoder is Decoder.decord:
        return _read_with_decord(data, times_seconds, seekable)
    return _read_with_pyav(data, times_seconds, seekable)


def read_frames_with_fallback(
    data: bytes, times_seconds: Sequence[float], *, decoder: Decoder, seekable: bool = True
) -> tuple[np.ndarray, Decoder]:
    """`read_frames` with `decoder`, else with the other one; also says which one it was."""
    other = Decoder.pyav if decoder is Decoder.decord else Decoder.decord
    try:
        return read_frames(data, times_seconds, decoder=decoder, seekable=seekable), decoder
    except DecodeError:
        if not has_decoder(other):
            raise
    return read_frames(data, times_seconds, decoder=other, seekable=seekable), other


def _open_with_decord(data: bytes) -> Any:
    try:
        if has_decoder(Decoder.pyav):
            # Both bring codec libraries of the same names, and a process keeps the first: with decord's older libvpx PyAV cannot
            # write VP9 any more, while decord reads with either.
            import av  # noqa: F401
        import decord
    except ImportError as error:
        raise DecodeError("decord is not installed") from error
    decord.logging.set_level(decord.logging.QUIET)
    if not data:
        raise DecodeError("the file is empty")
    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        frames = len(reader)
    except Exception as error:  # decord raises its own type, RuntimeError and others
        raise DecodeError(f"decord cannot open it: {_reason(error)}") from error
    if frames == 0:
        raise DecodeError("no frames")
    return reader


def _probe_with_decord(data: bytes) -> VideoInfo:
    reader = _open_with_decord(data)
    frames = len(reader)
    try:
        spans = reader.get_frame_timestamp(range(frames)).astype(np.float64)  # [T, 2]
        for start in range(0, frames, _DECORD_CHUNK):
            batch = reader.get_batch(range(start, min(start + _DECORD_CHUNK, frames)))
        height, width = batch.shape[1:3]
    except Exception as error:
        raise DecodeError(f"decord cannot decode it: {_reason(error)}") from error
    duration = float(spans[-1, 1] - spans[0, 0])
    fps = _frame_rate(Fraction(reader.get_avg_fps()).limit_denominator(1001), spans[:, 0].tolist())
    return VideoInfo(frames, fps.numerator, fps.denominator, duration, width, height, seekable=False)


def _read_with_decord(data: bytes, times_seconds: Sequence[float], seekable: bool) -> np.ndarray:
    reader = _open_with_decord(data)
    try:
        spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)
        starts = (spans[:, 0] - spans[0, 0]).tolist()
        _check_end(times_seconds[-1], float(spans[-1, 1] - spans[0, 0]))
        indices = [max(0, bisect_right(starts, t + TIME_TOLERANCE_SECONDS) - 1) for t in times_seconds]
        if seekable:
            return reader.get_batch(indices).asnumpy()
        frames: dict[int, np.ndarray] = {}
        for index in range(indices[-1] + 1):  # front to back, never seeking
            frame = reader.next()
            if index in indices:
                frames[index] = frame.asnumpy()
        return np.stack([frames[index] for index in indices])
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(f"decord cannot decode it: {_reason(error)}") from error


def _open_with_pyav(data: bytes) -> tuple[Any, Any]:
    try:
        import av
    except ImportError as error:
        raise DecodeError("PyAV is not installed") from error
    if not data:
        raise DecodeError("the file is empty")
    try:
        container = av.open(io.BytesIO(data))
    except Exception as error:
        raise DecodeError(f"not a readable video file: {_reason(error)}") from error
    stream: Any = container.streams.best("video")  # the stream FFmpeg, and so decord, would choose among several
    if stream is None or stream.codec_context is None:
        container.close()
        raise DecodeError("no video stream")
    if stream.width * stream.height > _MAX_PIXELS:
        size = f"{stream.width}x{stream.height}"
        container.close()
        raise DecodeError(f"frames of {size} pixels are larger than 8K")
    stream.thread_count = 1
    return container, stream


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    previous: int | None = None
    try:
        for frame in container.decode(stream):
            if frame.pts is None:
                raise DecodeError("a frame without timestamp")
            if previous is not None and frame.pts < previous:
                raise DecodeError("timestamps go backwards")
            previous = frame.pts
            yield frame
    except DecodeError:
        raise
    except Exception as error:  # av.FFmpegError, whose subclasses have no other base in common
        raise DecodeError(f"damaged video data: {_reason(error)}") from error


def _probe_with_pyav(data: bytes) -> VideoInfo:
    container, stream = _open_with_pyav(data)
    with container:
        starts: list[Fraction] = []
        last = None
        for frame in _counted(_decoded(container, stream), stream):
            starts.append(frame.pts * stream.time_base)
            last = frame
        if last is None:
            raise DecodeError("no frames")
        times = [float(s - starts[0]) for s in starts]
        fps = _frame_rate(stream.average_rate, times)
        # Matroska's durations are rounded to milliseconds like its timestamps, which is close enough.
        last_duration = last.duration * stream.time_base if last.duration else 1 / fps
        width, height = (last.width, last.height) if last.rotation % 180 == 0 else (last.height, last.width)
    return VideoInfo(
        frames=len(starts),
        fps_numerator=fps.numerator,
        fps_denominator=fps.denominator,
        duration_seconds=times[-1] + float(last_duration),
        width=width,
        height=height,
        seekable=_is_seekable(data),
    )


def _counted(frames: Iterator[Any], stream: Any) -> Iterator[Any]:
    # Damage is worth more to its finder with the place where it sits.
    count = 0
    try:
        for frame in frames:
            count += 1
            yield frame
    except DecodeError as error:
        claimed = f" of {stream.frames}" if stream.frames else ""
        raise DecodeError(f"{error} (after {count}{claimed} frames)") from error


def _is_seekable(data: bytes) -> bool:
    container, stream = _open_with_pyav(data)
    with container:
        try:
            packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
        except Exception as error:
            raise DecodeError(f"damaged video data: {_reason(error)}") from error
    order = sorted(pts for pts, _ in packets)
    return all(order[i] == pts for i, (pts, is_key) in enumerate(packets) if is_key)


def _read_with_pyav(data: bytes, times_seconds: Sequence[float], seekable: bool) -> np.ndarray:
    container, stream = _open_with_pyav(data)
    with container:
        decoded = _decoded(container, stream)
        shown = next(decoded, None)
        if shown is None:
            raise DecodeError("no frames")
        origin, time_base = shown.pts, float(stream.time_base)
        wanted = [origin + (t + TIME_TOLERANCE_SECONDS) / time_base for t in times_seconds]
        if seekable and times_seconds[0] > _WORTH_SEEKING_SECONDS:
            container.seek(int(wanted[0]), stream=stream)  # to the last keyframe before
            decoded = _decoded(container, stream)
            shown = next(decoded, None)
            if shown is None or shown.pts > wanted[0]:
                raise DecodeError("seeking went past the asked time")
        frames: list[np.ndarray] = []
        for frame in decoded:
            # `shown` is on screen until `frame` starts.
            while len(frames) < len(wanted) and wanted[len(frames)] < frame.pts:
                frames.append(_upright(shown))
            shown = frame
            if len(frames) == len(wanted):
                break
        if len(frames) < len(wanted):
            duration = shown.duration or 1 / (stream.average_rate * stream.time_base)
            _check_end(times_seconds[-1], float(shown.pts + duration - origin) * time_base)
            frames += [_upright(shown)] * (len(wanted) - len(frames))
    return np.stack(frames)


def _upright(frame: Any) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, frame.rotation // 90)  # rotation is counter-clockwise, as rot90's


def _check_end(last_time: float, duration: float) -> None:
    if last_time > duration + TIME_TOLERANCE_SECONDS:
        raise DecodeError(f"too short: a frame at {last_time:.3f} s is asked for, the video ends at {duration:.3f} s")


def _frame_rate(claimed: Fraction | None, starts: Sequence[float]) -> Fraction:
    # The header's rate is exact where it agrees with the timestamps, and for variable rates it may be anything.
    if len(starts) < 2 or starts[-1] <= starts[0]:
        return claimed if claimed else Fraction(1)
    measured = (len(starts) - 1) / (starts[-1] - starts[0])
    if claimed and abs(float(claimed) / measured - 1) < 0.01:
        return claimed
    return Fraction(measured).limit_denominator(1001)


def _reason(error: Exception) -> str:
    # decord's messages carry a location in its sources, and may quote the file's whole content.
    text = str(error).split("Stack trace")[0]
    text = "".join(c if c.isprintable() else " " for c in text.rsplit("] ", 1)[-1])
    return " ".join(text.split())[:160]
