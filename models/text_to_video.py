"""The one module that a training engine wraps: the DiT, with the text encoder when that is trained along."""

from torch import Tensor, nn

from .dit import DiT
from .text import ByteTextEncoder
from .text_small import SmallUmt5


class TextToVideoModel(nn.Module):
    """Velocity [B, C, T, H, W] of noisy latents; `text` is what the run's text encoder stage hands over."""

    def __init__(self, dit: DiT, text_encoder: ByteTextEncoder | SmallUmt5 | None) -> None:
        """With a text encoder of its own the model takes tokens; without (frozen umT5, cached features) it takes features.

        Raises ValueError when the encoder's width is not the DiT's `text_dim`.
        """
        super().__init__()
        if text_encoder is not None and text_encoder.config.dim != dit.config.text_dim:
            raise ValueError(f"text.dim={text_encoder.config.dim} must equal model.text_dim={dit.config.text_dim}")
        self.transformer = dit
        self.text_encoder = text_encoder

    def forward(
        self, noisy_latents: Tensor, timestep: Tensor, text: Tensor, image_features: Tensor | None = None
    ) -> Tensor:
        """Latents [B, C, T, H, W], timestep [B] or [B, R] in [0, 1000] as in `DiT.forward`, text int64 [B, S, ...] or features
        [B, S, text_dim], and features of an image [B, I, image_dim] for a DiT that takes them.
        """
        if self.text_encoder is not None:
            text = self.text_encoder(text)
        return self.transformer(noisy_latents, timestep, text, image_features)
