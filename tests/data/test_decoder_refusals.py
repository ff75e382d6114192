"""What no decoder can use is refused with a reason of a known class; frames are never made up."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

from muybridge.data import decode_common
from muybridge.data.decode import DecodeError, Decoder, frame_times, has_decoder, probe, read_frames
from muybridge.data.decode_common import frame_rate
from muybridge.data.media_info import inspect_media
from muybridge.data.tar_samples import reason_class
from muybridge.tests.data import video_files
from muybridge.tests.data.video_files import encode, plain, read_numbers, remux

DECODERS = [
    pytest.param(d, marks=pytest.mark.skipif(not has_decoder(d), reason=f"{d.value} is not installed")) for d in Decoder
]
NOISE = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()


@cache
def header_first() -> bytes:
    return encode(layout={"movflags": "faststart"})


# Files that no decoder takes: what makes them, and the class of the reason.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "the file is empty"),
    "a page": (lambda: b"<html><body>404 not found</body></html>" * 20, "not a readable video file"),
    "noise": (lambda: NOISE, "not a readable video file"),
    "cut before its header": (lambda: plain()[: len(plain()) // 2], "not a readable video file"),
    "cut behind its header": (lambda: header_first()[: len(header_first()) * 6 // 10], "damaged video data"),
    "overwritten": (lambda: overwritten(plain()), "damaged video data"),
    "sound only": (video_files.sound_only, "no video stream"),
}
# Files that decoders would read, one way or another, and that the index leaves out.
LEFT_OUT: dict[str, tuple[Callable[[], bytes], str]] = {
    "interlaced": (lambda: encode(options={"x264-params": "tff=1"}), "interlaced video"),
    "growing": (video_files.growing, "frame size changes"),
    "frames of no length": (lambda: video_files.with_frame_times(plain(), 0), "timestamps go backwards"),
    "frames of negative length": (
        lambda: video_files.with_frame_times(encode(10, options={"bf": "0"}), -512),
        "no frame rate",
    ),
    "frames of one tick": (lambda: video_files.with_frame_times(encode(10, options={"bf": "0"}), 1), "no frame rate"),
    "very wide pixels": (lambda: encode(2, sample_aspect_ratio=Fraction(50, 1)), "pixel aspect ratio"),
    "a day long": (lambda: encode(2, times_ms=[0, 86_400_000]), "too long"),
}
# Only decoding tells that frames are damaged or their size changes, and packets have no order to go back in.
ONLY_DECODING_TELLS = ("overwritten", "growing", "frames of no length")


def overwritten(data: bytes) -> bytes:
    third = len(data) // 3
    return data[:third] + NOISE[:300] + data[third + 300 :]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", list(REFUSED))
def test_no_decoder_makes_frames_of_a_broken_file(name: str, decoder: Decoder) -> None:
    make, reason = REFUSED[name]
    data = make()
    with pytest.raises(DecodeError) as caught:
        probe(data)
    assert reason_class(str(caught.value)) == reason
    kinds = {reason, "decord cannot open it", "torchcodec cannot open it", f"{decoder.value} cannot decode it"}
    with pytest.raises(DecodeError) as caught:
        read_frames(data, frame_times(50, fps=25.0), decoder=decoder)
    assert reason_class(str(caught.value)) in kinds
    assert 0 < len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [*REFUSED, *LEFT_OUT])
def test_the_index_says_why_it_leaves_a_file_out(name: str) -> None:
    make, reason = (REFUSED | LEFT_OUT)[name]
    data = make()
    for decode in (True, False):
        if decode or name not in ONLY_DECODING_TELLS:
            with pytest.raises(DecodeError) as caught:
                inspect_media(data, decode=decode)
            assert reason_class(str(caught.value)) == reason


def test_frames_that_the_decoder_painted_over_are_damage() -> None:
    data = encode(options={"g": "50", "bf": "0"}, pixel_format="yuv420p", size=(192, 128))
    start, end = data.index(b"mdat") + 8, data.index(b"moov")
    rng = np.random.default_rng(0)
    reasons = []
    for place in rng.integers(start + (end - start) // 2, end - 8, size=20):
        flipped = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
        try:
            probe(flipped)
        except DecodeError as error:
            reasons.append(reason_class(str(error)))
    assert set(reasons) == {"damaged video data"}
    assert len(reasons) >= 10  # of 20; the others are wrong pictures without a sign, which only a checksum tells


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_cut_file_gives_its_first_frames_or_none(decoder: Decoder) -> None:
    """Never others in their place, nor blank ones."""
    whole = header_first()
    for share in (4, 6, 8):
        for first in (0, 20, 40):
            try:
                frames = read_frames(
                    whole[: len(whole) * share // 10],
                    frame_times(5, fps=25.0, start_seconds=0.04 * first),
                    decoder=decoder,
                )
            except DecodeError:
                continue
            assert read_numbers(frames) == list(range(first, first + 5))


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_common, "MAX_PIXELS", 1000)
    for decode in (True, False):
        with pytest.raises(DecodeError, match=r"^frames too large: 96x64 pixels are more than 8K$"):
            inspect_media(plain(), decode=decode)
    monkeypatch.undo()
    monkeypatch.setattr(decode_common, "MAX_FRAMES", 40)
    for decode in (True, False):
        with pytest.raises(DecodeError, match=r"^too many frames: more than 40"):
            inspect_media(plain(), decode=decode)


def test_the_rate_is_measured_where_the_header_has_none() -> None:
    even = [0.04 * n for n in range(10)]
    for claimed in (None, Fraction(0), Fraction(-25), Fraction(90_000)):
        assert frame_rate(claimed, even) == 25
        assert frame_rate(claimed, [0.0]) == 1
    assert frame_rate(Fraction(30_000, 1001), [n * 1001 / 30_000 for n in range(10)]) == Fraction(30_000, 1001)
    assert frame_rate(Fraction(60), even) == 25
    assert frame_rate(None, [0.0, 5000.0]) == Fraction(1, 5000)
    for starts in ([0.0, 0.0], [0.0, 1e-5]):
        with pytest.raises(DecodeError, match=r"^no frame rate: "):
            frame_rate(Fraction(25), starts)


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.values[0] is not Decoder.decord])  # which may crash
def test_damage_anywhere_ends_in_a_reason(decoder: Decoder) -> None:
    rng = np.random.default_rng(1)
    late = frame_times(3, fps=10.0, start_seconds=1.1)  # worth a seek
    reasons = set()
    for whole in (plain(), remux(plain(), container="matroska")):
        for _ in range(120):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), size=rng.integers(1, 6)):
                data[place] = rng.integers(256)
            start = max(0, data.find(b"moov"))
            for place in rng.integers(start, min(start + 700, len(data)), size=2):
                data[place] = rng.integers(256)
            try:
                assert len(read_frames(bytes(data), late, decoder=decoder)) == 3
            except DecodeError as error:
                reasons.add(reason_class(str(error)))
    assert "too short" in reasons
    assert len(reasons) > 2
