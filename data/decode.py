"""Encoded video bytes to frames: decord by default, PyAV where decord cannot read a file, torchcodec where it is asked for.

Frames are asked for by time, so a variable frame rate needs no special case, and all decoders return the same frames.
Call this from a worker process (`data/workers.py`) where the bytes are not known to be good: decord can crash on damaged streams.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum

import numpy as np

from . import decode_decord, decode_pyav, decode_torchcodec
from .decode_common import TIME_TOLERANCE_SECONDS, DecodeError, VideoInfo

__all__ = [
    "DecodeError",
    "Decoder",
    "VideoInfo",
    "available_decoder",
    "decoder_fault",
    "frame_times",
    "has_decoder",
    "probe",
    "read_frames",
    "read_frames_with_fallback",
]


class Decoder(StrEnum):
    """The library that decodes video."""

    decord = "decord"
    pyav = "pyav"
    torchcodec = "torchcodec"


def has_decoder(decoder: Decoder) -> bool:
    """Whether the library is installed; for torchcodec, which needs others, whether it loads (and loads it)."""
    if decoder is Decoder.torchcodec:
        return decode_torchcodec.load_fault() is None
    return importlib.util.find_spec({Decoder.decord: "decord", Decoder.pyav: "av"}[decoder]) is not None


def available_decoder() -> Decoder:
    """decord where it is installed, else PyAV."""
    return Decoder.decord if has_decoder(Decoder.decord) else Decoder.pyav


def decoder_fault(decoder: Decoder, *, field: str) -> str | None:
    """A complete message if this decoder cannot be asked for here; decord and PyAV stand in for each other."""
    if decoder is not Decoder.torchcodec or (fault := decode_torchcodec.load_fault()) is None:
        return None
    return (
        f"{field}=torchcodec {fault}: pip install 'muybridge[torchcodec]' (its version must fit torch's) and FFmpeg's libraries "
        "(apt-get install ffmpeg), or choose decord or pyav"
    )


def frame_times(count: int, *, fps: float, start_seconds: float = 0.0) -> list[float]:
    """Times of `count` frames at `fps`, in seconds from the first frame."""
    return [start_seconds + i / fps for i in range(count)]


def probe(data: bytes) -> VideoInfo:
    """Decodes every frame once with PyAV and with decord. Raises DecodeError.

    PyAV has the last word where it is installed, since it reads more formats and notices more damage; without it interlaced video,
    several streams and pixels that are not square go unnoticed. decord then reads the file too, so that a stream that crashes it
    does so here and not in training.
    """
    if not has_decoder(Decoder.pyav):
        return decode_decord.probe(data)[0]
    info, starts = decode_pyav.probe(data)
    if info.seekable and has_decoder(Decoder.decord):
        with suppress(DecodeError):  # the loader reads such a clip with PyAV, and counts it
            other, other_starts = decode_decord.probe(data)
            if (other.frames, other.width, other.height) != (info.frames, info.width, info.height) or not np.allclose(
                starts, other_starts, rtol=0, atol=2 * TIME_TOLERANCE_SECONDS
            ):
                info = replace(info, seekable=False)
    return info


def read_frames(
    data: bytes, times_seconds: Sequence[float], *, decoder: Decoder = Decoder.decord, seekable: bool = True
) -> np.ndarray:
    """The frames shown at the given ascending times after the first frame: uint8 [T, H, W, 3]. Raises DecodeError.

    They are upright and their pixels square, so of the size that `probe` tells; see `decode_pyav` for their colours. `seekable` is
    `VideoInfo.seekable`: without it only PyAV is certain to be exact, and the others refuse the file where PyAV is installed.
    """
    if not times_seconds or list(times_seconds) != sorted(times_seconds) or times_seconds[0] < 0:
        raise ValueError(f"times_seconds={list(times_seconds)} must be ascending, not negative and not empty")
    if decoder is Decoder.pyav:
        return decode_pyav.read(data, times_seconds, seekable=seekable)
    if not seekable and has_decoder(Decoder.pyav):
        raise DecodeError(f"left to PyAV: {decoder.value} may return other frames of this kind of file")
    if decoder is Decoder.torchcodec:
        return decode_torchcodec.read(data, times_seconds)
    return decode_decord.read(data, times_seconds, seekable=seekable)


def read_frames_with_fallback(
    data: bytes, times_seconds: Sequence[float], *, decoder: Decoder, seekable: bool = True
) -> tuple[np.ndarray, Decoder]:
    """`read_frames` with `decoder`, else with PyAV or decord; also says which one it was.

    torchcodec is no fallback: it reads nothing that PyAV does not, and would load torch in every decoding process.
    """
    others = [other for other in (Decoder.pyav, Decoder.decord) if other is not decoder and has_decoder(other)]
    errors: dict[Decoder, DecodeError] = {}
    for one in (decoder, *others):
        try:
            return read_frames(data, times_seconds, decoder=one, seekable=seekable), one
        except DecodeError as error:
            errors[one] = error
    raise errors.get(Decoder.pyav, errors[decoder])  # PyAV's reasons say the most
