"""Samplers: from noise to latents by following the velocity of any network that speaks velocity."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .dpmpp import DPMSolverPP
from .guidance import VelocityFn
from .noise_schedule import TIMESTEPS, shift_noise_level
from .unipc import UniPC


class SamplerKind(StrEnum):
    """Solver and schedule. No two schedules are equal, so clips of one seed drift apart a little even at many steps.

    First and last timestep at 50 steps and shift 5: euler 1000, 92.6; unipc 999, 96; unipc_wan 999, 92; dpmpp 1000, 92.
    """

    euler = "euler"  # first order, timesteps not rounded
    unipc = "unipc"  # diffusers' UniPCMultistepScheduler with flow sigmas, the scheduler of Wan's pipeline folders
    unipc_wan = "unipc_wan"  # the same solver on the schedule of Wan's own code
    dpmpp = "dpmpp"  # DPM-Solver++ as in Wan's own code


@dataclass
class SamplerConfig:
    """How a video is sampled."""

    kind: SamplerKind = SamplerKind.euler
    steps: int = 50  # calls of the model (one batched call each, guidance included)
    shift: float = 5.0  # spends more steps near noise; 1 is off
    guidance_scale: float = 5.0  # classifier-free guidance; 1 is off
    # The same for the low-noise expert of a model that has two; null is guidance_scale.
    guidance_scale_low: float | None = None

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules, as messages that name the field, the value and the rule."""
        found = []
        if self.steps < 1:
            found.append(f"{field}.steps={self.steps} must be at least 1")
        if self.shift <= 0:
            found.append(f"{field}.shift={self.shift} must be greater than 0 (1 is off)")
        if self.guidance_scale < 0:
            found.append(f"{field}.guidance_scale={self.guidance_scale} must be at least 0 (1 is off)")
        if self.guidance_scale_low is not None and self.guidance_scale_low < 0:
            found.append(f"{field}.guidance_scale_low={self.guidance_scale_low} must be at least 0 (1 is off) or null")
        if self.steps >= 1 and self.shift > 0 and not _falls(sampling_schedule(self).noise_levels):
            found.append(
                f"{field}.shift={self.shift} must leave the {self.steps} noise levels of {self.kind} apart: "
                "take a shift nearer to 1 or fewer steps"
            )
        return found

    def expert_guidance_scales(self) -> tuple[float, float]:
        """The guidance scales of the high-noise and of the low-noise expert."""
        low = self.guidance_scale if self.guidance_scale_low is None else self.guidance_scale_low
        return self.guidance_scale, low


@dataclass(frozen=True)
class SamplingSchedule:
    """What a sampler visits."""

    noise_levels: list[float]  # steps + 1, from noise down to 0
    timesteps: list[float]  # steps: what the model is told at each noise level but the last


class Solver(Protocol):
    """Takes the steps of one sampling in order; holds what a multistep method remembers."""

    def step(self, latents: Tensor, velocity: Tensor) -> Tensor:
        """Latents at the next noise level from latents and velocity at this one, all [B, ...] float32."""
        ...


def sampling_schedule(config: SamplerConfig) -> SamplingSchedule:
    """Noise levels and timesteps of a sampling; all but Euler's are bit-equal to those of the code they follow."""
    # numpy's spacing: timesteps are cut to integers, so the last bit of a level can decide between two timesteps.
    if config.kind is SamplerKind.unipc:
        even = np.linspace(1, 1 / TIMESTEPS, config.steps + 1)[:-1]
    elif config.kind is SamplerKind.unipc_wan:
        even = np.linspace(np.float32(1 - 1 / TIMESTEPS), 0, config.steps + 1, dtype=np.float64)[:-1]
    else:
        even = np.linspace(1, 0, config.steps + 1)[:-1]
    levels = shift_noise_level(torch.from_numpy(even), config.shift)
    if config.kind is SamplerKind.unipc:
        levels[0] -= 1e-6  # at level 1 the log signal-to-noise ratio is infinite
    timesteps = TIMESTEPS * levels
    if config.kind is not SamplerKind.euler:
        timesteps, levels = timesteps.trunc(), levels.float()
    return SamplingSchedule(noise_levels=[*levels.tolist(), 0.0], timesteps=timesteps.tolist())


@torch.no_grad()
def sample(
    velocity_fn: VelocityFn,
    noise: Tensor,
    config: SamplerConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents [B, ...] float32 from noise [B, ...], by `config.steps` calls of `velocity_fn(latents, timestep [B])`.

    Timesteps are float32 in [0, 1000]; `progress(done, steps)` is called after each step.
    """
    schedule = sampling_schedule(config)
    solver = build_solver(config.kind, schedule.noise_levels)
    latents = noise.float()
    for done, timestep in enumerate(schedule.timesteps, start=1):
        timesteps = torch.full((len(latents),), timestep, dtype=torch.float32, device=latents.device)
        latents = solver.step(latents, velocity_fn(latents, timesteps).float())
        if progress is not None:
            progress(done, config.steps)
    return latents


def build_solver(kind: SamplerKind, noise_levels: list[float]) -> Solver:
    """A solver at the first of the noise levels."""
    if kind is SamplerKind.euler:
        return Euler(noise_levels)
    if kind is SamplerKind.dpmpp:
        return DPMSolverPP(noise_levels)
    return UniPC(noise_levels)


class Euler:
    """Straight steps along dx/ds = velocity."""

    def __init__(self, noise_levels: list[float]) -> None:
        self._lengths = iter([after - before for before, after in pairwise(noise_levels)])

    def step(self, latents: Tensor, velocity: Tensor) -> Tensor:
        return latents + next(self._lengths) * velocity


def _falls(noise_levels: list[float]) -> bool:
    return all(before > after for before, after in pairwise(noise_levels))
