"""Whatever videos and pictures a shard may hold: the index has each as it is shown, or leaves it out with a class of reasons."""

from __future__ import annotations

import io
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muybridge.data.index import Clip
from muybridge.data.indexing import IndexReport, IndexSettings, build_index
from muybridge.data.tar_samples import reason_class

av = pytest.importorskip("av", reason="PyAV writes the test videos")

SIZE = (96, 64)
HOUR_MS = 3_600_000


def video(
    frames: int = 16,
    *,
    times_ms: list[int] | None = None,
    size: tuple[int, int] = SIZE,
    pixel_format: str = "yuv420p",
    codec: str = "libx264",
    container: str = "mp4",
    options: dict[str, str] | None = None,
    layout: dict[str, str] | None = None,
    **attributes: Any,
) -> bytes:
    """A video at 25 fps, or with a frame at each of these times; `attributes` are those of the codec context."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        with av.open(str(path), mode="w", format=container, options=layout or {}) as out:
            stream = out.add_stream(codec, rate=25, options=options or {})
            stream.width, stream.height, stream.pix_fmt = *size, pixel_format
            stream.codec_context.thread_count = 1
            if times_ms:
                stream.codec_context.time_base = Fraction(1, 1000)
            for name, value in attributes.items():
                setattr(stream.codec_context, name, value)
            for number in range(len(times_ms or range(frames))):
                pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
                pixels[: SIZE[1], : SIZE[0]] = rng.integers(0, 256, pixels[: SIZE[1], : SIZE[0]].shape)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pixel_format)
                if times_ms:
                    frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return path.read_bytes()


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as out:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        block.sample_rate = 44100
        out.mux(stream.encode(block))
        out.mux(stream.encode())
    return file.getvalue()


def without_first_packets(data: bytes, count: int) -> bytes:
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, mode="w", format="matroska") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(source.streams.video[0]) if packet.size][count:]:
            packet.stream = stream
            out.mux(packet)
    return file.getvalue()


def replaced(data: bytes, box: bytes, at: int, content: bytes) -> bytes:
    """An mp4 with other bytes at this place behind the name of a box."""
    place = data.index(box) + len(box) + at
    return data[:place] + content + data[place + len(content) :]


def turned(data: bytes) -> bytes:
    # The display matrix of the track header, ISO/IEC 14496-12, 8.3.2.
    return replaced(data, b"tkhd", 40, struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))


def picture(format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (48, 32), **options: Any) -> bytes:
    ramp = np.tile(np.linspace(0, 255, size[0]), (size[1], 1))
    deep = mode == "I;16"
    image = Image.fromarray((ramp * 257).astype(np.uint16) if deep else ramp.astype(np.uint8))
    file = io.BytesIO()
    (image if deep else image.convert(mode)).save(file, format, **options)
    return file.getvalue()


def animation(format: str, **options: Any) -> bytes:
    frames = [Image.new("RGB", (8, 8), (n * 60, 0, 0)) for n in range(3)]
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def bomb() -> bytes:
    """A png of a few bytes that claims 30,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 20_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 99) + b"IDAT" + bytes(99)


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("JPEG", exif=exif)


@cache
def plain() -> bytes:
    return video()


@cache
def fast() -> bytes:
    """With its header in front of the frames."""
    return video(50, layout={"movflags": "faststart"})


GARBAGE = np.random.default_rng(1).integers(0, 256, 2000, dtype=np.uint8).tobytes()

