"""Classifier-free guidance: sharpen a velocity by what the caption adds over a negative prompt."""

from collections.abc import Callable

import torch
from torch import Tensor

from .objective import VelocityModel

VelocityFn = Callable[[Tensor, Tensor], Tensor]  # (latents [B, ...], timestep [B]) -> velocity [B, ...]


def guided_velocity(model: VelocityModel, text: Tensor, negative_text: Tensor, scale: float) -> VelocityFn:
    """The velocity function u + scale (c - u) of latents and timestep, c under `text` and u under `negative_text`, both [B, ...].

    Both come from one call with a batch of 2B; at scale 1 guidance is off and the negative text is not evaluated.
    """
    if scale == 1.0:
        return lambda latents, timestep: model(latents, timestep, text)
    both_texts = torch.cat((text, negative_text))

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        both = model(torch.cat((latents, latents)), torch.cat((timestep, timestep)), both_texts)
        conditional, unconditional = both.float().chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return velocity
