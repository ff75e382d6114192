"""Which noise levels s in [0, 1] are trained and sampled: s = 0 is data, s = 1 is noise; the model timestep is 1000 s."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

TIMESTEPS = 1000.0


class NoiseDistribution(StrEnum):
    """How training noise levels are distributed before the shift."""

    logit_normal = "logit_normal"
    uniform = "uniform"


@dataclass
class NoiseScheduleConfig:
    """The distribution of noise levels in training."""

    distribution: NoiseDistribution = NoiseDistribution.logit_normal  # logit_normal favours the middle
    logit_mean: float = 0.0  # logit_normal only: mean of logit(s) before the shift
    logit_std: float = 1.0  # logit_normal only: standard deviation of logit(s)
    shift: float = 1.0  # pushes levels towards noise, where layout and motion are decided; 1 is off

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules, as messages that name the field, the value and the rule."""
        found = []
        if self.logit_std <= 0:
            found.append(f"{field}.logit_std={self.logit_std} must be greater than 0")
        if self.shift <= 0:
            found.append(f"{field}.shift={self.shift} must be greater than 0 (1 is off)")
        return found


def shift_noise_level(noise_level: Tensor, shift: float) -> Tensor:
    """a s / (1 + (a - 1) s): what s on a small video corresponds to on one with more pixels (Stable Diffusion 3, eq. 23)."""
    return shift * noise_level / (1 + (shift - 1) * noise_level)


def draw_noise_levels(uniform: Tensor, config: NoiseScheduleConfig) -> Tensor:
    """Noise levels [B] float32 from numbers [B] uniform in (0, 1), float64, by the inverse of the distribution function."""
    noise_level = uniform.double()
    if config.distribution is NoiseDistribution.logit_normal:
        noise_level = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(noise_level))
    return shift_noise_level(noise_level, config.shift).float()
