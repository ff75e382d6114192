"""The settings of the data: which dataset, what a training clip looks like, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .decode import Decoder


class Access(StrEnum):
    """What the rows of the dataset are."""

    raw = "raw"  # encoded videos, decoded on the fly
    latents = "latents"  # a latent cache


@dataclass
class DataConfig:
    """Which clips to train on and how to read them."""

    path: str = ""  # dataset folder, as `muybridge prepare` writes it
    access: Access = Access.raw  # whether the clips of `path` are decoded, or their cached latents are read
    latents: str | None = None  # folder of the latent caches, which `muybridge encode` writes; null for none
    # Which clips are taken, such as 'motion > 0.5 and not is_hdr', see `row_filter`; null takes all. A latent cache holds the clips
    # of the filter that it was made with, and is refused with another one.
    filter: str | None = None
    frames: int = 9  # of a training clip; 1 + a multiple of 4
    fps: float = 8.0  # frame rate of a training clip, whatever the video's own
    height: int = 64  # pixels
    width: int = 64  # pixels
    decoder: Decoder = Decoder.decord  # tried first; the other one reads what it cannot
    workers: int = 2  # decoding processes of each rank; 0 decodes in the training process, which a bad stream may crash
    prefetch: int = 2  # steps decoded ahead; 0 for none
    timeout_seconds: float = 60.0  # a clip that takes longer to decode counts as unreadable
    caption_dropout: float = 0.1  # share of clips whose caption is replaced by the empty one, for guidance; 0 for none

    def faults(self, field: str) -> list[str]:
        """All breaches of the rules, as complete messages."""
        found = []
        if not self.path:
            found.append(f"{field}.path must name a dataset folder; make one with: muybridge prepare SRC OUT")
        if self.access is Access.latents and not self.latents:
            found.append(
                f"{field}.latents must name a folder with {field}.access=latents; make it with: muybridge encode"
            )
        if self.filter is not None:
            from .row_filter import expression_fault

            if fault := expression_fault(self.filter, field=f"{field}.filter"):
                found.append(fault)
        if self.frames < 1 or self.frames % 4 != 1:
            found.append(
                f"{field}.frames={self.frames} must be 1 + a multiple of 4 (the autoencoder's temporal stride)"
            )
        for name in ("fps", "height", "width", "timeout_seconds"):
            if not getattr(self, name) > 0:
                found.append(f"{field}.{name}={getattr(self, name)} must be positive")
        for name in ("workers", "prefetch"):
            if getattr(self, name) < 0:
                found.append(f"{field}.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.caption_dropout <= 1:
            found.append(f"{field}.caption_dropout={self.caption_dropout} must be in 0..1")
        return found

    def transform(self) -> dict[str, int | float]:
        """What decides a clip's shape and sampling: a latent cache is only valid for the same."""
        return {"frames": self.frames, "fps": self.fps, "height": self.height, "width": self.width}
