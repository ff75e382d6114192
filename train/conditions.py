"""What each clip of a training batch is conditioned on, beside its caption."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batch import VideoBatch
from ..models.diffusion.conditioning import (
    TEXT_ALONE,
    CleanFrames,
    Condition,
    ConditioningForm,
    Encode,
    image_channels,
    shown_pixels,
)
from ..models.diffusion.known_places import draw_known_places, latent_known

if TYPE_CHECKING:
    from ..models.image_encoder import ClipImageEncoder
    from .config import TrainConfig


class ClipConditions:
    """Draws what is known of the clips and makes it what the model takes; all by (seed, purpose, step, slot)."""

    def __init__(self, config: "TrainConfig", encode: Encode, device: torch.device) -> None:
        """`encode` is the frozen autoencoder: pixels [B, 3, T, H, W] to normalised latents."""
        self.config = config
        self.encode = encode
        self.device = device
        self.temporal_stride = config.vae.resolved().temporal_stride
        self._image_encoder: ClipImageEncoder | None = None

    @property
    def image_encoder(self) -> "ClipImageEncoder":
        """The frozen reader of first frames, read when it is first needed."""
        if self._image_encoder is None:
            from ..models.image_encoder import ClipImageEncoder

            assert self.config.conditioning.image_encoder is not None
            self._image_encoder = ClipImageEncoder(self.config.conditioning.image_encoder).to(self.device)
        return self._image_encoder

    def apply(
        self, model: Callable[..., Any], batch: VideoBatch, latents: Tensor, *, purpose: str
    ) -> tuple[Callable[..., Any], Condition]:
        """The model of (latents, timestep, text) and the condition to train under, for clips of latents [B, z, T', H', W']."""
        form, patch_size = self.config.conditioning.form, self.config.model.patch_size
        if form is ConditioningForm.none:
            return model, TEXT_ALONE
        frames, height, width = latents.shape[2:]
        known = draw_known_places(
            self.config.conditioning,
            (frames, height, width),
            temporal_stride=self.temporal_stride,
            patch_size=patch_size,
            seed=self.config.seed,
            step=batch.step,
            slots=batch.slots.tolist(),
            purpose=purpose,
        ).to(self.device)
        if form is ConditioningForm.clean_frames:
            return model, CleanFrames(latents, 1 - latent_known(known, self.temporal_stride), patch_size)
        condition = image_channels(self.encode, batch.pixels, known, temporal_stride=self.temporal_stride)
        if self.config.model.image_dim is None:
            return model, condition
        # What of the first frame is not known must not be read from its features either.
        first = shown_pixels(batch.pixels[:, :, :1], known[:, :, :1]).squeeze(2)  # [B, 3, H, W]
        features = self.image_encoder.encode(first)  # [B, I, image_dim]
        return lambda noisy, timestep, text: model(noisy, timestep, text, features), condition
