"""One micro-batch of captioned clips, as the loader hands it to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .pixels import to_pixels


@dataclass(frozen=True)
class VideoBatch:
    """B clips of one optimizer step, all of one shape: either `frames` or `latents` is set, captions always are.

    A ghost fills the place of a clip where a step has fewer: frames or latents of zeros, and weight 0.

    Slots, datasets and rows stay on the CPU: they key random draws on the host, so moving them would only force a wait later.
    """

    step: int
    step_samples: int  # of the whole step over all ranks, which the sum of losses is divided by
    slots: torch.Tensor  # int64 [B], position of each clip in the global batch of the step
    datasets: torch.Tensor  # int64 [B], place of each clip's dataset among the sorted names; -1 for a ghost
    rows: torch.Tensor  # int64 [B], row of each clip in the dataset's index (after any substitution); -1 for a ghost
    weights: torch.Tensor  # float32 [B], of each clip's loss in the step's: 1, and 0 for a ghost
    keys: list[str]  # "" for a ghost
    captions: list[str]  # "" where the caption was dropped
    frames: torch.Tensor | None = None  # uint8 [B, T, H, W, 3]
    latents: torch.Tensor | None = None  # bfloat16 [B, z, T', H', W'], as a latent cache holds them
    # A frozen text encoder's features of each caption, bfloat16 [S, D], from a latent cache that holds them; no rows for a ghost.
    text: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips, or of their latents."""
        if self.latents is not None:
            frames, height, width = self.latents.shape[2:]
        else:
            assert self.frames is not None
            frames, height, width = self.frames.shape[1:4]
        return frames, height, width

    @property
    def shape_name(self) -> str:
        """The same in words."""
        return ("" if self.latents is None else "latents of ") + "x".join(map(str, self.shape))

    @property
    def pixels(self) -> torch.Tensor:
        """The frames as float32 [B, 3, T, H, W] in [-1, 1], computed on their device: a quarter of the bytes travel there."""
        assert self.frames is not None, "a batch of latents has no pixels"
        return to_pixels(self.frames)

    def to(self, device: torch.device | str) -> VideoBatch:
        """The same batch with weights, frames, latents and text on `device`."""
        return replace(
            self,
            weights=self.weights.to(device, non_blocking=True),
            frames=None if self.frames is None else self.frames.to(device, non_blocking=True),
            latents=None if self.latents is None else self.latents.to(device, non_blocking=True),
            text=None if self.text is None else [rows.to(device, non_blocking=True) for rows in self.text],
        )
