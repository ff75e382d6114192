"""One micro-batch of captioned clips, as the loader hands it to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class VideoBatch:
    """B clips of one optimizer step: either `pixels` or `latents` is set, captions always are.

    A ghost fills the place of a clip where a step has fewer: pixels or latents of zeros, and weight 0.

    Slots and rows stay on the CPU: they key random draws on the host, so moving them would only force a wait later.
    """

    step: int
    slots: torch.Tensor  # int64 [B], position of each clip in the global batch of the step
    rows: torch.Tensor  # int64 [B], row of each clip in the dataset's index (after any substitution); -1 for a ghost
    weights: torch.Tensor  # float32 [B], of each clip's loss in the step's: 1, and 0 for a ghost
    keys: list[str]  # "" for a ghost
    captions: list[str]  # "" where the caption was dropped
    pixels: torch.Tensor | None = None  # float32 [B, 3, T, H, W] in [-1, 1]
    latents: torch.Tensor | None = None  # float32 [B, z, T', H', W']
    # A frozen text encoder's features of each caption, bfloat16 [S, D], from a latent cache that holds them; no rows for a ghost.
    text: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> VideoBatch:
        """The same batch with weights, pixels, latents and text on `device`."""
        return replace(
            self,
            weights=self.weights.to(device, non_blocking=True),
            pixels=None if self.pixels is None else self.pixels.to(device, non_blocking=True),
            latents=None if self.latents is None else self.latents.to(device, non_blocking=True),
            text=None if self.text is None else [rows.to(device, non_blocking=True) for rows in self.text],
        )
