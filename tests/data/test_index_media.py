"""What the index says of each kind of video and image, and why it leaves the others out."""

from __future__ import annotations

import io
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muybridge.data import decode_common
from muybridge.data.decode import DecodeError
from muybridge.data.images import read_image
from muybridge.data.media_info import inspect_media, inspect_range
from muybridge.data.quality import measure_quality, sample_times

av = pytest.importorskip("av", reason="PyAV writes the test videos")

SIXTEEN = [40 * i for i in range(16)]


def encode(
    *, pixel_format: str = "yuv420p", codec: str = "libx264", container: str = "mp4", frames: int = 16, **extra: Any
) -> bytes:
    """A small video at 25 fps; `extra` are attributes of the codec context, `audio` adds a sound track, `video` is on."""
    has_audio, has_video = extra.pop("audio", False), extra.pop("video", True)
    width, height = extra.pop("size", (96, 64))
    folder = Path(tempfile.mkdtemp())
    with av.open(str(folder / "video"), mode="w", format=container) as out:
        if has_video:
            stream = out.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
            stream.codec_context.thread_count = 1
            for name, value in extra.items():
                setattr(stream.codec_context, name, value)
        if has_audio:
            sound = out.add_stream("aac", rate=44100, layout="mono")
        for number in range(frames if has_video else 0):
            picture = np.full((height, width, 3), 8 * number % 256, dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)))
        if has_video:
            out.mux(stream.encode())
        if has_audio:
            for number in range(4):
                block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
                block.sample_rate, block.pts = 44100, 1024 * number
                out.mux(sound.encode(block))
            out.mux(sound.encode())
    data = (folder / "video").read_bytes()
    shutil.rmtree(folder)
    return data


def picture(format: str, mode: str = "RGB", size: tuple[int, int] = (48, 32), **options: Any) -> bytes:
    """An image file with a gradient from left to right."""
    ramp = np.tile(np.linspace(0, 255, size[0]), (size[1], 1))
    if mode == "I;16":
        image = Image.fromarray((ramp * 257).astype(np.uint16))
    else:
        image = Image.fromarray(ramp.astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_usual_videos_are_described() -> None:
    info = inspect_media(encode())
    assert (info.frames, info.fps_numerator, info.fps_denominator, info.width, info.height) == (16, 25, 1, 96, 64)
    assert info.duration_seconds == pytest.approx(0.64, abs=0.01)
    assert (info.pixel_format, info.bit_depth, info.container) == ("yuv420p", 8, "mp4")
    assert not any((info.is_image, info.has_audio, info.is_variable_rate, info.is_hdr))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"container": "matroska"}, {"container": "matroska", "is_variable_rate": False}),
        ({"container": "webm", "codec": "libvpx-vp9"}, {"container": "matroska"}),
        ({"container": "mov"}, {"container": "mp4"}),
        ({"container": "avi", "codec": "mpeg4"}, {"container": "avi"}),
        ({"pixel_format": "yuv420p10le"}, {"pixel_format": "yuv420p10le", "bit_depth": 10, "is_hdr": False}),
        ({"pixel_format": "yuv420p10le", "color_trc": 16}, {"is_hdr": True}),
        ({"pixel_format": "yuv420p10le", "color_trc": 18}, {"is_hdr": True}),
        ({"pixel_format": "yuv444p"}, {"pixel_format": "yuv444p", "bit_depth": 8}),
        ({"audio": True}, {"has_audio": True, "frames": 16}),
        ({"frames": 1}, {"frames": 1, "is_image": False}),
        ({"size": (62, 34)}, {"width": 62, "height": 34}),
    ],
)
def test_what_is_special_about_a_video_is_noted(options: dict[str, Any], expected: dict[str, Any]) -> None:
    info = inspect_media(encode(**options))
    assert {name: getattr(info, name) for name in expected} == expected


