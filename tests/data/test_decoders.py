"""One conformance suite for every installed decoder: the same frames and colours of a file, or a refusal of a known kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
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
from muybridge.data.media_info import inspect_media
from muybridge.data.scenes import cut_scenes
from muybridge.data.tar_samples import reason_class
from muybridge.tests.data import video_files
from muybridge.tests.data.video_files import encode, plain, read_numbers, remux, turned

av = pytest.importorskip("av", reason="PyAV writes the test videos")

DECODERS = [
    pytest.param(d, marks=pytest.mark.skipif(not has_decoder(d), reason=f"{d.value} is not installed")) for d in Decoder
]
VARIABLE = [0, 40, 80, 500, 520, 540, 1000, 1900, 1940, 2500, 2540, 2580]
LEFT = {Decoder.decord: "left to PyAV", Decoder.torchcodec: "left to PyAV"}


@dataclass
class Case:
    """A file with numbered frames, what is to be seen in it, and who may refuse it for what kind of reason."""

    make: Callable[[], bytes]
    first: int = 0  # number of the first frame that can be seen
    frames: int = 50
    size: tuple[int, int] = (96, 64)  # width and height as shown
    starts_ms: list[int] | None = None  # of the frames; 25 fps where None
    refused: dict[Decoder, str] = field(default_factory=dict)
    turn: int = 0  # quarter turns counter-clockwise that make the number readable again

    def start(self, frame: int) -> float:
        """Seconds from the first frame that can be seen."""
        return (self.starts_ms[frame] if self.starts_ms else 40 * frame) / 1000


@cache
def open_265() -> bytes:
    return encode(codec="libx265", options=video_files.OPEN_GOP_265)


AV1 = {"preset": "12", "svtav1-params": "lp=1"}
VP9: dict[str, Any] = {"codec": "libvpx-vp9", "container": "webm", "options": {"g": "12", "deadline": "realtime"}}
CASES: dict[str, Case] = {
    "h264": Case(plain),
    "h264 in matroska": Case(lambda: remux(plain(), container="matroska")),
    "h264 in fragments": Case(lambda: remux(plain(), layout={"movflags": "frag_keyframe+empty_moov"})),
    "header first": Case(lambda: encode(layout={"movflags": "faststart"})),
    "hevc": Case(lambda: encode(codec="libx265", options={"x265-params": "keyint=10:open-gop=0:log-level=none"})),
    "vp8": Case(lambda: encode(codec="libvpx", container="webm", options={"g": "12", "deadline": "realtime"})),
    "vp9": Case(lambda: encode(**VP9)),
    "av1": Case(lambda: encode(codec="libsvtav1", options=AV1), refused={Decoder.decord: "decord cannot open it"}),
    "one frame": Case(lambda: encode(1), frames=1),
    "variable rate": Case(lambda: encode(12, times_ms=VARIABLE), frames=12, starts_ms=VARIABLE),
    "variable rate in matroska": Case(
        lambda: encode(12, times_ms=VARIABLE, container="matroska"), frames=12, starts_ms=VARIABLE
    ),
    "open groups in h264": Case(lambda: encode(options=video_files.OPEN_GOP_264), refused=LEFT),
    "open groups in hevc": Case(open_265, refused=LEFT),
    "frames before the first keyframe": Case(
        lambda: remux(open_265(), from_keyframe=2), first=10, frames=40, refused=LEFT
    ),
    "frames before the first keyframe in matroska": Case(
        lambda: remux(open_265(), from_keyframe=2, container="matroska"), first=10, frames=40, refused=LEFT
    ),
    "no keyframe at the start": Case(lambda: remux(plain(), from_packet=4), first=10, frames=40, refused=LEFT),
    "no keyframe at the start of matroska": Case(
        lambda: remux(plain(), from_packet=4, container="matroska"), first=10, frames=40, refused=LEFT
    ),
    "start hidden by an edit list": Case(lambda: remux(plain(), earlier_ms=200), first=5, frames=45, refused=LEFT),
    "late start": Case(lambda: remux(plain(), earlier_ms=-5000)),
    "late start in matroska": Case(lambda: remux(plain(), earlier_ms=-5000, container="matroska")),
    "no duration": Case(
        lambda: remux(plain(), container="matroska", layout={"live": "1"}),
        refused={Decoder.decord: "decord cannot open it"},
    ),
    "two streams": Case(video_files.two_streams, refused=LEFT),
    "ten bits": Case(
        lambda: encode(pixel_format="yuv420p10le"), refused={Decoder.torchcodec: "torchcodec cannot decode it"}
    ),
    "colour at full resolution": Case(lambda: encode(pixel_format="yuv444p")),
    "grey": Case(lambda: encode(pixel_format="gray")),
    "transparent": Case(lambda: encode(codec="qtrle", container="mov", pixel_format="argb")),
    "odd size": Case(lambda: encode(**VP9, size=(97, 65)), size=(97, 65)),
    "odd size in h264": Case(lambda: encode(pixel_format="yuv444p", size=(97, 65)), size=(97, 65)),
    "wide pixels": Case(lambda: encode(sample_aspect_ratio=Fraction(4, 3)), size=(128, 64), refused=LEFT),
    "narrow pixels in matroska": Case(
        lambda: encode(sample_aspect_ratio=Fraction(8, 9), container="matroska"), size=(85, 64), refused=LEFT
    ),
    "wide pixels, turned": Case(
        lambda: turned(encode(sample_aspect_ratio=Fraction(4, 3)), 90), size=(64, 128), turn=1, refused=LEFT
    ),
    "turned by 0": Case(lambda: turned(plain(), 0)),
    "turned by 90": Case(lambda: turned(plain(), 90), size=(64, 96), turn=1),
    "turned by 180": Case(lambda: turned(plain(), 180), turn=2),
    "turned by 270": Case(lambda: turned(plain(), 270), size=(64, 96), turn=3),
}


@cache
def made(name: str) -> bytes:
    """The bytes of a case."""
    return CASES[name].make()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", list(CASES))
def test_the_asked_frames_come_out_or_the_file_is_refused(name: str, decoder: Decoder) -> None:
    case, data = CASES[name], made(name)
    info = probe(data)
    assert (info.frames, info.width, info.height) == (case.frames, *case.size)
    count = case.frames
    asked = [list(range(min(5, count))), list(range(0, count, 3)), list(range(max(0, count - 4), count))]
    asked += [[n for n in (28, 28, 29, 31, 37) if n < count] or [0]]
    if reason := case.refused.get(decoder):
        with pytest.raises(DecodeError) as caught:
            read_frames(data, [0.0], decoder=decoder, seekable=info.seekable)
        assert reason_class(str(caught.value)) == reason
    for numbers in asked:
        times = [case.start(n) + 0.005 for n in numbers]
        if case.refused.get(decoder):
            frames, used = read_frames_with_fallback(data, times, decoder=decoder, seekable=info.seekable)
            assert used is Decoder.pyav
        else:
            frames = read_frames(data, times, decoder=decoder, seekable=info.seekable)
        assert frames.dtype == np.uint8
        assert frames.shape == (len(times), info.height, info.width, 3)
        assert read_numbers(np.rot90(frames, case.turn, axes=(1, 2))) == [case.first + n for n in numbers]


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.values[0] is not Decoder.pyav])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused == LEFT])
def test_without_pyav_unusual_files_are_read_front_to_back_or_refused(
    name: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, data = CASES[name], made(name)
    if decoder is Decoder.decord and ("pixels" in name or "streams" in name):
        pytest.skip("decord does not tell the shape of pixels, nor that there are several streams")
    monkeypatch.setattr(decode, "has_decoder", lambda other: other is decoder)
    numbers = [0, 1, 2, 18, 31, 37]
    is_refused = "start" in name or "before" in name
    try:
        frames = read_frames(data, [case.start(n) + 0.005 for n in numbers], decoder=decoder, seekable=False)
    except DecodeError:
        if not is_refused:
            raise
        return
    assert read_numbers(np.rot90(frames, case.turn, axes=(1, 2))) == [case.first + n for n in numbers]
    assert frames.shape[1:3] == case.size[::-1]


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_repeated_or_left_out_by_their_time(decoder: Decoder) -> None:
    assert read_numbers(read_frames(plain(), frame_times(4, fps=50.0, start_seconds=1.5), decoder=decoder)) == [
        37,
        38,
        38,
        39,
    ]
    assert read_numbers(read_frames(plain(), frame_times(4, fps=10.0), decoder=decoder)) == [0, 2, 5, 7]
    uneven = read_frames(made("variable rate"), frame_times(9, fps=4.0), decoder=decoder)
    assert read_numbers(uneven) == [0, 2, 3, 5, 6, 6, 6, 6, 8]  # by index at the mean rate it would be 0, 1, 2, 3, ...
    assert read_numbers(read_frames(plain(), [1.95, 2.0], decoder=decoder)) == [48, 49]  # 2.0 s is the very end
    with pytest.raises(
        DecodeError, match=r"^too short: a frame at 2\.500 s is asked for, the video ends at (2\.000|1\.999) s$"
    ):
        read_frames(plain(), [1.5, 2.5], decoder=decoder)


@pytest.mark.parametrize("name", list(CASES))
def test_packets_tell_what_decoding_does(name: str) -> None:
    case, data = CASES[name], made(name)
    if ("keyframe" in name and "matroska" in name) or name.startswith("no keyframe"):
        # Only who decodes them knows that the first frames cannot be; that no keyframe is at the start is known.
        assert not inspect_media(data, decode=False).seekable
        return
    assert inspect_media(data, decode=False) == inspect_media(data)
    assert inspect_media(data).frames == case.frames


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("name", "is_usual"),
    [
        ("hiker_tiny.mp4", True),
        ("flipping_a_pancake.mkv", True),
        ("rotate_0.mov", True),
        ("rotate_90.mov", True),
        ("h264_10bits.mp4", True),
        ("h265_video.mp4", False),  # open groups of pictures
        ("nasa_13013.mp4", False),  # a second, larger stream
    ],
)
def test_all_decoders_return_the_same_pictures_of_real_clips(
    real_clips: Path, name: str, is_usual: bool, decoder: Decoder
) -> None:
    data = (real_clips / name).read_bytes()
    info = probe(data)
    assert info.seekable == is_usual
    length = info.duration_seconds - info.fps_denominator / info.fps_numerator
    rng = np.random.default_rng(0)
    for fps in (3.0, 8.0, 30.0):
        count = min(5, int(length * fps) + 1)
        times = frame_times(count, fps=fps, start_seconds=rng.random() * (length - (count - 1) / fps))
        expected = read_frames(data, times, decoder=Decoder.pyav, seekable=info.seekable)
        assert expected.shape == (count, info.height, info.width, 3)
        frames, used = read_frames_with_fallback(data, times, decoder=decoder, seekable=info.seekable)
        assert (used is decoder) == (
            decoder is Decoder.pyav or (is_usual and (decoder is Decoder.decord or "10bits" not in name))
        )
        difference = np.abs(frames.astype(int) - expected)
        # FFmpeg's versions round differently, and smooth the half resolution of 10-bit colours differently at its edges.
        assert difference.mean() < 4 if "10bits" in name else difference.max() <= 2


def test_scenes_are_cut_as_they_are_shown(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(made("wide pixels, turned"))
    [file] = cut_scenes(tmp_path / "in", [0.0], tmp_path)
    info = probe(file.read_bytes())
    assert (info.frames, info.width, info.height) == (50, 64, 128)
    frames = read_frames(file.read_bytes(), [0.01, 1.81])
    assert read_numbers(np.rot90(frames, 1, axes=(1, 2))) == [0, 45]


PATCHES = [(230, 40, 40), (40, 200, 60), (30, 50, 220), (128, 128, 128), (250, 250, 250), (5, 5, 5)]
# Weights of red and blue in the brightness: BT.709, BT.601 (as 5 and 6) and BT.2020; FFmpeg takes BT.601 where none is told.
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593), 2: (0.299, 0.114)}


def patches(matrix: int, *, is_full: bool, pixel_format: str) -> bytes:
    """A video of coloured stripes, of 16 columns each, converted to the given colour space here."""
    picture: np.ndarray = (
        np.repeat(np.array(PATCHES, dtype=np.float64), 16, axis=0)[None].repeat(64, axis=0) / 255
    )  # [H, W, 3]
    red, blue = MATRICES[matrix]
    luma = picture @ (red, 1 - red - blue, blue)
    planes = [luma, (picture[..., 2] - luma) / (2 * (1 - blue)), (picture[..., 0] - luma) / (2 * (1 - red))]
    step = 4 if "10" in pixel_format else 1
    levels = []
    for plane, (offset, limited) in zip(planes, ((16, 219), (128, 224), (128, 224))):
        full_offset = 0 if offset == 16 else 128 * step
        scaled = full_offset + plane * (256 * step - 1) if is_full else (offset + plane * limited) * step
        levels.append(np.clip(np.round(scaled), 0, 256 * step - 1).astype(np.uint16 if step == 4 else np.uint8))
    if "420" in pixel_format:
        levels[1:] = [plane[::2, ::2] for plane in levels[1:]]
    frames = []
    for _ in range(3):
        frame = av.VideoFrame(96, 64, pixel_format)
        frame.colorspace, frame.color_range = matrix, 2 if is_full else 1
        for target, level in zip(frame.planes, levels):
            rows = np.zeros((target.height, target.line_size), np.uint8)
            content = np.ascontiguousarray(level).view(np.uint8)
            rows[:, : content.shape[1]] = content
            target.update(rows.tobytes())
        frames.append(frame)
    return encode(
        frames, pixel_format=pixel_format, options={"crf": "1"}, colorspace=matrix, color_range=2 if is_full else 1
    )


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("is_full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", list(MATRICES))
def test_colours_are_those_of_the_source(decoder: Decoder, pixel_format: str, is_full: bool, matrix: int) -> None:
    data = patches(matrix, is_full=is_full, pixel_format=pixel_format)
    if decoder is Decoder.torchcodec and "10" in pixel_format:
        with pytest.raises(
            DecodeError, match=r"^torchcodec cannot decode it: the range of yuv420p10le is not certain$"
        ):
            read_frames(data, [0.0], decoder=decoder)
        return
    [frame] = read_frames(data, [0.04], decoder=decoder)
    for number, colour in enumerate(PATCHES):
        found = frame[8:-8, 16 * number + 5 : 16 * number + 11].astype(int)
        assert np.abs(found - colour).max() <= 3, colour
