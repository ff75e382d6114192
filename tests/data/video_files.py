"""Videos of every kind that the decoders are tried on, made by PyAV; where frames carry a number it is `NumberedVideos`'."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muybridge.tests.usual_priority import usual_priority

av = pytest.importorskip("av", reason="PyAV writes the test videos")

BITS = 6
OPEN_GOP_265 = {"x265-params": "keyint=10:min-keyint=10:bframes=3:open-gop=1:log-level=none"}
OPEN_GOP_264 = {"x264-params": "keyint=10:min-keyint=10:bframes=2:open-gop=1:scenecut=0:b-pyramid=none"}


def numbered_frame(number: int, *, width: int = 96, height: int = 64) -> np.ndarray:
    """A frame uint8 [H, W, 3] whose upper half shows a number as bright bars, least significant bit first."""
    frame = np.full((height, width, 3), 16, dtype=np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            frame[: height // 2, bit * width // BITS : (bit + 1) * width // BITS] = 235
    return frame


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers of frames uint8 [T, H, W, 3], upright ones of any size."""
    height, width = frames.shape[1:3]
    centres = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    levels = frames[:, height // 8 : 3 * height // 8, centres].mean((1, 3))  # [T, bits]
    return [sum(1 << bit for bit, level in enumerate(row) if level > 128) for row in levels]


def encode(
    frames: list[Any] | int = 50,
    *,
    codec: str = "libx264",
    container: str = "mp4",
    pixel_format: str = "yuv420p",
    size: tuple[int, int] = (96, 64),
    times_ms: list[int] | None = None,
    options: dict[str, str] | None = None,
    layout: dict[str, str] | None = None,
    **attributes: Any,
) -> bytes:
    """A video of these PyAV frames, or of so many numbered ones; 25 fps unless `times_ms` say otherwise.

    `attributes` are those of the codec context, `layout` the options of the container.
    """
    if isinstance(frames, int):
        pictures = (numbered_frame(n, width=size[0], height=size[1]) for n in range(frames))
        frames = [av.VideoFrame.from_ndarray(p, format="rgb24").reformat(format=pixel_format) for p in pictures]

    def write(out: Any) -> None:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.thread_count = 1
        for name, value in attributes.items():
            setattr(stream.codec_context, name, value)
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = (times_ms[number] if times_ms else 40 * number), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())

    return written(write, container=container, layout=layout)


@cache
def plain() -> bytes:
    """The usual file: an mp4 of H.264, with B-frames and several groups of pictures."""
    return encode(options={"g": "10", "bf": "2"})


def written(write: Callable[[Any], None], *, container: str = "mp4", layout: dict[str, str] | None = None) -> bytes:
    """The file that `write` fills."""
    with tempfile.TemporaryDirectory() as folder:  # FFmpeg moves the header to the front of named files only
        path = Path(folder) / "video"
        with usual_priority(), av.open(str(path), mode="w", format=container, options=layout or {}) as out:
            write(out)
        return path.read_bytes()


def remux(
    data: bytes,
    *,
    container: str = "mp4",
    from_packet: int = 0,
    from_keyframe: int = 0,
    earlier_ms: int = 0,
    layout: dict[str, str] | None = None,
) -> bytes:
    """The same frames in a new container, without those that are stored before a packet or a keyframe, and shown earlier."""

    def write(out: Any) -> None:
        with av.open(io.BytesIO(data)) as source:
            video = source.streams.video[0]
            stream = out.add_stream_from_template(video)
            keyframes = 0
            for number, packet in enumerate(source.demux(video)):
                keyframes += packet.is_keyframe
                if packet.dts is None or number < from_packet or keyframes <= from_keyframe - 1:
                    continue
                shift = int(Fraction(earlier_ms, 1000) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                out.mux(packet)

    return written(write, container=container, layout=layout)


def turned(data: bytes, degrees: int) -> bytes:
    """An mp4 whose track header (ISO/IEC 14496-12, 8.3.2) asks for a clockwise turn."""
    one = 65536
    a, b, c, d = {
        0: (one, 0, 0, one),
        90: (0, one, -one, 0),
        180: (-one, 0, 0, -one),
        270: (0, -one, one, 0),
    }[degrees]
    matrix = b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    start = data.index(b"tkhd") + 4 + 40
    return data[:start] + matrix + data[start + 36 :]


def with_frame_times(data: bytes, ticks: int) -> bytes:
    """An mp4 in whose table every frame lasts so many ticks (8.6.1.2)."""
    table, changed = data.index(b"stts"), bytearray(data)
    for entry in range(int.from_bytes(data[table + 8 : table + 12], "big")):
        changed[table + 16 + 8 * entry : table + 20 + 8 * entry] = ticks.to_bytes(4, "big", signed=True)
    return bytes(changed)


def sound_only() -> bytes:
    """An mp4 without video."""

    def write(out: Any) -> None:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        for number in range(4):
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            block.sample_rate, block.pts = 44100, 1024 * number
            out.mux(stream.encode(block))
        out.mux(stream.encode())

    return written(write)


def two_streams() -> bytes:
    """An mp4 with a second video stream, larger and negative."""

    def write(out: Any) -> None:
        streams = [out.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, scale in zip(streams, (1, 2)):
            stream.width, stream.height, stream.pix_fmt = 96 * scale, 64 * scale, "yuv420p"
            stream.codec_context.thread_count = 1
        for number in range(50):
            for stream, negative in zip(streams, (0, 255)):
                picture = numbered_frame(number, width=stream.width, height=stream.height) ^ np.uint8(negative)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode())

    return written(write)


def growing() -> bytes:
    """A webm whose frames become larger in its middle."""
    parts = [encode(10, codec="libvpx-vp9", container="webm", size=size) for size in ((96, 64), (192, 128))]

    def write(out: Any) -> None:
        stream: Any = None
        for number, data in enumerate(parts):
            with av.open(io.BytesIO(data)) as source:
                video = source.streams.video[0]
                stream = stream or out.add_stream_from_template(video)
                for packet in source.demux(video):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + 400 * number, packet.dts + 400 * number
                        packet.stream = stream
                        out.mux(packet)

    return written(write, container="webm")
