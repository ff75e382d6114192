"""What a container says of its video, from packets and the first frame alone: 5 to 10 % of the cost of decoding it all.

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


def claimed_end(data: bytes, entries: Any) -> int:
    """Where a file should end, as far as its container tells: in mp4 after the last frame of its table, which `entries` are.

    Between two frames a cut leaves no other trace, for what is there decodes. The header's count of frames is no help, since it
    counts those too that an edit list hides.
    """
    frames_end = max((entry.pos + entry.size for entry in entries), default=0)
    return max(frames_end, _matroska_end(data))


def _matroska_end(data: bytes) -> int:
    # Two elements make the file (RFC 9559): the EBML header and the segment. 0 for other files and segments of unknown size.
    offset = 0
    for element in (b"\x1aE\xdf\xa3", b"\x18S\x80g"):
        if data[offset : offset + 4] != element or len(data) < offset + 12:
            return 0
        width = 9 - data[offset + 4].bit_length()  # of the size in bytes: zeros before the first set bit, plus 1
        size = int.from_bytes(data[offset + 4 : offset + 4 + width], "big") - (1 << 7 * width)
        if width > 8 or not 0 <= size < (1 << 7 * width) - 1:
            return 0
        offset += 4 + width + size
    return offset


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
