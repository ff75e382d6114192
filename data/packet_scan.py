"""What a container says of its video, from packets and the first frame alone: 5 to 10 % of the cost of decoding it all.

It notices files that are cut, not bits that are flipped inside a packet.
"""

from __future__ import annotations

from typing import Any

from .decode_common import DecodeError, VideoInfo, check_count, check_duration, frame_rate, short_reason
from .decode_pyav import Packet, finds_by_seeking, open_video, shown_size


def scan_packets(data: bytes) -> VideoInfo:
    """What `decode.probe` tells, without decoding more than one frame. Needs PyAV. Raises DecodeError."""
    container, stream = open_video(data)
    with container:
        packets: list[Packet] = []
        try:
            return _scan(container, stream, packets)
        except DecodeError:
            raise
        except Exception as error:  # av.FFmpegError, whose subclasses have no other base in common
            raise DecodeError(f"damaged video data: {short_reason(error)} (after {len(packets)} frames)") from error


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


def _scan(container: Any, stream: Any, packets: list[Packet]) -> VideoInfo:
    first: Any = None
    for packet in container.demux(stream):
        if first is None:  # also with the last packet, which is empty and asks for what the decoder still has
            first = next(iter(packet.decode()), None)
        if packet.size == 0:
            continue
        if packet.is_corrupt:
            raise DecodeError(f"damaged video data: a packet is cut (after {len(packets)} frames)")
        if packet.pts is None:
            raise DecodeError("a frame without timestamp")
        packets.append(Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
        check_count(len(packets))
    shown = sorted((packet for packet in packets if not packet.is_hidden), key=lambda packet: packet.pts)
    if first is None or not shown:
        raise DecodeError("no frames")
    if first.interlaced_frame:
        raise DecodeError("interlaced video: its first frame; deinterlace it first")
    starts = [float((packet.pts - shown[0].pts) * stream.time_base) for packet in shown]
    fps = frame_rate(stream.average_rate, starts)
    duration = starts[-1] + (float(shown[-1].duration * stream.time_base) or float(1 / fps))
    check_duration(duration)
    width, height = shown_size(stream, first.width, first.height, first.rotation)
    return VideoInfo(
        frames=len(shown),
        fps_numerator=fps.numerator,
        fps_denominator=fps.denominator,
        duration_seconds=duration,
        width=width,
        height=height,
        seekable=finds_by_seeking(container, stream, packets),
    )
