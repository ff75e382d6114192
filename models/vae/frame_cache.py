"""What a chunk of a clip leaves behind for the next one, so that chunks give what the whole clip would."""

import torch
from torch import Tensor, nn


class FrameCache:
    """The last frames that each layer with a window in time has seen of one batch of clips.

    One per batch and direction. `is_first` holds during the first chunk, whose first frame is treated apart.
    """

    def __init__(self) -> None:
        self.is_first = True
        self._frames: dict[nn.Module, Tensor] = {}

    def prepend(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """[B, C, T, H, W] -> the same with up to `count` frames of earlier chunks in front; keeps as many for the next."""
        if layer in self._frames:
            x = torch.cat([self._frames[layer], x], dim=2)
        # A copy: a view would keep the whole chunk alive.
        self._frames[layer] = x[:, :, -count:].clone()
        return x


def starts_clip(cache: FrameCache | None) -> bool:
    """Whether a layer sees the first frame of its clips: without a cache they come as a whole."""
    return cache is None or cache.is_first