def test_uneven_frames_and_rotation_are_noted(numbered: Any) -> None:
    for container in ("mp4", "matroska"):
        info = inspect_media(numbered.encode([0, 40, 80, 240, 280], container=container))
        assert info.is_variable_rate
    data = numbered.encode(SIXTEEN)
    matrix = data.index(b"tkhd") + 4 + 40  # the display matrix of the track header, ISO/IEC 14496-12, 8.3.2
    turn = b"".join(v.to_bytes(4, "big", signed=True) for v in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
    info = inspect_media(data[:matrix] + turn + data[matrix + 36 :])
    assert (info.width, info.height) == (64, 96)


def test_an_image_is_one_frame() -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        info = inspect_media(picture(format))
        assert (info.is_image, info.frames, info.width, info.height, info.bit_depth) == (True, 1, 48, 32, 8)
        assert (info.duration_seconds, info.fps_numerator, info.container) == (1.0, 1, "image")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    data = picture("JPEG", exif=sideways)
    assert (inspect_media(data).width, inspect_media(data).height) == (32, 48)
    upright = read_image(data)
    assert upright.shape == (48, 32, 3)
    assert upright[2].mean() < 30 < 220 < upright[-3].mean()  # a clockwise quarter turn: left becomes top


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "I;16", "1", "LA"])
def test_images_of_all_modes_come_out_as_rgb(mode: str) -> None:
    data = picture("JPEG" if mode == "CMYK" else "PNG", mode)
    assert inspect_media(data).pixel_format == mode
    pixels = read_image(data)
    assert pixels.shape == (32, 48, 3)
    assert pixels.dtype == np.uint8
    assert pixels[:, :4].mean() < 40 < 215 < pixels[:, -4:].mean()


