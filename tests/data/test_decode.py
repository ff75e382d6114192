"""Frames come out upright and by their time, whichever decoder reads them; damage is an error and never a wrong clip."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muybridge.data import decode, decode_decord, decode_pyav
from muybridge.data.decode import (
    DecodeError,
    Decoder,
    frame_times,
    has_decoder,
    probe,
    read_frames,
)
from muybridge.data.mp4 import write_mp4

CONSTANT = [40 * i for i in range(50)]  # 25 fps
VARIABLE = [0, 40, 80, 500, 520, 540, 1000, 1900, 1940, 2500]


def test_open_groups_of_pictures_are_found(numbered: Any) -> None:
    open_gop = "keyint=8:min-keyint=8:bframes=3:open-gop={}:log-level=none"
    times = CONSTANT[:40]
    assert not probe(numbered.encode(times, codec="libx265", options={"x265-params": open_gop.format(1)})).seekable
    assert probe(numbered.encode(times, codec="libx265", options={"x265-params": open_gop.format(0)})).seekable
    assert probe(numbered.encode(times, options={"g": "8", "bf": "3"})).seekable


def test_variable_frame_rate_has_its_real_duration(numbered: Any) -> None:
    info = probe(numbered.encode(VARIABLE))
    assert info.frames == len(VARIABLE)
    assert info.duration_seconds == pytest.approx(2.5, abs=0.6)  # the last frame's own length is the encoder's guess
    assert info.fps_numerator / info.fps_denominator == pytest.approx(9 / 2.5, rel=0.01)


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
    from muybridge.tests.data.video_files import encode, plain, remux  # needs PyAV, and some tests here do not

    late = encode(options={"g": "10", "bf": "0"})
    for cut in (
        remux(plain(), earlier_ms=200),
        remux(late, from_packet=4),
        remux(late, from_packet=4, container="matroska"),
    ):
        with pytest.raises(DecodeError, match="frames at its start are hidden or cannot be decoded"):
            probe(
                cut
            )  # it would count frames that it does not return, and so return others than those that are asked for


def test_times_must_ascend() -> None:
    for times in ([], [1.0, 0.5], [-1.0]):
        with pytest.raises(ValueError, match="must be ascending"):
            read_frames(b"", times)


@pytest.mark.skipif(not (has_decoder(Decoder.decord) and has_decoder(Decoder.pyav)), reason="needs both")
def test_a_file_that_decord_sees_otherwise_is_not_left_to_it(numbered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = numbered.encode(CONSTANT)
    info, starts = decode_decord.probe(data)
    for other in (
        (info, [start + 0.02 * (start > 1) for start in starts]),
        (replace(info, frames=51), [*starts, 2.0]),
        (replace(info, width=info.height, height=info.width), starts),
    ):
        assert probe(data).seekable
        with monkeypatch.context() as patch:
            patch.setattr(decode_decord, "probe", lambda data, other=other: other)
            assert probe(data) == replace(probe(data), seekable=False)
    monkeypatch.setattr(decode_pyav, "_packets", lambda data: (51, True))  # one of which gives no frame
    assert not probe(data).seekable


def test_who_stands_in_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Decoder] = []

    def read(data: bytes, times: list[float], *, decoder: Decoder, seekable: bool) -> np.ndarray:
        asked.append(decoder)
        raise DecodeError(f"{decoder.value} cannot")

    monkeypatch.setattr(decode, "read_frames", read)
    installed = set(Decoder)
    monkeypatch.setattr(decode, "has_decoder", lambda decoder: decoder in installed)
    for first, order in [
        (Decoder.decord, [Decoder.decord, Decoder.pyav]),
        (Decoder.pyav, [Decoder.pyav, Decoder.decord]),
        (Decoder.torchcodec, [Decoder.torchcodec, Decoder.pyav, Decoder.decord]),
    ]:
        with pytest.raises(DecodeError, match="pyav cannot"):
            decode.read_frames_with_fallback(b"", [0.0], decoder=first)
        assert asked == order
        asked.clear()
    installed.clear()
    with pytest.raises(DecodeError, match="torchcodec cannot"):
        decode.read_frames_with_fallback(b"", [0.0], decoder=Decoder.torchcodec)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "data.decoder=torchcodec is not installed (No module named 'torchcodec"),
        (
            "raise RuntimeError('Could not load libtorchcodec')",
            "is installed but does not load (Could not load libtorch",
        ),
    ],
)
def test_asking_for_a_torchcodec_that_is_not_there_is_one_message(
    content: str | None, expected: str, tmp_path: Path
) -> None:
    if content is None and has_decoder(Decoder.torchcodec):
        pytest.skip("torchcodec is installed")
    if content is not None:
        (tmp_path / "torchcodec").mkdir()
        (tmp_path / "torchcodec" / "__init__.py").write_text(content)
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from muybridge.data.decode import DecodeError, Decoder, decoder_fault, has_decoder, read_frames\n"
        "assert not has_decoder(Decoder.torchcodec)\n"
        "assert decoder_fault(Decoder.decord, field='data.decoder') is None\n"
        "try: read_frames(b'x', [0.0], decoder=Decoder.torchcodec)\n"
        "except DecodeError as error: assert str(error).startswith('torchcodec is'), error\n"
        "print(decoder_fault(Decoder.torchcodec, field='data.decoder'))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert expected in answer.stdout
    assert "pip install 'muybridge[torchcodec]'" in answer.stdout
    assert answer.stdout.count("\n") == 1


@pytest.mark.skipif(not has_decoder(Decoder.torchcodec), reason="torchcodec is not installed")
def test_torchcodec_is_loaded_for_those_only_who_ask_for_it() -> None:
    program = (
        "import sys\n"
        "from muybridge.data import worker\n"
        "from muybridge.data.decode import DecodeError, Decoder, decoder_fault, read_frames_with_fallback\n"
        "try: read_frames_with_fallback(b'x', [0.0], decoder=Decoder.decord)\n"
        "except DecodeError: pass\n"
        "assert 'torchcodec' not in sys.modules and 'torch' not in sys.modules\n"
        "assert decoder_fault(Decoder.torchcodec, field='data.decoder') is None\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_best_of_several_video_streams_is_read(real_clips: Path) -> None:
    data = (real_clips / "nasa_13013.mp4").read_bytes()  # its second stream is larger
    info = probe(data)
    assert (info.width, info.height, info.frames) == (480, 270, 390)


def test_a_damaged_real_clip_says_where(real_clips: Path) -> None:
    with pytest.raises(DecodeError, match=r"damaged video data: .*after 28 of 50 frames"):
        probe((real_clips / "corrupted.mp4").read_bytes())


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


@pytest.mark.skipif(not (has_decoder(Decoder.decord) and has_decoder(Decoder.pyav)), reason="needs both")
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