# The name of the file, what makes its bytes, and the class of the reason.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero.mp4": (lambda: b"", "the file is empty"),
    "page.mp4": (lambda: b"<html>404 not found</html>" * 20, "not a readable video file"),
    "noise.mp4": (lambda: GARBAGE, "not a readable video file"),
    "cut-before-its-header.mp4": (lambda: plain()[: len(plain()) // 2], "not a readable video file"),
    "cut-behind-its-header.mp4": (lambda: fast()[: len(fast()) * 6 // 10], "damaged video data"),
    "cut.mkv": (lambda: video(50, container="matroska")[:-4000], "damaged video data"),
    "rotten.mp4": (
        lambda: fast()[: len(fast()) // 2] + GARBAGE + fast()[len(fast()) // 2 + len(GARBAGE) :],
        "damaged video data",
    ),
    "sound.mp4": (lambda: sound(), "no video stream"),
    "avi.mp4": (lambda: video(container="avi", codec="mpeg4"), "unsupported container"),
    "stream.mp4": (lambda: video(container="mpegts"), "unsupported container"),
    "raw.mp4": (lambda: video(container="h264"), "not a readable video file"),
    "interlaced.mp4": (lambda: video(options={"x264-params": "interlaced=1"}), "interlaced video"),
    "bomb.mp4": (lambda: video(1, size=(8192, 4400), options={"preset": "ultrafast"}), "frames too large"),
    "needle.mp4": (lambda: video(sample_aspect_ratio=Fraction(20, 1)), "pixel aspect ratio"),
    "endless.mp4": (lambda: video(times_ms=[0, 7 * HOUR_MS]), "too long"),
    "stuck.mp4": (lambda: replaced(video(options={"bf": "0"}), b"stts", 12, bytes(4)), "no frame rate"),
    "all-depend-on-the-first.mkv": (
        lambda: without_first_packets(video(40, options={"bf": "3", "g": "100"}), 1),
        "no frames",
    ),
    "gif.mp4": (lambda: animation("GIF"), "animated image"),
    "gif.webp": (lambda: animation("GIF"), "animated image"),
    "animated.webp": (lambda: animation("WEBP", lossless=True), "animated image"),
    "animated.png": (lambda: animation("PNG"), "animated image"),
    "cut.jpg": (lambda: picture("JPEG", size=(200, 100))[:800], "damaged image"),
    "cut.png": (lambda: picture()[:60], "damaged image"),
    "page.webp": (lambda: b"RIFF1234WEBP<html>", "damaged image"),
    "page.jpg": (lambda: b"<html>404</html>", "not a readable video file"),
    "bomb.png": (lambda: bomb(), "picture too large"),
}
# The name of the file, what makes its bytes, and what the index says of it.
TAKEN: dict[str, tuple[Callable[[], bytes], dict[str, Any]]] = {
    "mkv-in.mp4": (
        lambda: video(container="matroska"),
        {"frames": 16, "duration_seconds": 0.64, "is_variable_rate": False},
    ),
    "webm-in.mkv": (lambda: video(container="webm", codec="libvpx-vp9"), {"frames": 16}),
    "png-in.jpg": (lambda: picture(), {"is_image": True, "frames": 1}),
    "jpg-in.mp4": (lambda: picture("JPEG"), {"is_image": True, "frames": 1}),
    "variable.mp4": (lambda: video(times_ms=[0, 40, 80, 240, 280]), {"is_variable_rate": True, "frames": 5}),
    "turned.mp4": (lambda: turned(plain()), {"width": 64, "height": 96}),
    "deep.mp4": (lambda: video(pixel_format="yuv420p10le"), {"bit_depth": 10, "is_hdr": False}),
    "pq.mp4": (lambda: video(pixel_format="yuv420p10le", color_trc=16), {"bit_depth": 10, "is_hdr": True}),
    "hlg.mp4": (lambda: video(pixel_format="yuv420p10le", color_trc=18), {"is_hdr": True}),
    "full-range.mp4": (lambda: video(color_range=2), {"pixel_format": "yuvj420p", "bit_depth": 8}),
    "444.mp4": (lambda: video(pixel_format="yuv444p"), {"pixel_format": "yuv444p"}),
    "odd.mp4": (lambda: video(size=(63, 35), pixel_format="yuv444p"), {"width": 63, "height": 35}),
    "wide-pixels.mp4": (lambda: video(sample_aspect_ratio=Fraction(4, 3)), {"width": 128, "height": 64}),
    "alpha.webm": (lambda: video(codec="libvpx-vp9", pixel_format="yuva420p", container="webm"), {"frames": 16}),
    "alpha.mov": (lambda: video(codec="prores_ks", pixel_format="yuva444p10le", container="mov"), {"frames": 16}),
    "slow.mkv": (
        lambda: video(times_ms=[0, HOUR_MS], container="matroska"),
        {"frames": 2, "duration_seconds": pytest.approx(3600, abs=1), "fps_numerator": 1, "fps_denominator": 3600},
    ),
    "headless.mkv": (lambda: without_first_packets(video(40, options={"bf": "3", "g": "10"}), 3), {"seekable": False}),
    "one.mp4": (lambda: video(1), {"frames": 1, "is_image": False}),
    "no-duration.mp4": (
        lambda: video(layout={"movflags": "frag_keyframe+empty_moov"}),
        {"frames": 16, "duration_seconds": 0.64},
    ),
    "cmyk.jpg": (lambda: picture("JPEG", "CMYK"), {"pixel_format": "CMYK", "is_image": True}),
    "deep.png": (lambda: picture(mode="I;16"), {"bit_depth": 16, "width": 48}),
    "alpha.png": (lambda: picture(mode="RGBA"), {"pixel_format": "RGBA", "height": 32}),
    "sideways.jpg": (lambda: sideways(), {"width": 32, "height": 48}),
}
# Flipped bits inside a packet are found by decoding alone, and so are the frames that nothing before them lets decode.
FOUND_BY_DECODING = ("rotten.mp4",)


def key_of(name: str) -> str:
    return name.replace(".", "-")


class Found(dict[bool, tuple[dict[str, Clip], IndexReport]]):
    """The index and its report, made with decoding and without."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The indexes of a shard with all these files."""
    folder = tmp_path_factory.mktemp("media")
    files = {name: make for name, (make, _) in REFUSED.items()} | {name: make for name, (make, _) in TAKEN.items()}
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, make in files.items():
            extension = name.rpartition(".")[2]
            for member, content in ((f"{key_of(name)}.{extension}", make()), (f"{key_of(name)}.txt", b"a dog")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    results = Found()
    for decode in (True, False):
        settings = IndexSettings(decode=decode)
        options: dict[str, Any] = {"workers": 1, "timeout_seconds": 60.0, "max_rejected_share": 1.0}
        index, report = build_index(str(folder), folder / str(decode), settings=settings, **options)
        results[decode] = ({index.text("key", row): index.clip(row) for row in range(len(index))}, report)
    return results


@pytest.mark.parametrize("decode", [True, False], ids=["decoded", "packets"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_left_out_with_its_reason(found: Found, name: str, decode: bool) -> None:
    clips, report = found[decode]
    reasons = {rejection.key: rejection.reason for rejection in report.rejections}
    if not decode and name in FOUND_BY_DECODING:
        assert key_of(name) in clips
        return
    assert reason_class(reasons[key_of(name)]) == REFUSED[name][1], reasons[key_of(name)]
    assert len(reasons[key_of(name)]) < 250
    assert reasons[key_of(name)].isprintable()


@pytest.mark.parametrize("decode", [True, False], ids=["decoded", "packets"])
@pytest.mark.parametrize("name", TAKEN)
def test_an_unusual_file_is_indexed_as_it_is_shown(found: Found, name: str, decode: bool) -> None:
    clips, report = found[decode]
    reasons = {rejection.key: rejection.reason for rejection in report.rejections}
    assert key_of(name) in clips, reasons[key_of(name)]
    assert {field: getattr(clips[key_of(name)], field) for field in TAKEN[name][1]} == TAKEN[name][1]


def test_classes_are_counted(found: Found) -> None:
    report = found[True][1]
    expected = [kind for _, kind in REFUSED.values()]
    assert report.counts() == {kind: expected.count(kind) for kind in expected}
    assert report.clips == len(TAKEN)
