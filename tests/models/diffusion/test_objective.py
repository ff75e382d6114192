"""Rectified flow: the loss in closed form, and draws that belong to slots and not to ranks."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from muybridge.models.diffusion.conditioning import CleanFrames, ImageChannels
from muybridge.models.diffusion.noise_schedule import NoiseDistribution, NoiseScheduleConfig
from muybridge.models.diffusion.objective import (
    add_noise,
    keyed_noise,
    keyed_noise_levels,
    keyed_uniform,
    rectified_flow_loss,
)

SHAPE = (4, 3, 2, 2)


def test_noise_is_the_same_however_slots_are_split_over_ranks() -> None:
    together = keyed_noise(7, 5, range(8), SHAPE)
    split = [keyed_noise(7, 5, slots, SHAPE) for slots in ([0, 1, 2, 3], [4, 5], [6], [7])]
    assert torch.equal(together, torch.cat(split))
    assert torch.equal(keyed_noise(7, 5, [6, 1], SHAPE), together[[6, 1]])


def test_noise_levels_are_the_same_however_slots_are_split_over_ranks() -> None:
    config = NoiseScheduleConfig(shift=3.0)
    together = keyed_noise_levels(7, 5, range(8), config)
    assert torch.equal(keyed_noise_levels(7, 5, [2, 7], config), together[[2, 7]])


def test_slots_may_be_given_as_a_tensors_list_and_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    slots = torch.tensor([3, 4]).tolist()
    assert torch.equal(keyed_noise(7, 5, slots, SHAPE), keyed_noise(7, 5, [3, 4], SHAPE))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("other", [{"seed": 8}, {"step": 6}, {"slots": [1]}, {"purpose": "validation"}])
def test_every_part_of_the_key_changes_the_draw(other: dict) -> None:
    key: dict = {"seed": 7, "step": 5, "slots": [0]}
    assert not torch.equal(keyed_noise(**key, shape=SHAPE), keyed_noise(**key | other, shape=SHAPE))
    config = NoiseScheduleConfig()
    assert not torch.equal(keyed_noise_levels(**key, config=config), keyed_noise_levels(**key | other, config=config))


def test_noise_is_standard_normal_and_independent_between_slots() -> None:
    noise = keyed_noise(0, 0, range(64), (512,))
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    correlations = (noise @ noise.T / 512).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / 512**0.5


def test_uniform_draws_over_steps_and_slots_are_uniform() -> None:
    draws = torch.cat([keyed_uniform(3, step, range(32), purpose="noise_level") for step in range(100)])
    expected = (torch.arange(len(draws), dtype=torch.float64) + 0.5) / len(draws)
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is exceeded once in a thousand seeds.
    assert (draws.sort().values - expected).abs().max() < 1.95 / len(draws) ** 0.5
    assert draws.unique().numel() == len(draws)


def test_noise_is_given_in_the_dtype_asked_for() -> None:
    noise = keyed_noise(0, 0, [0], SHAPE, dtype=torch.bfloat16)
    assert noise.dtype == torch.bfloat16
    assert torch.equal(noise, keyed_noise(0, 0, [0], SHAPE).bfloat16())


def test_noisy_latents_run_from_data_to_noise() -> None:
    latents, noise = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    noisy = add_noise(latents, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    torch.testing.assert_close(noisy[2], noise[2])


def test_the_model_sees_the_noisy_latents_and_a_timestep_in_thousandths() -> None:
    latents, noise = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    levels, text = torch.tensor([0.999, 0.5]), torch.randn(2, 3)
    seen: list[Tensor] = []

    def model(noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        seen.extend((noisy, timestep, text))
        return torch.zeros_like(noisy)

    rectified_flow_loss(model, latents, text, noise, levels)
    assert torch.equal(seen[0], add_noise(latents, noise, levels))
    torch.testing.assert_close(seen[1], torch.tensor([999.0, 500.0]))
    assert torch.equal(seen[2], text)


def test_the_loss_is_each_samples_mean_squared_distance_to_noise_minus_data() -> None:
    latents, noise = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    offset = torch.tensor([0.0, 3.0]).view(2, 1, 1, 1, 1)
    levels = keyed_noise_levels(0, 0, range(2), NoiseScheduleConfig(distribution=NoiseDistribution.uniform))
    losses = rectified_flow_loss(lambda *_: noise - latents + offset, latents, torch.zeros(2, 1), noise, levels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.tensor([0.0, 9.0]))


def test_the_loss_is_computed_in_float32_for_a_bf16_velocity() -> None:
    latents, noise = torch.zeros(1, *SHAPE), torch.full((1, *SHAPE), 1.001)
    losses = rectified_flow_loss(
        lambda *_: torch.ones(1, *SHAPE, dtype=torch.bfloat16), latents, torch.zeros(1, 1), noise, torch.tensor([0.5])
    )
    assert losses.item() == pytest.approx(1e-6, rel=1e-3)


def test_known_frames_are_seen_clean_and_not_trained() -> None:
    latents, noise = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    unknown = torch.ones(2, 1, 3, 1, 1)
    unknown[0, :, :2] = 0
    condition = CleanFrames(latents, unknown, [1, 1, 1])
    velocity = (noise - latents + 3).requires_grad_()
    seen: list[Tensor] = []

    def model(noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        seen.extend((noisy, timestep))
        return velocity * torch.where(unknown.bool(), 1.0, 100.0)

    levels = torch.tensor([0.25, 0.5])
    losses = rectified_flow_loss(model, latents, torch.zeros(2, 1), noise, levels, condition)
    torch.testing.assert_close(losses, torch.tensor([9.0, 9.0]))
    noisy = add_noise(latents, noise, levels)
    assert torch.equal(seen[0][0, :, :2], latents[0, :, :2])
    assert torch.equal(seen[0][0, :, 2], noisy[0, :, 2])
    assert torch.equal(seen[0][1], noisy[1])
    assert seen[1].tolist() == [[0.0, 0.0, 250.0], [500.0, 500.0, 500.0]]
    losses.sum().backward()
    assert velocity.grad is not None
    assert velocity.grad[0, :, :2].abs().sum() == 0
    # A sample of which little is unknown weighs as much as another: its mean is over fewer places.
    torch.testing.assert_close(velocity.grad[0].sum(), velocity.grad[1].sum())


def test_image_channels_stand_behind_the_noisy_latents() -> None:
    latents, noise, channels = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE), torch.randn(2, 5, *SHAPE[1:])
    seen: list[Tensor] = []

    def model(noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        seen.extend((noisy, timestep))
        return noise - latents + 2

    levels = torch.tensor([0.25, 0.5])
    losses = rectified_flow_loss(model, latents, torch.zeros(2, 1), noise, levels, ImageChannels(channels))
    torch.testing.assert_close(losses, torch.tensor([4.0, 4.0]))  # over all places: known ones are made anew too
    assert torch.equal(seen[0], torch.cat((add_noise(latents, noise, levels), channels), dim=1))
    assert seen[1].tolist() == [250.0, 500.0]


def test_noise_is_added_as_diffusers_flow_matching_does() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the extra `test` is not installed")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    latents, noise = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    timesteps = scheduler.timesteps[[0, 400, 999]]
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(add_noise(latents, noise, timesteps / 1000), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_noise_levels_are_the_quantiles_of_a_shifted_logit_normal(shift: float) -> None:
    config = NoiseScheduleConfig(logit_mean=0.3, logit_std=1.2, shift=shift)
    keyed = keyed_uniform(3, 1, range(64), purpose="noise_level").tolist()
    # A shift of s is a shift of its logit by log(shift).
    quantiles = [NormalDist(0.3 + math.log(shift), 1.2).inv_cdf(number) for number in keyed]
    expected = torch.tensor([1 / (1 + math.exp(-quantile)) for quantile in quantiles])
    torch.testing.assert_close(keyed_noise_levels(3, 1, range(64), config), expected, rtol=1e-6, atol=1e-6)
