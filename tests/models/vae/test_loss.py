"""The terms of the training loss, on tensors whose values can be worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from muybridge.models.vae import LatentDistribution, VAEConfig, VideoVAE
from muybridge.models.vae.loss import VAELossConfig, kl_divergence, vae_loss


def test_identical_clips_and_a_standard_normal_cost_nothing() -> None:
    pixels = torch.rand(2, 3, 5, 8, 8)
    loss = vae_loss(pixels, pixels, _distribution(0.0, 0.0), VAELossConfig())
    assert loss.total.shape == (2,)
    assert loss.total.abs().max() == 0


def test_a_constant_offset_costs_its_size_and_square_but_no_gradients() -> None:
    pixels = torch.zeros(2, 3, 5, 8, 8)
    loss = vae_loss(pixels + 0.5, pixels, _distribution(0.0, 0.0), VAELossConfig(l1=2.0, l2=4.0))
    torch.testing.assert_close(loss.l1, torch.full((2,), 0.5))
    torch.testing.assert_close(loss.l2, torch.full((2,), 0.25))
    torch.testing.assert_close(loss.total, torch.full((2,), 2.0))
    assert loss.gradient.abs().max() == loss.temporal.abs().max() == 0


def test_a_ramp_in_one_direction_costs_its_slope_at_each_scale() -> None:
    zeros = torch.zeros(1, 3, 3, 8, 8)
    along_time = zeros + 0.1 * torch.arange(3.0).view(1, 1, 3, 1, 1)
    across = zeros + 0.1 * torch.arange(8.0)
    config = VAELossConfig(scales=2)
    timed = vae_loss(along_time, zeros, _distribution(0.0, 0.0), config)
    torch.testing.assert_close(timed.temporal, torch.tensor([0.2]))  # 0.1 per frame, at two scales
    assert timed.gradient.abs().max() == 0
    spatial = vae_loss(across, zeros, _distribution(0.0, 0.0), config)
    torch.testing.assert_close(spatial.gradient, torch.tensor([0.3]))  # 0.1, and 0.2 at half the resolution
    assert spatial.temporal.abs().max() == 0


def test_stills_have_no_temporal_term() -> None:
    loss = vae_loss(torch.ones(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 8), _distribution(0.0, 0.0), VAELossConfig())
    assert loss.temporal.item() == 0
    assert loss.total.isfinite().all()


def test_divergence_is_that_of_torch_distributions() -> None:
    mean, logvar = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl_divergence(LatentDistribution(mean, logvar)), oracle.mean(dim=(1, 2, 3, 4)))


def test_losses_are_taken_in_single_precision() -> None:
    pixels = torch.rand(1, 3, 1, 8, 8)
    loss = vae_loss(pixels.bfloat16(), pixels, _distribution(0.0, 0.0), VAELossConfig())
    assert loss.total.dtype == torch.float32


def test_sampling_scales_the_noise_by_the_standard_deviation() -> None:
    distribution = _distribution(1.0, 2 * math.log(3.0))
    torch.testing.assert_close(distribution.sample(torch.ones(1, 2, 1, 1, 1)), torch.full((1, 2, 1, 1, 1), 4.0))
    torch.testing.assert_close(distribution.mode(), torch.ones(1, 2, 1, 1, 1))


def test_a_huge_log_variance_is_clamped() -> None:
    vae = VideoVAE(VAEConfig(base_dim=2, z_dim=2))
    with torch.no_grad():
        vae.quant_conv.bias[2:] = torch.tensor([1e4, -1e4])
        logvar = vae.encode(torch.zeros(1, 3, 1, 8, 8)).logvar
    assert logvar.flatten().tolist() == [20.0, -30.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VAELossConfig(kl=-1.0), "vae_loss.kl=-1.0 must not be negative"),
        (VAELossConfig(scales=0), "vae_loss.scales=0 must be at least 1"),
        (VAELossConfig(l1=0.0, l2=0.0), "vae_loss.l1 or l2 must be positive"),
    ],
)
def test_settings_that_cannot_work_are_named(config: VAELossConfig, message: str) -> None:
    assert any(message in fault for fault in config.faults("vae_loss"))


def test_defaults_have_no_fault() -> None:
    assert VAELossConfig().faults("vae_loss") == []


def _distribution(mean: float, logvar: float) -> LatentDistribution:
    shape: tuple[int, ...] = (1, 2, 1, 1, 1)
    values: list[Tensor] = [torch.full(shape, mean), torch.full(shape, logvar)]
    return LatentDistribution(*values)
