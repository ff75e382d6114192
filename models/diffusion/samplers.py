"""Samplers: from noise to latents by following the velocity of any network that speaks velocity."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .guidance import VelocityFn
from .noise_schedule import TIMESTEPS, shift_noise_level


@dataclass
class SamplerConfig:
    """How a video is sampled."""

    steps: int = 50  # calls of the model (one batched call each, guidance included)
    shift: float = 5.0  # spends more steps near noise; 1 is off
    guidance_scale: float = 5.0  # classifier-free guidance; 1 is off

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules, as messages that name the field, the value and the rule."""
        found = []
        if self.steps < 1:
            found.append(f"{field}.steps={self.steps} must be at least 1")
        if self.shift <= 0:
            found.append(f"{field}.shift={self.shift} must be greater than 0 (1 is off)")
        if self.guidance_scale < 0:
            found.append(f"{field}.guidance_scale={self.guidance_scale} must be at least 0 (1 is off)")
        return found


def euler_noise_levels(config: SamplerConfig) -> list[float]:
    """The steps + 1 noise levels from 1 to 0 that Euler visits: evenly spaced, then shifted once."""
    even = torch.linspace(1, 0, config.steps + 1, dtype=torch.float64)
    return shift_noise_level(even, config.shift).tolist()


@torch.no_grad()
def euler_sample(
    velocity_fn: VelocityFn,
    noise: Tensor,
    config: SamplerConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents [B, ...] float32 from noise [B, ...], by Euler steps along dx/ds = velocity.

    `velocity_fn(latents, timestep [B])` gets timesteps 1000 s in float32; `progress(done, steps)` is called after each step.
    """
    levels = euler_noise_levels(config)
    latents = noise.float()
    for done, (level, next_level) in enumerate(pairwise(levels), start=1):
        timestep = torch.full((len(latents),), TIMESTEPS * level, dtype=torch.float32, device=latents.device)
        latents = latents + (next_level - level) * velocity_fn(latents, timestep).float()
        if progress is not None:
            progress(done, config.steps)
    return latents
