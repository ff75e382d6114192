"""Still images: opened with limits, upright, as RGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from .decode_common import MAX_PIXELS, DecodeError

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag
# What turns a picture of each orientation upright; 1 is.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}


def is_image(data: bytes) -> bool:
    """Whether the bytes begin as a jpg, png or webp file does, whatever the file's name says."""
    return (
        data[:3] == b"\xff\xd8\xff"
        or data[:8] == b"\x89PNG\r\n\x1a\n"
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    )


def open_image(data: bytes) -> Image.Image:
    """A still jpg, png or webp, decoded in full, as the file has it (not yet upright). Raises DecodeError."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(f"picture too large: {image.width}x{image.height} pixels are more than 8K")
        # Telephones put a preview behind a jpg, which makes it an MPO; its first picture is the one that is meant.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise DecodeError(f"animated image: {getattr(image, 'n_frames', 1)} frames; make a video of it")
        image.load()
    except DecodeError:
        raise
    except UnidentifiedImageError as error:  # its text has an address in it
        raise DecodeError("damaged image: its header cannot be read") from error
    except Image.DecompressionBombError as error:
        raise DecodeError("picture too large: more than 8K") from error
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError and others on damage
        raise DecodeError(f"damaged image: {' '.join(str(error).split())[:160]}") from error
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels after the rotation that the file asks for (EXIF)."""
    is_sideways = _turn(image) in _SIDEWAYS
    return (image.height, image.width) if is_sideways else (image.width, image.height)


def read_image(data: bytes) -> np.ndarray:
    """The picture upright as uint8 [H, W, 3]: alpha is dropped, 16 bits are cut to 8. Raises DecodeError."""
    image = open_image(data)
    if (turn := _turn(image)) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip rather than scale
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data: SyntaxError, struct.error and others; the picture itself has been decoded
        return None
