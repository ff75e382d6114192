"""Samplers against diffusers' schedulers: the same noise levels, timesteps and latents, step by step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from muybridge.models.diffusion.guidance import expert_velocity
from muybridge.models.diffusion.samplers import SamplerConfig, SamplerKind, SamplingSchedule, sample, sampling_schedule

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")

STEPS = [1, 2, 3, 4, 10, 14, 15, 20, 40, 50]


def curved_velocity(latents: Tensor, timestep: Tensor) -> Tensor:
    """The flow to data of standard deviation 0.5, bent so that no solver is exact on it."""
    s = (timestep / 1000).view(-1, *[1] * (latents.ndim - 1))
    variance = (1 - s) ** 2 / 4 + s**2
    return latents * (s - (1 - s) / 4) / variance + torch.tanh(2 * latents + 3 * s)


def scheduler_like(config: SamplerConfig, schedule: SamplingSchedule) -> Any:
    """diffusers' scheduler of a kind; with our schedule where diffusers has another than Wan's own code."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    levels = np.array(schedule.noise_levels[:-1])
    if config.kind is SamplerKind.euler:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=levels)
    elif config.kind is SamplerKind.unipc:
        scheduler = diffusers.UniPCMultistepScheduler(**flow, flow_shift=config.shift)
        scheduler.set_timesteps(config.steps)
    elif config.kind is SamplerKind.unipc_wan:
        scheduler = diffusers.UniPCMultistepScheduler(**flow)
        scheduler.set_timesteps(sigmas=levels)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
        scheduler.set_timesteps(config.steps)
        scheduler.sigmas = torch.tensor(schedule.noise_levels)
        scheduler.timesteps = torch.tensor(schedule.timesteps).long()
    # Left to itself a scheduler finds its place by the timestep, and skips a step where two are cut to the same integer.
    scheduler.set_begin_index(0)
    return scheduler


def sample_of_diffusers(scheduler: Any, velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor) -> Tensor:
    latents = noise
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity(latents, timestep.float().expand(2)), timestep, latents).prev_sample
    return latents


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, under numpy 2
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("kind", SamplerKind)
def test_latents_are_those_of_diffusers(kind: SamplerKind, shift: float) -> None:
    noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    for steps in STEPS:
        config = SamplerConfig(kind=kind, steps=steps, shift=shift)
        schedule = sampling_schedule(config)
        scheduler = scheduler_like(config, schedule)
        assert scheduler.timesteps.tolist() == pytest.approx(schedule.timesteps, abs=1e-3), steps
        expected = sample_of_diffusers(scheduler, curved_velocity, noise)
        torch.testing.assert_close(sample(curved_velocity, noise, config), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
def test_unipc_visits_bit_for_bit_what_diffusers_visits(shift: float) -> None:
    for steps in range(1, 101):
        config = SamplerConfig(kind=SamplerKind.unipc, steps=steps, shift=shift)
        schedule = sampling_schedule(config)
        scheduler = scheduler_like(config, schedule)
        assert scheduler.sigmas.tolist() == schedule.noise_levels
        assert scheduler.timesteps.tolist() == schedule.timesteps


def test_two_experts_share_the_steps_as_in_diffusers() -> None:
    """Wan 2.2: 40 steps, shift 12, boundary 0.875; the solver's memory goes across the boundary."""
    config = SamplerConfig(kind=SamplerKind.unipc, steps=40, shift=12.0)
    scheduler = scheduler_like(config, sampling_schedule(config))
    noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))

    def low(latents: Tensor, timestep: Tensor) -> Tensor:
        return 0.5 * curved_velocity(latents, timestep)

    def by_hand(latents: Tensor, timestep: Tensor) -> Tensor:
        expert = curved_velocity if timestep[0].item() >= 875 else low
        return expert(latents, timestep)

    found = sample(expert_velocity(curved_velocity, low, 0.875), noise, config)
    torch.testing.assert_close(found, sample_of_diffusers(scheduler, by_hand, noise), atol=1e-5, rtol=1e-5)
