"""Training loss of the video autoencoder: L1, squared error, L1 of gradients in space and time, and KL.

All terms are means over elements, so weights do not depend on clip or latent size. Public recipes sum instead: their KL
weight w on sums is w * (latent elements / pixel elements) here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoencoder import LatentDistribution


@dataclass
class VAELossConfig:
    """Weights of the terms of the loss, whose pixels lie in [-1, 1]."""

    l1: float = 1.0  # absolute error of pixels; 0: off
    # Squared error of pixels; 0: off. L1 alone holds fresh weights at the median, a constant image, where shapes are small.
    l2: float = 15.0
    gradient: float = 0.2  # absolute error of differences between neighbours in space, summed over scales; 0: off
    temporal: float = 0.2  # absolute error of differences between successive frames, summed over scales; 0: off
    scales: int = 3  # resolutions the differences are taken at, each half the one before
    kl: float = 1e-6  # divergence from the standard normal, per latent element; 0: off

    def faults(self, field: str) -> list[str]:
        """Every broken rule, as messages that name the field under its dotted path."""
        weights = {"l1": self.l1, "l2": self.l2, "gradient": self.gradient, "temporal": self.temporal, "kl": self.kl}
        found = [f"{field}.{name}={value} must not be negative" for name, value in weights.items() if value < 0]
        if self.l1 <= 0 and self.l2 <= 0:
            found.append(f"{field}.l1 or l2 must be positive: the other terms do not fix the brightness")
        if self.scales < 1:
            found.append(f"{field}.scales={self.scales} must be at least 1")
        return found


@dataclass
class VAELoss:
    """The weighted total and its unweighted terms, one value per clip [B], fp32."""

    total: Tensor
    l1: Tensor
    l2: Tensor
    gradient: Tensor
    temporal: Tensor
    kl: Tensor


def vae_loss(
    reconstruction: Tensor, pixels: Tensor, distribution: LatentDistribution, config: VAELossConfig
) -> VAELoss:
    """Loss per clip of a reconstruction [B, 3, T, H, W] of pixels in [-1, 1]; computed in fp32."""
    error = reconstruction.float() - pixels.float()
    l1 = error.abs().mean(dim=(1, 2, 3, 4))
    l2 = error.square().mean(dim=(1, 2, 3, 4))
    gradient = temporal = error.new_zeros(error.shape[0])
    for scale in range(config.scales):
        if scale > 0:
            error = F.avg_pool3d(error, (1, 2, 2))
        # The difference operators are linear: the gradient of the error is the error of the gradients.
        gradient = gradient + _mean_absolute_difference(error, 3) + _mean_absolute_difference(error, 4)
        if error.shape[2] > 1:
            temporal = temporal + _mean_absolute_difference(error, 2)
    kl = kl_divergence(distribution)
    total = config.l1 * l1 + config.l2 * l2 + config.gradient * gradient
    total = total + config.temporal * temporal + config.kl * kl
    return VAELoss(total, l1, l2, gradient, temporal, kl)


def psnr_db(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip [B, 3, T, H, W] with values in [-1, 1], in dB [B], fp32; at most 106."""
    squared = (reconstruction.float().clamp(-1, 1) - pixels.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / squared.clamp_min(1e-10))  # pixels span 2, so the peak's square is 4


def kl_divergence(distribution: LatentDistribution) -> Tensor:
    """Mean over latent elements of KL(N(mean, exp(logvar)) || N(0, 1)), per clip [B], in nats, fp32."""
    mean, logvar = distribution.mean.float(), distribution.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean(dim=(1, 2, 3, 4))


def _mean_absolute_difference(x: Tensor, dim: int) -> Tensor:
    return x.diff(dim=dim).abs().mean(dim=(1, 2, 3, 4))
