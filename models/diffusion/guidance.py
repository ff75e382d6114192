"""Velocity functions for samplers: classifier-free guidance, and two experts that share the noise levels."""

from collections.abc import Callable

import torch
from torch import Tensor

from .noise_schedule import TIMESTEPS
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


def expert_velocity(high: VelocityFn, low: VelocityFn, boundary: float) -> VelocityFn:
    """`high` where the timestep is at least 1000 `boundary`, `low` below: Wan 2.2's two experts.

    Raises ValueError where the rows of a batch fall on both sides; each call waits for the device to read the timestep.
    """

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        lowest, highest = torch.stack(timestep.aminmax()).tolist()
        if lowest < TIMESTEPS * boundary <= highest:
            raise ValueError(
                f"timesteps from {lowest} to {highest} in one batch must lie on one side of the experts' boundary "
                f"{TIMESTEPS * boundary}"
            )
        expert = high if lowest >= TIMESTEPS * boundary else low
        return expert(latents, timestep)

    return velocity
