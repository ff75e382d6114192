"""What the index keeps of a video or image: found in its bytes, whatever its name says."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from .decode import DecodeError, Decoder, available_decoder, has_decoder, probe, read_frames_with_fallback
from .images import is_image, open_image, read_image, upright_size
from .packet_scan import claimed_end, scan_packets
from .quality import measure_quality, sample_times
from .storage import read_range

_HDR_TRANSFERS = (16, 18)  # PQ and HLG, as ITU-T H.273 numbers them
_EVEN_SECONDS = 2.5e-3  # frames this close to evenly spaced are: Matroska rounds to milliseconds


@dataclass(frozen=True)
class MediaInfo:
    """What the index keeps of a video or image."""

    frames: int  # 1 for an image
    fps_numerator: int  # average frame rate; an image lasts one frame of one second
    fps_denominator: int
    duration_seconds: float  # from the first frame's start to the last frame's end
    width: int  # pixels, after rotation
    height: int
    seekable: bool  # see `decode.VideoInfo`
    pixel_format: str  # FFmpeg's name, or Pillow's mode of an image; "" where PyAV is not installed
    bit_depth: int  # bits of a colour component; 0 where not known
    is_image: bool
    has_audio: bool
    is_variable_rate: bool
    is_hdr: bool
    # "mp4" (mov included), "matroska" (webm included), "image", FFmpeg's name of others, "" where not known
    container: str


def inspect_media(data: bytes, *, decode: bool = True) -> MediaInfo:
    """Decodes a video or image in full; without `decode` only the packets of a video are looked at. Raises DecodeError."""
    if is_image(data):
        return _inspect_image(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        raise DecodeError("animated image: GIF; make a video of it")
    has_pyav = has_decoder(Decoder.pyav)
    info = scan_packets(data) if has_pyav and not decode else probe(data)
    facts = _video_facts(data) if has_pyav else _UNKNOWN_FACTS
    return MediaInfo(
        frames=info.frames,
        fps_numerator=info.fps_numerator,
        fps_denominator=info.fps_denominator,
        duration_seconds=info.duration_seconds,
        width=info.width,
        height=info.height,
        seekable=info.seekable,
        is_image=False,
        **facts,
    )


def index_fields(info: MediaInfo) -> dict[str, Any]:
    """The part of it that the index keeps, under the names of `index.Clip`."""
    found = asdict(info)
    del found["container"]
    return found


def inspect_range(
    name: str,
    offset: int,
    size: int,
    *,
    containers: list[str] | None = None,
    decode: bool = True,
    quality: bool = False,
) -> tuple[dict[str, Any], bytes]:
    """The operation of a decoding process: inspects a part of a file; answers with fields of `index.Clip`.

    `containers` are those that are allowed, None allows all; `decode` as in `inspect_media`; `quality` measures that too. Raises
    DecodeError for media that cannot be used, and OSError or EOFError where the file cannot be read.
    """
    return inspect_clip(read_range(name, offset, size), containers=containers, decode=decode, quality=quality)


def inspect_clip(
    data: bytes, *, containers: list[str] | None = None, decode: bool = True, quality: bool = False
) -> tuple[dict[str, Any], bytes]:
    """The operation of a decoding process: what `inspect_range` tells, of a clip that was read already."""
    info = _inspected(data, containers, decode=decode)
    found = {**index_fields(info), "checksum": crc32(data)}
    if quality:
        found |= asdict(measure_quality(_sampled_frames(data, info)))
    return found, b""


def _inspected(data: bytes, containers: list[str] | None, *, decode: bool) -> MediaInfo:
    info = inspect_media(data, decode=decode)
    if containers is not None and info.container and info.container not in containers:
        raise DecodeError(f"unsupported container: {info.container} (allowed are {', '.join(containers)})")
    return info


def _inspect_image(data: bytes) -> MediaInfo:
    image = open_image(data)
    width, height = upright_size(image)
    return MediaInfo(
        frames=1,
        fps_numerator=1,
        fps_denominator=1,
        duration_seconds=1.0,
        width=width,
        height=height,
        seekable=True,
        pixel_format=image.mode,
        bit_depth=16 if image.mode.startswith("I") else 1 if image.mode == "1" else 8,
        is_image=True,
        has_audio=False,
        is_variable_rate=False,
        is_hdr=False,
        container="image",
    )


def _sampled_frames(data: bytes, info: MediaInfo) -> np.ndarray:
    if info.is_image:
        return read_image(data)[None]
    times = sample_times(info.duration_seconds, frame_seconds=info.fps_denominator / info.fps_numerator)
    return read_frames_with_fallback(data, times, decoder=available_decoder(), seekable=info.seekable)[0]


_UNKNOWN_FACTS: dict[str, Any] = {
    "pixel_format": "",
    "bit_depth": 0,
    "has_audio": False,
    "is_variable_rate": False,
    "is_hdr": False,
    "container": "",
}


def _video_facts(data: bytes) -> dict[str, Any]:
    import av

    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            stream: Any = container.streams.best("video")  # as `decode` chooses it
            codec = stream.codec_context
            if claimed_end(data, stream.index_entries) > len(data):
                raise DecodeError(f"damaged video data: it is cut (after {len(data)} bytes)")
            times = sorted(float(p.pts * p.time_base) for p in container.demux(stream) if p.pts is not None)
            gaps = np.diff(times)
            return {
                "pixel_format": codec.pix_fmt or "",
                "bit_depth": max((part.bits for part in codec.format.components), default=0) if codec.format else 0,
                "has_audio": bool(container.streams.audio),
                "is_variable_rate": bool(len(gaps) and gaps.max() - gaps.min() > _EVEN_SECONDS),
                "is_hdr": int(codec.color_trc) in _HDR_TRANSFERS,
                "container": _container(container.format.name),
            }
    except av.FFmpegError as error:  # `probe` has decoded it, so this is for files that change under us
        raise DecodeError(f"damaged video data: {error}") from error


def _container(name: str) -> str:
    names = name.split(",")
    return "mp4" if "mp4" in names else "matroska" if "matroska" in names else names[0]
