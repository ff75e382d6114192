"""What every decoder keeps to: the answer of a probe, the limits, and the reasons why a file is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import Image

# A frame counts as shown this long before its timestamp: containers round timestamps (Matroska to 1 ms).
TIME_TOLERANCE_SECONDS = 1e-3
# A small file can claim anything. What is beyond these is no training clip, and would exhaust memory or time before it is one.
MAX_PIXELS = 36_000_000  # 8K
MAX_FRAMES = 1_000_000  # 4.6 hours at 60 fps
MAX_SECONDS = 6 * 3600.0
MAX_FPS = 1000
MAX_PIXEL_ASPECT = 4  # width to height of a pixel or the reverse; real ones stay below 2.2
# FFmpeg's names of the demuxers that may read a file, and what these files begin with. By content it knows hundreds more,
# playlists and session descriptions among them, which have it open other files, addresses and ports.
DEMUXERS = ("mov", "matroska", "webm", "avi", "asf", "flv", "mpeg", "mpegvideo", "mpegts")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"junk", b"uuid", b"udta")
_STARTS = (b"\x1aE\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11", b"FLV", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3")
_TS_PACKETS = ((0, 188), (4, 192))  # offset and length of MPEG-TS packets, without and with a time code


class DecodeError(Exception):
    """These bytes cannot be decoded, now or later; the text is the reason.

    What stands before its first colon or bracket is the same for all files of one kind of fault, and reports count by it.
    """


@dataclass(frozen=True)
class VideoInfo:
    """What decoding a whole file told about it."""

    frames: int
    fps_numerator: int  # average frame rate
    fps_denominator: int
    duration_seconds: float  # from the first frame's start to the last frame's end
    width: int  # pixels, upright and square
    height: int
    # Whether any decoder that reads the file finds the asked frames by seeking. False for open groups of pictures (common in
    # HEVC), for frames hidden by an edit list or undecodable at the start, for several video streams and for pixels that are not
    # square: decord is beside the asked frame there, or in another stream, without an error.
    seekable: bool


def check_container(data: bytes) -> None:
    """Raises DecodeError for bytes that do not begin as the video files do that are read, before a library looks at them."""
    if not data:
        raise DecodeError("the file is empty")
    is_transport_stream = any(data[at : at + 1] == data[at + size : at + size + 1] == b"G" for at, size in _TS_PACKETS)
    is_avi = data[:4] == b"RIFF" and data[8:12] == b"AVI "
    if not (data[4:8] in _MP4_BOXES or data.startswith(_STARTS) or is_avi or is_transport_stream):
        raise DecodeError(
            "not a readable video file: it does not begin as mp4, mov, mkv, webm, avi, wmv, flv or mpeg do"
        )


def display_size(width: int, height: int, *, pixel_aspect: Fraction | None, degrees: float) -> tuple[int, int]:
    """Width and height of a stored frame once its pixels are square and it is turned upright. Raises DecodeError.

    Wide pixels and narrow ones change the width, as players do it. `pixel_aspect` is None or 0 where the file tells none.
    """
    aspect = pixel_aspect or Fraction(1)
    if not Fraction(1, MAX_PIXEL_ASPECT) <= aspect <= MAX_PIXEL_ASPECT:
        raise DecodeError(f"pixel aspect ratio: {aspect.numerator}:{aspect.denominator} is no real one")
    square = round(width * aspect)
    if max(width, square) * height > MAX_PIXELS:
        raise DecodeError(f"frames too large: {square}x{height} pixels are more than 8K")
    return (height, square) if round(degrees / 90) % 2 else (square, height)


def with_size(frame: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """A frame uint8 [H, W, 3] at its display size; the frame itself where it has that."""
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BICUBIC))


def frame_rate(claimed: Fraction | None, starts: Sequence[float]) -> Fraction:
    """The average rate of frames that start at these ascending seconds. Raises DecodeError.

    The header's rate is exact where it agrees with the timestamps, and for variable rates it may be anything.
    """
    claimed = claimed if claimed and claimed > 0 else None
    if len(starts) < 2:
        return claimed if claimed and claimed <= MAX_FPS else Fraction(1)
    if starts[-1] <= starts[0]:
        raise DecodeError(f"no frame rate: all {len(starts)} frames have one time")
    measured = (len(starts) - 1) / (starts[-1] - starts[0])
    if measured > MAX_FPS:
        raise DecodeError(f"no frame rate: {measured:.0f} frames a second are no real one")
    if claimed and abs(float(claimed) / measured - 1) < 0.01:
        return claimed
    return Fraction(measured).limit_denominator(1001) or Fraction(measured).limit_denominator(10**6)


def check_count(frames: int) -> None:
    """Raises DecodeError for more frames than we take."""
    if frames > MAX_FRAMES:
        raise DecodeError(f"too many frames: more than {MAX_FRAMES}")


def check_duration(seconds: float) -> None:
    """Raises DecodeError for a longer video than we take."""
    if not seconds <= MAX_SECONDS:
        raise DecodeError(f"too long: {seconds:.0f} s are more than {MAX_SECONDS:.0f} s")


def check_end(last_time: float, duration: float) -> None:
    """Raises DecodeError if a time, in seconds from the first frame, is after the end of the video."""
    if last_time > duration + TIME_TOLERANCE_SECONDS:
        raise DecodeError(f"too short: a frame at {last_time:.3f} s is asked for, the video ends at {duration:.3f} s")


def short_reason(error: Exception) -> str:
    """A decoder's message in one line without its own place in some source file."""
    # decord's and torchcodec's messages may quote the file's whole content.
    text = str(error).split("Stack trace")[0]
    text = "".join(c if c.isprintable() else " " for c in text.rsplit("] ", 1)[-1])
    return " ".join(text.split())[:160]
