"""Classifier-free guidance: u + scale (c - u) from one batched call; and two experts on either side of a noise level."""

import pytest
import torch
from torch import Tensor

from muybridge.models.diffusion.guidance import expert_velocity, guided_velocity
from muybridge.models.diffusion.samplers import SamplerConfig


class Recorder:
    """A model whose velocity is latents + timestep + text, and that counts the samples of each call."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.batches.append(len(latents))
        return latents + timestep.view(-1, 1) + text


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_guidance_is_unconditional_plus_scaled_difference(scale: float) -> None:
    model = Recorder()
    latents, timestep = torch.randn(3, 2), torch.tensor([900.0, 500.0, 1.0])
    text, negative = torch.randn(3, 2), torch.randn(3, 2)
    found = guided_velocity(model, text, negative, scale)(latents, timestep)
    conditional, unconditional = (latents + timestep.view(-1, 1) + t for t in (text, negative))
    torch.testing.assert_close(found, unconditional + scale * (conditional - unconditional), atol=1e-3, rtol=1e-6)


def test_both_velocities_come_from_one_call_and_none_is_wasted_at_scale_one() -> None:
    model = Recorder()
    latents, timestep, text = torch.randn(3, 2), torch.full((3,), 10.0), torch.randn(3, 2)
    guided_velocity(model, text, text, 5.0)(latents, timestep)
    guided_velocity(model, text, text, 1.0)(latents, timestep)
    assert model.batches == [6, 3]


def test_each_expert_gets_its_own_timesteps_and_the_boundary_belongs_to_the_high_one() -> None:
    velocity = expert_velocity(lambda x, t: x + 1, lambda x, t: x - 1, boundary=0.875)
    latents = torch.zeros(2, 3)
    for timestep, answer in ((1000.0, 1), (875.0, 1), (874.99, -1), (0.0, -1)):
        assert torch.equal(velocity(latents, torch.full((2,), timestep)), torch.full((2, 3), float(answer)))


def test_a_batch_on_both_sides_of_the_boundary_is_refused() -> None:
    velocity = expert_velocity(lambda x, t: x, lambda x, t: x, boundary=0.9)
    with pytest.raises(ValueError, match=r"from 899.0 to 900.0 in one batch .* boundary 900.0"):
        velocity(torch.zeros(2, 3), torch.tensor([899.0, 900.0]))


def test_each_expert_has_its_own_guidance() -> None:
    model, text, negative = Recorder(), torch.ones(2, 2), torch.zeros(2, 2)
    scales = SamplerConfig(guidance_scale=4.0, guidance_scale_low=3.0).expert_guidance_scales()
    high, low = (guided_velocity(model, text, negative, scale) for scale in scales)
    velocity = expert_velocity(high, low, boundary=0.5)
    latents = torch.zeros(2, 2)
    torch.testing.assert_close(velocity(latents, torch.full((2,), 800.0)), torch.full((2, 2), 804.0))
    torch.testing.assert_close(velocity(latents, torch.full((2,), 100.0)), torch.full((2, 2), 103.0))
