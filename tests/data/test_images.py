"""Still images come out upright and as RGB whatever the file has in it; damage and bombs are refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from muybridge.data.decode import DecodeError
from muybridge.data.images import is_image, open_image, read_image, upright_size
from muybridge.data.tar_samples import reason_class

# A picture of 3x2 pixels, each of another brightness, and what each EXIF orientation makes of it (the tag's own definition: where
# row 0 and column 0 of the stored picture are to be shown).
STORED = np.array([[10, 50, 90], [130, 170, 210]], dtype=np.uint8)
UPRIGHT = {
    1: STORED,  # top, left
    2: STORED[:, ::-1],  # top, right
    3: STORED[::-1, ::-1],  # bottom, right
    4: STORED[::-1],  # bottom, left
    5: STORED.T,  # left, top
    6: STORED.T[:, ::-1],  # right, top
    7: STORED.T[::-1, ::-1],  # right, bottom
    8: STORED.T[::-1],  # left, bottom
}


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", list(UPRIGHT))
def test_every_orientation_is_turned_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(STORED).convert("RGB"), format, exif=exif, lossless=True)
    assert read_image(data)[..., 0].tolist() == UPRIGHT[orientation].tolist()
    assert upright_size(open_image(data)) == UPRIGHT[orientation].shape[::-1]


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_leaves_the_picture_alone(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert read_image(saved(Image.fromarray(STORED), "PNG", exif=exif))[..., 0].tolist() == STORED.tolist()


def test_damaged_exif_data_do_not_cost_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(STORED).convert("RGB"), "WEBP", exif=exif, lossless=True)
    start = data.index(b"MM\x00*")
    broken = data[:start] + b"??" + data[start + 2 :]
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(broken)).getexif()
    assert read_image(broken)[..., 0].tolist() == STORED.tolist()
    assert upright_size(open_image(broken)) == (3, 2)


def test_a_photograph_with_a_preview_behind_it_is_a_still_image() -> None:
    photo = Image.new("RGB", (48, 32), (200, 30, 30))
    preview = Image.new("RGB", (48, 32), (30, 30, 200))
    data = saved(photo, "MPO", save_all=True, append_images=[preview])
    assert is_image(data)
    assert read_image(data).shape == (32, 48, 3)
    assert np.abs(read_image(data).astype(int) - (200, 30, 30)).max() < 8


def test_what_lies_behind_transparent_pixels_is_kept() -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[..., 0] = 77
    for data in (
        saved(Image.fromarray(pixels), "PNG"),
        saved(Image.fromarray(pixels), "WEBP", lossless=True, exact=True),
    ):
        assert read_image(data).tolist() == [[[77, 0, 0]] * 4] * 4


def test_cmyk_and_16_bits_keep_their_colours() -> None:
    cyan = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    assert np.abs(read_image(cyan).astype(int) - (0, 255, 255)).max() <= 3
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    assert read_image(saved(Image.fromarray(deep), "PNG"))[..., 1].tolist() == (deep >> 8).tolist()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of EXIF data
def test_files_are_damaged_anywhere_without_another_error() -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    reasons = set()
    for format in ("JPEG", "PNG", "WEBP"):
        whole = saved(photo, format, exif=exif)
        for attempt in range(150):
            data = bytearray(whole[: int(rng.integers(20, len(whole)))] if attempt % 3 == 0 else whole)
            # Half of them in the headers, which are short.
            for place in rng.integers(0, len(data) if attempt % 2 else min(300, len(data)), size=3):
                data[place] = rng.integers(256)
            if is_image(bytes(data)):
                try:
                    assert read_image(bytes(data)).ndim == 3
                except DecodeError as error:
                    reasons.add(reason_class(str(error)))
    assert "damaged image" in reasons
    assert reasons <= {"damaged image", "picture too large", "animated image"}
