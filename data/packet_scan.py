"""What a container says of its video, from packets and the first frame alone: a hundredth of the cost of decoding all of it.

It notices files that are cut, not bits that are flipped inside a packet.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

from .decode import DecodeError, VideoInfo
from .images import MAX_PIXELS


def scan_packets(data: bytes) -> VideoInfo:
    """What `decode.probe` tells, without decoding more than one frame. Needs PyAV. Raises DecodeError."""
    import av

    if not data:
        raise DecodeError("the file is empty")
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            stream: Any = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise DecodeError("no video stream")
            if stream.width * stream.height > MAX_PIXELS:
                raise DecodeError(f"frames of {stream.width}x{stream.height} pixels are larger than 8K")
            stream.thread_count = 1
            return _scan(container, stream)
    except av.FFmpegError as error:
        raise DecodeError(f"not a readable video file: {' '.join(str(error).split())[:160]}") from error


def _scan(container: Any, stream: Any) -> VideoInfo:
    first: Any = None
    read = 0
    packets: list[tuple[int, int, bool]] = []  # time, duration, whether it is a keyframe
    for packet in container.demux(stream):
        if first is None:  # also with the last packet, which is empty and asks for what the decoder still has
            first = next(iter(packet.decode()), None)
        if packet.size == 0:
            continue
        read += 1
        if packet.is_corrupt:
            raise DecodeError(f"damaged video data: a packet is cut (after {read - 1} frames)")
        if packet.pts is None:
            raise DecodeError("a frame without timestamp")
        if not packet.is_discard:  # cut off by an edit list
            packets.append((packet.pts, packet.duration or 0, packet.is_keyframe))
    if first is None or not packets:
        raise DecodeError("no frames")
    order = sorted(packets)
    starts = [float((time - order[0][0]) * stream.time_base) for time, _, _ in order]
    fps = _frame_rate(stream.average_rate, starts)
    last = float(order[-1][1] * stream.time_base) or float(1 / fps)
    width, height = (first.width, first.height) if first.rotation % 180 == 0 else (first.height, first.width)
    return VideoInfo(
        frames=len(packets),
        fps_numerator=fps.numerator,
        fps_denominator=fps.denominator,
        duration_seconds=starts[-1] + last,
        width=width,
        height=height,
        seekable=all(order[i][0] == time for i, (time, _, is_key) in enumerate(packets) if is_key),
    )


def _frame_rate(claimed: Fraction | None, starts: list[float]) -> Fraction:
    # As `decode.probe` has it: the header's rate where the timestamps agree with it.
    if len(starts) < 2 or starts[-1] <= 0:
        return claimed or Fraction(1)
    measured = (len(starts) - 1) / starts[-1]
    return (
        claimed if claimed and abs(float(claimed) / measured - 1) < 0.01 else Fraction(measured).limit_denominator(1001)
    )
