"""Euler sampling: against an analytic flow, and against diffusers' scheduler given the same noise levels."""

import pytest
import torch
from torch import Tensor

from muybridge.models.diffusion.samplers import SamplerConfig, sample, sampling_schedule

DATA_STD = 0.5


def gaussian_velocity(latents: Tensor, timestep: Tensor) -> Tensor:
    """E[n - x0 | x] for data of standard deviation 0.5: x = (1-s) x0 + s n is normal, and so is n - x0 beside it."""
    s = (timestep / 1000).view(-1, *[1] * (latents.ndim - 1))
    variance = (1 - s) ** 2 * DATA_STD**2 + s**2
    return latents * (s - (1 - s) * DATA_STD**2) / variance


def test_noise_levels_run_from_one_to_zero_and_are_shifted_once() -> None:
    assert sampling_schedule(SamplerConfig(steps=4, shift=1.0)).noise_levels == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert sampling_schedule(SamplerConfig(steps=2, shift=3.0)).noise_levels == pytest.approx([1, 0.75, 0])
    assert len(sampling_schedule(SamplerConfig(steps=50)).noise_levels) == 51


def test_a_constant_velocity_reaches_the_data_in_one_step() -> None:
    noise, data = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for steps in (1, 7):
        found = sample(lambda *_: noise - data, noise, SamplerConfig(steps=steps))
        torch.testing.assert_close(found, data, atol=1e-5, rtol=1e-5)


def test_gaussian_noise_becomes_data_of_the_right_spread_at_first_order() -> None:
    """The exact flow scales noise by the data's standard deviation; Euler's error halves when steps double."""
    noise = torch.randn(2, 8)
    errors = []
    for steps in (50, 100, 200):
        found = sample(gaussian_velocity, noise, SamplerConfig(steps=steps, shift=1.0))
        errors.append((found - DATA_STD * noise).abs().max().item())
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_it_agrees_with_the_scheduler_of_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
    config = SamplerConfig(steps=steps, shift=5.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=sampling_schedule(config).noise_levels[:-1])
    noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    latents, timesteps = noise, []
    for timestep in scheduler.timesteps:
        timesteps.append(timestep.item())
        latents = scheduler.step(gaussian_velocity(latents, timestep.expand(2)), timestep, latents).prev_sample
    seen: list[float] = []

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep[0].item())
        return gaussian_velocity(latents, timestep)

    torch.testing.assert_close(sample(velocity, noise, config), latents, atol=1e-5, rtol=1e-5)
    assert seen == pytest.approx(timesteps, abs=1e-3)


def test_progress_is_told_after_each_step() -> None:
    told: list[tuple[int, int]] = []
    sample(lambda x, t: x, torch.ones(1, 2), SamplerConfig(steps=3), lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_no_graph_is_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    assert not sample(lambda x, t: x * weight, torch.ones(1, 2), SamplerConfig(steps=2)).requires_grad


def test_faults_name_field_value_and_rule() -> None:
    assert SamplerConfig().faults("sampler") == []
    assert SamplerConfig(steps=0, shift=0, guidance_scale=-1).faults("sampler") == [
        "sampler.steps=0 must be at least 1",
        "sampler.shift=0 must be greater than 0 (1 is off)",
        "sampler.guidance_scale=-1 must be at least 0 (1 is off)",
    ]
