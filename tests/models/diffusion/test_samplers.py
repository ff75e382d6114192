"""Samplers: their schedules, their order on a flow with a known answer, and what they tell and ask."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from muybridge.models.diffusion.samplers import SamplerConfig, SamplerKind, build_solver, sample, sampling_schedule

DATA_STD = 0.5


def gaussian_velocity(latents: Tensor, timestep: Tensor) -> Tensor:
    """E[n - x0 | x] for data of standard deviation 0.5: x = (1-s) x0 + s n is normal, and so is n - x0 beside it."""
    s = (timestep / 1000).view(-1, *[1] * (latents.ndim - 1))
    variance = (1 - s) ** 2 * DATA_STD**2 + s**2
    return latents * (s - (1 - s) * DATA_STD**2) / variance


def test_euler_levels_run_from_one_to_zero_and_are_shifted_once() -> None:
    def levels(steps: int, shift: float) -> list[float]:
        return sampling_schedule(SamplerConfig(steps=steps, shift=shift)).noise_levels

    assert levels(4, 1.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert levels(2, 3.0) == pytest.approx([1, 0.75, 0])
    assert len(levels(50, 5.0)) == 51


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [
        (SamplerKind.euler, [1000, 995.93, 991.74], [241.94, 172.41, 92.59]),
        (SamplerKind.unipc, [999, 995, 991], [244, 175, 96]),
        (SamplerKind.unipc_wan, [999, 995, 991], [241, 172, 92]),
        (SamplerKind.dpmpp, [1000, 995, 991], [241, 172, 92]),
    ],
)
def test_the_four_schedules_at_wans_50_steps_and_shift_5(
    kind: SamplerKind, first: list[float], last: list[float]
) -> None:
    timesteps = sampling_schedule(SamplerConfig(kind=kind, steps=50, shift=5.0)).timesteps
    assert timesteps[:3] == pytest.approx(first, abs=0.01)
    assert timesteps[-3:] == pytest.approx(last, abs=0.01)


@pytest.mark.parametrize("kind", SamplerKind)
@pytest.mark.parametrize("shift", [0.5, 1.0, 5.0, 16.0])
def test_levels_fall_from_noise_to_data_and_timesteps_follow_them(kind: SamplerKind, shift: float) -> None:
    for steps in (1, 2, 50, 200):
        config = SamplerConfig(kind=kind, steps=steps, shift=shift)
        schedule = sampling_schedule(config)
        assert len(schedule.noise_levels) == steps + 1
        assert schedule.noise_levels[0] >= 0.998
        assert schedule.noise_levels[-1] == 0
        assert all(before > after for before, after in pairwise(schedule.noise_levels))
        cut = [1000 * level - t for level, t in zip(schedule.noise_levels[:-1], schedule.timesteps, strict=True)]
        assert all(-1e-4 < difference < 1 + 1e-4 for difference in cut)  # float32 levels
        assert config.faults("sampler") == []


@pytest.mark.parametrize("kind", SamplerKind)
def test_a_constant_velocity_reaches_the_data_in_any_number_of_steps(kind: SamplerKind) -> None:
    noise, data = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for steps in (1, 2, 7):
        schedule = sampling_schedule(SamplerConfig(kind=kind, steps=steps))
        start = torch.lerp(data, noise, schedule.noise_levels[0])  # the two UniPCs start a little below level 1
        found = sample(lambda *_: noise - data, start, SamplerConfig(kind=kind, steps=steps))
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


def test_multistep_samplers_come_closer_in_a_quarter_of_the_steps() -> None:
    def error(kind: SamplerKind, steps: int) -> float:
        levels = sampling_schedule(SamplerConfig(kind=kind, steps=steps, shift=1.0)).noise_levels
        solver = build_solver(kind, levels)
        latents = torch.ones(1, 1)
        for level in levels[:-1]:
            latents = solver.step(latents, gaussian_velocity(latents, torch.tensor([1000 * level])))
        spread_at_start = math.hypot((1 - levels[0]) * DATA_STD, levels[0])
        return abs(latents.item() - DATA_STD / spread_at_start)

    for kind in (SamplerKind.unipc, SamplerKind.unipc_wan, SamplerKind.dpmpp):
        assert error(kind, 20) < error(SamplerKind.euler, 80)
        assert error(kind, 160) < error(kind, 40) / 8  # a first-order method gains 4


@pytest.mark.parametrize("kind", SamplerKind)
def test_the_model_is_called_once_a_step_and_progress_is_told(kind: SamplerKind) -> None:
    told: list[tuple[int, int]] = []
    seen: list[Tensor] = []

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep)
        return latents.bfloat16()

    config = SamplerConfig(kind=kind, steps=3)
    found = sample(velocity, torch.ones(2, 2, dtype=torch.bfloat16), config, lambda *done: told.append(done))
    assert found.dtype == torch.float32
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert torch.stack(seen).dtype == torch.float32
    assert torch.stack(seen).tolist() == [[pytest.approx(t)] * 2 for t in sampling_schedule(config).timesteps]


@pytest.mark.parametrize("kind", SamplerKind)
def test_no_graph_is_kept_and_the_noise_stays(kind: SamplerKind) -> None:
    weight, noise = torch.ones(1, requires_grad=True), torch.ones(1, 2)
    assert not sample(lambda x, t: x * weight, noise, SamplerConfig(kind=kind, steps=3)).requires_grad
    assert torch.equal(noise, torch.ones(1, 2))


def test_the_low_noise_experts_guidance_is_that_of_the_high_one_unless_told() -> None:
    assert SamplerConfig(guidance_scale=4.0).expert_guidance_scales() == (4.0, 4.0)
    assert SamplerConfig(guidance_scale=4.0, guidance_scale_low=3.0).expert_guidance_scales() == (4.0, 3.0)
    assert SamplerConfig(guidance_scale=4.0, guidance_scale_low=0.0).expert_guidance_scales() == (4.0, 0.0)


def test_faults_name_field_value_and_rule() -> None:
    assert SamplerConfig().faults("sampler") == []
    assert SamplerConfig(steps=0, shift=0, guidance_scale=-1, guidance_scale_low=-2).faults("sampler") == [
        "sampler.steps=0 must be at least 1",
        "sampler.shift=0 must be greater than 0 (1 is off)",
        "sampler.guidance_scale=-1 must be at least 0 (1 is off)",
        "sampler.guidance_scale_low=-2 must be at least 0 (1 is off) or null",
    ]


def test_levels_too_close_to_tell_apart_are_a_fault() -> None:
    assert SamplerConfig(kind=SamplerKind.unipc, steps=50, shift=1e6).faults("sampler") == [
        "sampler.shift=1000000.0 must leave the 50 noise levels of unipc apart: take a shift nearer to 1 or fewer steps"
    ]
