"""Frames by PyAV: reads the most formats, notices the most damage, and so has the last word on what a file is."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .decode_common import (
    DEMUXERS,
    TIME_TOLERANCE_SECONDS,
    DecodeError,
    VideoInfo,
    check_container,
    check_count,
    check_duration,
    check_end,
    display_size,
    frame_rate,
    short_reason,
    with_size,
)

# For FFmpeg: what it may take a file for, and that there is no other file or address to open for it.
RESTRICTIONS = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": ""}
_WORTH_SEEKING_SECONDS = 1.0  # decoding up to here from the front costs about as much as a seek


@dataclass(frozen=True)
class Packet:
    """One encoded frame of a file."""

    pts: int
    duration: int  # 0 where not known
    is_keyframe: bool
    is_hidden: bool  # by an edit list


def open_video(data: bytes) -> tuple[Any, Any]:
    """An open container, which the caller closes, and its best video stream. Raises DecodeError."""
    try:
        import av
    except ImportError as error:
        raise DecodeError("PyAV is not installed") from error
    check_container(data)
    try:
        container = av.open(io.BytesIO(data), container_options=RESTRICTIONS)
    except Exception as error:
        raise DecodeError(f"not a readable video file: {short_reason(error)}") from error
    stream: Any = container.streams.best("video")  # the stream FFmpeg would choose among several
    try:
        if stream is None or stream.codec_context is None:
            raise DecodeError("no video stream")
        shown_size(stream, stream.width, stream.height)
    except DecodeError:
        container.close()
        raise
    stream.thread_count = 1
    return container, stream


def shown_size(stream: Any, width: int, height: int, degrees: float = 0.0) -> tuple[int, int]:
    """`display_size` of a stored frame of a stream."""
    return display_size(width, height, pixel_aspect=stream.sample_aspect_ratio, degrees=degrees)


def finds_by_seeking(container: Any, stream: Any, packets: Sequence[Packet]) -> bool:
    """See `VideoInfo.seekable`, as far as the packets of a stream, in the order of the file, tell."""
    order = sorted(packet.pts for packet in packets)
    return (
        len(container.streams.video) == 1
        and (stream.sample_aspect_ratio or 1) == 1
        and packets[0].is_keyframe
        and not any(packet.is_hidden for packet in packets)
        and all(order[i] == packet.pts for i, packet in enumerate(packets) if packet.is_keyframe)
    )


def probe(data: bytes) -> tuple[VideoInfo, list[float]]:
    """Decodes every frame once; answers also with the seconds at which frames start. Raises DecodeError."""
    container, stream = open_video(data)
    with container:
        starts: list[Fraction] = []
        last: Any = None
        interlaced = 0
        for frame in _counted(_decoded(container, stream), stream):
            if last is not None and (frame.width, frame.height) != (last.width, last.height):
                raise DecodeError(
                    f"frame size changes: {last.width}x{last.height} to {frame.width}x{frame.height} pixels"
                )
            starts.append(frame.pts * stream.time_base)
            check_count(len(starts))
            check_duration(float(starts[-1] - starts[0]))
            interlaced += frame.interlaced_frame
            last = frame
        if last is None:
            raise DecodeError("no frames")
        if interlaced:
            raise DecodeError(f"interlaced video: {interlaced} of {len(starts)} frames; deinterlace it first")
        times = [float(s - starts[0]) for s in starts]
        fps = frame_rate(stream.average_rate, times)
        # Matroska's durations are rounded to milliseconds like its timestamps, which is close enough.
        duration = times[-1] + float(last.duration * stream.time_base if last.duration else 1 / fps)
        check_duration(duration)
        width, height = shown_size(stream, last.width, last.height, last.rotation)
    packets, seekable = _packets(data)
    info = VideoInfo(
        frames=len(starts),
        fps_numerator=fps.numerator,
        fps_denominator=fps.denominator,
        duration_seconds=duration,
        width=width,
        height=height,
        seekable=seekable and packets == len(starts),
    )
    return info, times


def read(data: bytes, times_seconds: Sequence[float], *, seekable: bool) -> np.ndarray:
    """See `decode.read_frames`."""
    container, stream = open_video(data)
    with container:
        decoded = _decoded(container, stream)
        shown = next(decoded, None)
        if shown is None:
            raise DecodeError("no frames")
        origin, time_base = shown.pts, float(stream.time_base)
        wanted = [origin + (t + TIME_TOLERANCE_SECONDS) / time_base for t in times_seconds]
        if seekable and times_seconds[0] > _WORTH_SEEKING_SECONDS:
            decoded = _decoded(container, stream, seek_to=int(wanted[0]))
            shown = next(decoded, None)
            if shown is None or shown.pts > wanted[0]:  # fragments are found by the time of decoding, which is earlier
                return read(data, times_seconds, seekable=False)
        frames: list[np.ndarray] = []
        length = 0  # of the frame before the shown one
        for frame in decoded:
            # `shown` is on screen until `frame` starts.
            while len(frames) < len(wanted) and wanted[len(frames)] < frame.pts:
                frames.append(shown_pixels(shown, stream))
            length, shown = frame.pts - shown.pts, frame
            if len(frames) == len(wanted):
                break
        if len(frames) < len(wanted):
            end = shown.pts + (shown.duration or length)
            check_end(times_seconds[-1], float(end - origin) * time_base)
            frames += [shown_pixels(shown, stream)] * (len(wanted) - len(frames))
    if len({frame.shape for frame in frames}) > 1:
        raise DecodeError(f"frame size changes: {sorted({frame.shape[:2] for frame in frames})}")
    return np.stack(frames)


def _decoded(container: Any, stream: Any, *, seek_to: int | None = None) -> Iterator[Any]:
    """The frames of a stream, from the last keyframe before a time on or from where the container is."""
    previous: int | None = None
    try:
        if seek_to is not None:
            container.seek(seek_to, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None:
                raise DecodeError("a frame without timestamp")
            if previous is not None and frame.pts < previous:
                raise DecodeError("timestamps go backwards")
            if frame.is_corrupt:  # painted over by the decoder, as H.264's does with 7 of 8 flipped bits
                raise DecodeError("damaged video data: a frame is incomplete")
            previous = frame.pts
            yield frame
    except DecodeError:
        raise
    except Exception as error:  # av.FFmpegError, whose subclasses have no other base in common
        raise DecodeError(f"damaged video data: {short_reason(error)}") from error


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


def _packets(data: bytes) -> tuple[int, bool]:
    """How many frames there are to show, and whether seeking finds them."""
    container, stream = open_video(data)
    with container:
        try:
            packets = [
                Packet(p.pts, p.duration or 0, p.is_keyframe, p.is_discard)
                for p in container.demux(stream)
                if p.pts is not None
            ]
        except Exception as error:
            raise DecodeError(f"damaged video data: {short_reason(error)}") from error
        return sum(not p.is_hidden for p in packets), bool(packets) and finds_by_seeking(container, stream, packets)


def shown_pixels(frame: Any, stream: Any) -> np.ndarray:
    """A decoded frame of a stream as uint8 [H, W, 3], upright and with square pixels.

    FFmpeg converts by the matrix and range that the frame is tagged with, BT.601 and limited where it is not, and rounds to
    8 bits; an alpha channel is dropped. It leaves the brightness curve as it is, so PQ and HLG come out flat and pale: such clips
    are marked `is_hdr` in the index, for a filter.
    """
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))  # both count counter-clockwise
    width, height = shown_size(stream, frame.width, frame.height, frame.rotation)
    return with_size(pixels, width=width, height=height)
