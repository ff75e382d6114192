"""The image encoder of Wan 2.1's image-to-video models: CLIP's vision tower, frozen, and how an image becomes its input."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import load_frozen, require_text_extra
from .weight_files import read_json

PROCESSOR_NAME = "preprocessor_config.json"
_BICUBIC = 3  # in the numbering of Pillow, which the file uses


class ClipImageEncoder(nn.Module):
    """Features of images as Wan 2.1 I2V reads them: the tokens before the last layer of CLIP's vision tower."""

    def __init__(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """`folder` is a pipeline folder, with image_encoder/ and image_processor/ as diffusers writes them.

        Raises ValueError where one of them is missing, lacks tensors or prepares images in a way that is not CLIP's, and without
        the `text` extra.
        """
        super().__init__()
        transformers = require_text_extra("an image encoder")
        root = Path(folder)
        for name in ("image_encoder", "image_processor"):
            if not (root / name).is_dir():
                raise ValueError(f"{root}: must hold image_encoder/ and image_processor/; {name}/ is missing")
        self.preparation = ImagePreparation.from_file(root / "image_processor" / PROCESSOR_NAME)
        self.model = load_frozen(transformers.CLIPVisionModel, root / "image_encoder", dtype)
        size = self.model.config.image_size
        if self.preparation.crop != (size, size):
            raise ValueError(
                f"{root / 'image_processor' / PROCESSOR_NAME}: crop_size={self.preparation.crop} must be that of the image "
                f"encoder, {(size, size)}"
            )
        self.train(False)

    @property
    def feature_dim(self) -> int:
        """Width of the features, which must be the DiT's `image_dim`."""
        return self.model.config.hidden_size

    def train(self, mode: bool = True) -> "ClipImageEncoder":
        """Stay in evaluation mode whatever is asked: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to features [B, I, feature_dim], I = 257 for CLIP ViT-H/14.

        For a first and a last image, put their features one after the other: [B, 2 I, feature_dim].
        """
        parameter = next(self.model.parameters())
        pixels = self.preparation(images.to(parameter.device)).to(parameter.dtype)
        return self.model(pixels, output_hidden_states=True).hidden_states[-2]


def image_feature_dim(folder: Path | str) -> int:
    """Width of the features of a pipeline folder's image_encoder/, by its config.json alone; ValueError where that says none."""
    path = Path(folder) / "image_encoder" / "config.json"
    width = read_json(path).get("hidden_size")
    if not isinstance(width, int):
        raise ValueError(f"{path}: hidden_size={width} must be the width of the image encoder's features")
    return width


@dataclass(frozen=True)
class ImagePreparation:
    """Resize the short edge, cut out the middle, normalise: CLIP's steps, on any device, to the level of 8-bit pixels.

    Pillow rounds to whole levels after each of the two directions of a resize, and so is it done here.
    """

    short_edge: int  # pixels
    crop: tuple[int, int]  # height and width, pixels
    mean: tuple[float, ...]  # of each colour, of pixels in [0, 1]
    std: tuple[float, ...]

    @classmethod
    def from_file(cls, path: Path) -> "ImagePreparation":
        """Read a preprocessor_config.json. ValueError for one that is missing or asks for other steps than CLIP's."""
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable JSON file ({error})") from error
        steps = {f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize")}
        for name, value in (steps | {"resample": _BICUBIC}).items():
            if content.get(name, value) != value:
                raise ValueError(f"{path}: {name}={content[name]} must be {value} (CLIP's way to prepare an image)")
        if not math.isclose(content.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
            raise ValueError(f"{path}: rescale_factor={content['rescale_factor']} must be 1/255")
        try:
            short_edge = int(content["size"]["shortest_edge"])
            crop = int(content["crop_size"]["height"]), int(content["crop_size"]["width"])
            mean, std = (tuple(map(float, content[name])) for name in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: must hold size.shortest_edge, crop_size.height and .width, image_mean and image_std ({error!r})"
            ) from error
        if not 1 <= max(crop) <= short_edge:
            raise ValueError(f"{path}: crop_size={crop} must fit the resized image's short edge, {short_edge}")
        if not len(mean) == len(std) == 3 or min(std) <= 0:
            raise ValueError(
                f"{path}: image_mean={mean} and image_std={std} must be three numbers, the latter positive"
            )
        return cls(short_edge, crop, mean, std)

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to the tower's input [B, 3, *crop], float32. ValueError for other shapes."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images {list(images.shape)} must be [B, 3, H, W] in [-1, 1]")
        height, width = images.shape[-2:]
        short = min(height, width)
        # Whole-number division, as Pillow's callers do it: an edge is never rounded up.
        height, width = self.short_edge * height // short, self.short_edge * width // short
        pixels = _whole_levels((images.float() + 1) * 127.5)
        for size in ((pixels.shape[-2], width), (height, width)):
            pixels = _whole_levels(F.interpolate(pixels, size=size, mode="bicubic", antialias=True))
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]] / 255
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


def _whole_levels(pixels: Tensor) -> Tensor:
    """Rounded to the 256 levels of a byte."""
    return pixels.add(0.5).floor_().clamp_(0, 255)
