"""Classifier-free guidance: u + scale (c - u) from one batched call."""

import pytest
import torch
from torch import Tensor

from muybridge.models.diffusion.guidance import guided_velocity


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
