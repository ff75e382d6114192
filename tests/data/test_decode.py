"""Frames come out upright and by their time, whichever decoder reads them; damage is an error and never a wrong clip."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muybridge.data import decode
from muybridge.data.decode import (
    DecodeError,
    Decoder,
    frame_times,
    has_decoder,
    probe,
    read_frames,
    read_frames_with_fallback,
)
from muybridge.data.mp4 import write_mp4

DECODERS = [
    pytest.param(d, marks=pytest.mark.skipif(not has_decoder(d), reason=f"{d.value} is not installed")) for d in Decoder
]
CONSTANT = [40 * i for i in range(50)]  # 25 fps
VARIABLE = [0, 40, 80, 500, 520, 540, 1000, 1900, 1940, 2500]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "mp4", {"g": "12", "bf": "2"}),
        ("libx264", "matroska", {"g": "12", "bf": "2"}),
        ("libx265", "mp4", {"x265-params": "keyint=8:min-keyint=8:bframes=3:open-gop=1:log-level=none"}),
        ("libvpx-vp9", "webm", {"g": "12"}),
    ],
)
def test_the_asked_frames_come_out(
    numbered: Any, decoder: Decoder, codec: str, container: str, options: dict[str, str]
) -> None:
    data = numbered.encode(CONSTANT, codec=codec, container=container, options=options)
    info = probe(data)
    assert (info.frames, info.fps_numerator, info.fps_denominator) == (50, 25, 1)
    assert info.duration_seconds == pytest.approx(2.0, abs=2e-3)
    for times, expected in [
        (frame_times(9, fps=25.0), list(range(9))),
        (frame_times(9, fps=12.5, start_seconds=0.4), list(range(10, 28, 2))),
        (
            frame_times(3, fps=1.0, start_seconds=0.0),
            [0, 25, 49],
        ),  # 2.0 s is the very end: the last frame is still shown
        (frame_times(5, fps=25.0, start_seconds=1.12), [28, 29, 30, 31, 32]),
        (frame_times(4, fps=50.0, start_seconds=1.5), [37, 38, 38, 39]),
    ]:
        if times[-1] > info.duration_seconds:
            continue
        assert numbered.read(read_frames(data, times, decoder=decoder, seekable=info.seekable)) == expected


def test_open_groups_of_pictures_are_found(numbered: Any) -> None:
    open_gop = "keyint=8:min-keyint=8:bframes=3:open-gop={}:log-level=none"
    times = CONSTANT[:40]
    assert not probe(numbered.encode(times, codec="libx265", options={"x265-params": open_gop.format(1)})).seekable
    assert probe(numbered.encode(times, codec="libx265", options={"x265-params": open_gop.format(0)})).seekable
    assert probe(numbered.encode(times, options={"g": "8", "bf": "3"})).seekable


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_frame_rate_is_sampled_by_time(numbered: Any, decoder: Decoder, container: str) -> None:
    data = numbered.encode(VARIABLE, container=container)
    times = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    shown = [max(i for i, start in enumerate(VARIABLE) if start <= 1000 * t) for t in times]
    assert numbered.read(read_frames(data, times, decoder=decoder)) == shown
    assert shown == [0, 2, 3, 5, 6, 6, 6, 6, 8]  # by index at the mean rate it would be 0, 1, 2, 3, ...


def test_variable_frame_rate_has_its_real_duration(numbered: Any) -> None:
    info = probe(numbered.encode(VARIABLE))
    assert info.frames == len(VARIABLE)
    assert info.duration_seconds == pytest.approx(2.5, abs=0.6)  # the last frame's own length is the encoder's guess
    assert info.fps_numerator / info.fps_denominator == pytest.approx(9 / 2.5, rel=0.01)


@pytest.mark.parametrize("decoder", DECODERS)
def test_rotation_is_applied(decoder: Decoder) -> None:
    upright = np.full((8, 64, 96, 3), 20, dtype=np.uint8)
    upright[:, :32, :48] = (230, 40, 40)  # red in the upper left
    file = io.BytesIO()
    write_mp4(file, upright, fps=8)
    data = rotate_mp4_clockwise(file.getvalue())
    info = probe(data)
    assert (info.width, info.height) == (64, 96)
    frame = read_frames(data, [0.0], decoder=decoder)[0].astype(int)
    assert frame.shape == (96, 64, 3)
    assert frame[20, 50, 0] > 180  # a clockwise quarter turn puts it in the upper right
    assert frame[20, 10, 0] < 60
    assert frame[80, 50, 0] < 60


def rotate_mp4_clockwise(data: bytes) -> bytes:
    """Sets the display matrix of the track header (ISO/IEC 14496-12, 8.3.2) to a quarter turn."""
    matrix = data.index(b"tkhd") + 4 + 40
    turn = b"".join(v.to_bytes(4, "big", signed=True) for v in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
    return data[:matrix] + turn + data[matrix + 36 :]


@pytest.mark.skipif(not has_decoder(Decoder.decord), reason="decord is not installed")
def test_decord_alone_is_enough(numbered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    open_gop = {"x265-params": "keyint=8:min-keyint=8:bframes=3:open-gop=1:log-level=none"}
    data = numbered.encode(CONSTANT, codec="libx265", options=open_gop)
    monkeypatch.setattr(decode, "has_decoder", lambda decoder: decoder is Decoder.decord)
    info = probe(data)
    assert (info.frames, info.fps_numerator, info.width, info.height) == (50, 25, 96, 64)
    assert not info.seekable  # decord does not tell, so the reader has to go front to back
    frames = read_frames(data, frame_times(5, fps=25.0, start_seconds=1.12), seekable=info.seekable)
    assert numbered.read(frames) == [28, 29, 30, 31, 32]
    with pytest.raises(DecodeError, match="decord cannot open it"):
        probe(data[: len(data) // 2])


def test_av1_is_read_by_the_other_decoder(numbered: Any) -> None:
    data = numbered.encode(CONSTANT[:20], codec="libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"})
    frames, used = read_frames_with_fallback(data, frame_times(5, fps=12.5), decoder=Decoder.decord)
    assert numbered.read(frames) == [0, 2, 4, 6, 8]
    if has_decoder(Decoder.decord):
        with pytest.raises(DecodeError, match="decord cannot open"):
            read_frames(data, [0.0], decoder=Decoder.decord)
        assert used is Decoder.pyav


def damaged_files(numbered: Any) -> dict[str, bytes]:
    good = numbered.encode(CONSTANT)
    noise = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    fast = numbered.encode(CONSTANT, header_first=True)
    return {
        "empty": b"",
        "text": b"<html><body>404 not found</body></html>" * 20,
        "noise": noise,
        "truncated": good[: len(good) // 2],
        "truncated behind its header": fast[: len(fast) * 6 // 10],
        "overwritten in the middle": good[: len(good) // 3] + noise[:1500] + good[len(good) // 3 + 1500 :],
    }


@pytest.mark.parametrize(
    "name", ["empty", "text", "noise", "truncated", "truncated behind its header", "overwritten in the middle"]
)
def test_damaged_files_are_decode_errors_with_a_short_reason(numbered: Any, name: str) -> None:
    with pytest.raises(DecodeError) as caught:
        probe(damaged_files(numbered)[name])
    assert 0 < len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


def test_a_clip_beyond_the_end_is_a_decode_error(numbered: Any) -> None:
    data = numbered.encode(CONSTANT)
    for decoder in Decoder:
        if has_decoder(decoder):
            with pytest.raises(DecodeError, match=r"too short: a frame at 2\.500 s"):
                read_frames(data, [1.5, 2.5], decoder=decoder)


def test_times_must_ascend() -> None:
    for times in ([], [1.0, 0.5], [-1.0]):
        with pytest.raises(ValueError, match="must be ascending"):
            read_frames(b"", times)


def test_the_best_of_several_video_streams_is_read(real_clips: Path) -> None:
    data = (real_clips / "nasa_13013.mp4").read_bytes()  # its second stream is larger
    info = probe(data)
    assert (info.width, info.height, info.frames) == (480, 270, 390)


@pytest.mark.skipif(not all(map(has_decoder, Decoder)), reason="needs both decoders")
@pytest.mark.parametrize(
    "name",
    ["hiker_tiny.mp4", "flipping_a_pancake.mkv", "h265_video.mp4", "rotate_0.mov", "rotate_90.mov", "nasa_13013.mp4"],
)
def test_both_decoders_return_the_same_pictures_of_real_clips(real_clips: Path, name: str) -> None:
    data = (real_clips / name).read_bytes()
    info = probe(data)
    length = info.duration_seconds - info.fps_denominator / info.fps_numerator
    rng = np.random.default_rng(0)
    for fps in (3.0, 8.0, 30.0):
        count = min(5, int(length * fps) + 1)
        start = rng.random() * (length - (count - 1) / fps)
        times = frame_times(count, fps=fps, start_seconds=start)
        with_decord = read_frames(data, times, decoder=Decoder.decord, seekable=info.seekable)
        with_pyav = read_frames(data, times, decoder=Decoder.pyav, seekable=info.seekable)
        assert np.array_equal(with_decord, with_pyav)
        assert with_decord.shape[1:] == (info.height, info.width, 3)


def test_a_damaged_real_clip_says_where(real_clips: Path) -> None:
    with pytest.raises(DecodeError, match=r"damaged video data: .*after 28 of 50 frames"):
        probe((real_clips / "corrupted.mp4").read_bytes())


def test_a_decode_bomb_is_refused(numbered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_MAX_PIXELS", 1000)
    with pytest.raises(DecodeError, match="frames of 96x64 pixels"):
        probe(numbered.encode(CONSTANT[:3]))


@pytest.mark.parametrize("target", ["file", "buffer"])
def test_written_mp4_reads_back(numbered: Any, tmp_path: Path, target: str) -> None:
    frames = np.stack([numbered.frame(i) for i in range(10)])
    if target == "file":
        write_mp4(tmp_path / "new" / "clip.mp4", frames, fps=12.5)
        data = (tmp_path / "new" / "clip.mp4").read_bytes()
    else:
        file = io.BytesIO()
        write_mp4(file, frames, fps=12.5)
        data = file.getvalue()
    info = probe(data)
    assert (info.frames, info.fps_numerator / info.fps_denominator) == (10, 12.5)
    back = read_frames(data, frame_times(10, fps=12.5))
    assert numbered.read(back) == list(range(10))
    assert np.square(back.astype(float) - frames).mean() < 255**2 / 10**3.5  # 35 dB


def test_frames_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even height and width"):
        write_mp4(tmp_path / "a.mp4", np.zeros((2, 63, 64, 3), np.uint8), fps=8)
    with pytest.raises(ValueError, match="must be uint8"):
        write_mp4(tmp_path / "a.mp4", np.zeros((2, 64, 64, 3), np.float32), fps=8)
    with pytest.raises(ValueError, match="fps=0 must be positive"):
        write_mp4(tmp_path / "a.mp4", np.zeros((2, 64, 64, 3), np.uint8), fps=0)


@pytest.mark.skipif(not all(map(has_decoder, Decoder)), reason="needs both decoders")
def test_reading_with_decord_leaves_pyav_able_to_write_vp9() -> None:
    program = (
        "import io\n"
        "from muybridge.data.decode import DecodeError, Decoder, read_frames\n"
        "import numpy\n"
        "try: read_frames(b'no video', [0.0], decoder=Decoder.decord)\n"
        "except DecodeError: pass\n"
        "import av\n"
        "with av.open(io.BytesIO(), 'w', format='webm') as file:\n"
        "    stream = file.add_stream('libvpx-vp9', rate=8)\n"
        "    stream.width = stream.height = 64\n"
        "    file.mux(stream.encode(av.VideoFrame.from_ndarray(numpy.zeros((64, 64, 3), numpy.uint8), format='rgb24')))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