def damaged_media(numbered: Any) -> dict[str, tuple[bytes, str]]:
    """Bytes and the reason they give."""
    plain, fast = numbered.encode(SIXTEEN * 1), numbered.encode([40 * i for i in range(50)], header_first=True)
    noise = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    jpeg, apng = picture("JPEG", size=(200, 100)), io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (n * 60, 0, 0)) for n in range(3)]
    frames[0].save(apng, "PNG", save_all=True, append_images=frames[1:])
    gif, webp = io.BytesIO(), io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    frames[0].save(webp, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return {
        "zero bytes": (b"", "the file is empty"),
        "a page": (b"<html>404 not found</html>" * 20, "not a readable video file"),
        "noise": (noise, "not a readable video file"),
        "cut before its header": (plain[: len(plain) // 2], "not a readable video file"),
        "cut behind its header": (fast[: len(fast) * 6 // 10], "damaged video data: .* frames"),
        "bit rot": (fast[: len(fast) // 2] + noise[:1500] + fast[len(fast) // 2 + 1500 :], "damaged video data"),
        "sound only": (encode(video=False, audio=True), "no video stream"),
        "cut jpg": (jpeg[: len(jpeg) // 2], "damaged image: .*truncated"),
        "cut png": (picture("PNG")[:60], "damaged image"),
        "headless webp": (b"RIFF1234WEBP" + noise[:60], "^damaged image: its header cannot be read$"),
        "gif": (gif.getvalue(), "animated image: GIF; make a video of it"),
        "animated png": (apng.getvalue(), "animated image: 3 frames"),
        "animated webp": (webp.getvalue(), "animated image: 3 frames"),
    }


def test_damaged_media_are_left_out_with_a_reason(numbered: Any) -> None:
    for name, (data, reason) in damaged_media(numbered).items():
        with pytest.raises(DecodeError, match=reason) as caught:
            inspect_media(data)
        assert len(str(caught.value)) < 250, name
        assert str(caught.value).isprintable(), name


def test_pictures_too_large_to_hold_are_refused_before_they_are_decoded(
    numbered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ((30_000, 20_000), (7000, 6000)):  # more than Pillow's own limit, and less
        header = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        data += struct.pack(">I", 99) + b"IDAT" + bytes(99)
        with pytest.raises(DecodeError, match="picture too large"):
            inspect_media(data)
    monkeypatch.setattr(decode_common, "MAX_PIXELS", 1000)
    with pytest.raises(DecodeError, match=r"^frames too large: 96x64 pixels are more than 8K$"):
        inspect_media(numbered.encode([0, 40]))


def test_content_decides_and_only_usual_containers_are_indexed(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"...." + (data := encode(container="avi", codec="mpeg4")))
    read: Callable[..., Any] = inspect_range
    with pytest.raises(DecodeError, match=r"unsupported container: avi \(allowed are mp4, matroska, image\)"):
        read(str(tmp_path / "shard"), 4, len(data), containers=["mp4", "matroska", "image"])
    assert read(str(tmp_path / "shard"), 4, len(data))[0]["frames"] == 16
    assert "container" not in read(str(tmp_path / "shard"), 4, len(data))[0]


def test_quality_tells_dark_from_bright_blurred_from_sharp_and_still_from_moving() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(noise).resize((12, 8)).resize((96, 64)))
    still = np.stack([noise] * 4)
    moving = np.stack([np.roll(noise, 9 * n, axis=1) for n in range(4)])
    assert measure_quality(np.full((2, 8, 8, 3), 30, np.uint8)).luma == pytest.approx(30)
    assert measure_quality(np.full((2, 8, 8, 3), 30, np.uint8)).sharpness == 0
    assert measure_quality(still).sharpness > 50 * measure_quality(blurred[None]).sharpness
    assert measure_quality(still).motion == 0
    assert measure_quality(moving).motion > 30
    assert measure_quality(noise[None]).motion == 0  # an image
    steps = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (10, 20, 40)])
    assert measure_quality(steps).motion == pytest.approx(15)
    # Laplacian of one white pixel on black: -4 there, 1 at its four neighbours, 0 at the other 20 of the 5x5 inside.
    dot = np.zeros((1, 7, 7, 3), np.uint8)
    dot[0, 3, 3] = 1
    assert measure_quality(dot).sharpness == pytest.approx(20 / 25)


def test_quality_is_measured_within_the_clip(tmp_path: Path) -> None:
    assert sample_times(10.0, frame_seconds=0.04) == pytest.approx([3.23 + 0.5 * i for i in range(8)])
    assert sample_times(0.04, frame_seconds=0.04) == [0.0]
    assert sample_times(0.12, frame_seconds=0.04) == pytest.approx([0.0, 0.04, 0.08])
    for data in (encode(frames=1), encode(frames=2), encode(frames=40), picture("PNG")):
        (tmp_path / "file").write_bytes(data)
        found, _ = inspect_range(str(tmp_path / "file"), 0, len(data), quality=True)
        assert 0 <= found["luma"] <= 255
        assert found["motion"] >= 0
    assert inspect_range(str(tmp_path / "file"), 0, len(data), quality=True)[0]["luma"] == pytest.approx(127.5, abs=1)


def test_packets_tell_what_decoding_does(numbered: Any) -> None:
    open_gop = {"x265-params": "keyint=8:min-keyint=8:bframes=3:open-gop=1:log-level=none"}
    variable = [0, 100, 300, 400, 700, 1200, 1500]
    files = {
        "constant": numbered.encode([40 * i for i in range(50)], options={"bf": "3", "g": "8"}),
        "variable": numbered.encode(variable),
        "variable in matroska": numbered.encode(variable, container="matroska"),
        "open groups": numbered.encode([40 * i for i in range(40)], codec="libx265", options=open_gop),
        "vp9": encode(container="webm", codec="libvpx-vp9"),
        "av1": numbered.encode(SIXTEEN, codec="libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"}),
        "ten bits": encode(pixel_format="yuv420p10le"),
        "with sound": encode(audio=True),
        "one frame": encode(frames=1),
    }
    plain = files["constant"]
    matrix = plain.index(b"tkhd") + 4 + 40
    turn = b"".join(v.to_bytes(4, "big", signed=True) for v in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
    files["rotated"] = plain[:matrix] + turn + plain[matrix + 36 :]
    for name, data in files.items():
        assert inspect_media(data, decode=False) == inspect_media(data), name
    assert not inspect_media(files["open groups"], decode=False).seekable


def test_packets_tell_of_cut_files(numbered: Any) -> None:
    for name, (data, _) in damaged_media(numbered).items():
        if name not in ("bit rot", "noise"):
            with pytest.raises(DecodeError, match=r"not a readable|damaged|empty|no video stream|animated"):
                inspect_media(data, decode=False)
    fast = numbered.encode([40 * i for i in range(50)], header_first=True)
    cuts = [*range(fast.index(b"mdat") + 4, len(fast) - 1, 97), between_frames(fast)]
    for cut in cuts:
        for whole in (True, False):
            with pytest.raises(
                DecodeError, match=r"not a readable video file|no frames|damaged video data: .*(\(after \d+|it is cut)"
            ):
                inspect_media(fast[:cut], decode=whole)


def test_cut_matroska_files_are_noticed(numbered: Any) -> None:
    data = numbered.encode([40 * i for i in range(50)], container="matroska")
    for cut in range(len(data) // 2, len(data), 41):
        for whole in (True, False):
            with pytest.raises(DecodeError, match=rf"damaged video data: it is cut \(after {cut} bytes\)"):
                inspect_media(data[:cut], decode=whole)
    assert inspect_media(data).frames == 50
    segment = data.index(b"\x18S\x80g") + 4
    assert data[segment] == 1  # a size of 8 bytes
    streamed = data[:segment] + b"\x01" + b"\xff" * 7 + data[segment + 8 :]  # of unknown size, as a recorder leaves it
    assert inspect_media(streamed).frames == 50


def between_frames(data: bytes) -> int:
    """A place where a cut leaves whole frames only."""
    with av.open(io.BytesIO(data)) as container:
        return int(container.streams.video[0].index_entries[20].pos)
