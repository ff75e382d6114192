"""Cutting a video at its scene changes: PySceneDetect says where, PyAV writes a file for each scene."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from .decode import DecodeError
from .decode_pyav import shown_pixels
from .images import is_image
from .media_info import inspect_media, inspect_range
from .storage import read_range

EXTRA = "scenedetect"  # the package on PyPI and its module


def check_scene_detection() -> None:
    """Raises ValueError if PySceneDetect is not installed."""
    if importlib.util.find_spec(EXTRA) is None:
        raise ValueError(
            f"--scene-split needs PySceneDetect, which is not installed: pip install '{EXTRA}[opencv-headless]'"
        )


def find_scenes(path: Path) -> list[float]:
    """The starts of a video's scenes, in seconds; the first is 0. Raises DecodeError."""
    from scenedetect import ContentDetector, detect

    try:
        scenes = detect(str(path), ContentDetector())
    except Exception as error:  # OpenCV's and its own errors
        raise DecodeError(f"scenes cannot be found: {' '.join(str(error).split())[:160]}") from error
    return [0.0] + [start.get_seconds() for start, _ in scenes[1:]]


def cut_scenes(path: Path, starts: list[float], folder: Path) -> list[Path]:
    """Writes each scene of a video as an H.264 mp4 into `folder`, frame by frame; timestamps, and so variable rates, are kept.

    8 bits a colour, upright, with square pixels; odd sizes lose a row or column. Raises DecodeError for a damaged video.
    """
    import av

    written: list[Path] = []
    output: Any = None
    stream: Any = None
    try:
        with av.open(str(path), mode="r") as source:
            video: Any = source.streams.best("video")
            video.thread_count = 1
            first = origin = None
            for frame in source.decode(video):
                if frame.pts is None:
                    raise DecodeError("a frame without timestamp")
                first = frame.pts if first is None else first
                seconds = float((frame.pts - first) * video.time_base)
                # Half a millisecond for rounding: a start is the time of a frame.
                if output is None or (len(written) < len(starts) and seconds >= starts[len(written)] - 5e-4):
                    _close(output, stream)
                    written.append(folder / f"{path.stem}-{len(written):04d}.mp4")
                    output = av.open(str(written[-1]), mode="w", format="mp4")
                    stream, origin = None, frame.pts
                pixels = shown_pixels(frame, video)
                if stream is None:
                    stream = _add_stream(output, pixels.shape, video)
                picture = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(pixels[: stream.height, : stream.width]), format="rgb24"
                )
                picture.pts, picture.time_base = frame.pts - origin, video.time_base
                output.mux(stream.encode(picture))
            _close(output, stream)
            output = None
    except av.FFmpegError as error:
        raise DecodeError(f"damaged video data: {' '.join(str(error).split())[:160]}") from error
    finally:
        if output is not None:
            output.close()
    return written


def inspect_scenes(
    name: str, offset: int, size: int, *, folder: str, quality: bool = False
) -> tuple[dict[str, Any], bytes]:
    """The operation of a decoding process: cuts a part of a file, a video, into files of one scene each in `folder`.

    Answers with a list of scenes, each with its file, its start in seconds and what `media_info.inspect_range` tells of it. An
    image is one scene. Raises DecodeError.
    """
    data = read_range(name, offset, size)
    target = Path(folder)
    copy = target / f"{crc32(data):08x}-{offset}"
    copy.write_bytes(data)
    if is_image(data):
        starts, files = [0.0], [copy]
    else:
        inspect_media(data)  # all of it, so that a damaged video is refused as a whole
        starts = find_scenes(copy)
        files = cut_scenes(copy, starts, target)
        copy.unlink()
    scenes = []
    for start, file in zip(starts, files):
        fields, _ = inspect_range(str(file), 0, file.stat().st_size, quality=quality)
        scenes.append({"file": str(file), "start_seconds": start, **fields})
    return {"scenes": scenes}, b""


def _add_stream(output: Any, shape: tuple[int, ...], video: Any) -> Any:
    stream = output.add_stream("libx264", rate=video.average_rate or Fraction(25))
    stream.height, stream.width = shape[0] // 2 * 2, shape[1] // 2 * 2
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = video.time_base
    # As in `mp4`: the same bytes on any machine.
    stream.codec_context.thread_count = 1
    stream.options = {"crf": "17", "preset": "veryfast", "bf": "0", "x264-params": "mbtree=0"}
    return stream


def _close(output: Any, stream: Any) -> None:
    if output is not None:
        output.mux(stream.encode())
        output.close()
