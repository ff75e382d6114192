"""Which noise levels s in [0, 1] are trained and sampled: s = 0 is data, s = 1 is noise; the model timestep is 1000 s."""

import math
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
    # Levels are drawn from the part of the distribution, shift included, in [min_level, max_level]; 0 and 1 are off. An expert for
    # one end of the noise trains on its part only.
    min_level: float = 0.0
    max_level: float = 1.0

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules, as messages that name the field, the value and the rule."""
        found = []
        if self.logit_std <= 0:
            found.append(f"{field}.logit_std={self.logit_std} must be greater than 0")
        if self.shift <= 0:
            found.append(f"{field}.shift={self.shift} must be greater than 0 (1 is off)")
        if not 0 <= self.min_level < self.max_level <= 1:
            found.append(
                f"{field}.min_level={self.min_level} and {field}.max_level={self.max_level} must lie in [0, 1] "
                "and in this order (0 and 1 are off)"
            )
        elif not found and _truncation(self).mass == 0:
            found.append(
                f"{field}.min_level={self.min_level} and {field}.max_level={self.max_level} must enclose levels "
                f"that {field}.distribution={self.distribution} can draw"
            )
        return found


def shift_noise_level(noise_level: Tensor, shift: float) -> Tensor:
    """a s / (1 + (a - 1) s): what s on a small video corresponds to on one with more pixels (Stable Diffusion 3, eq. 23)."""
    return shift * noise_level / (1 + (shift - 1) * noise_level)


def log_signal_to_noise(noise_level: float) -> float:
    """log((1 - s) / s): -inf at pure noise, inf at data."""
    if noise_level in (0.0, 1.0):
        return math.inf if noise_level == 0.0 else -math.inf
    return math.log(1 - noise_level) - math.log(noise_level)


def draw_noise_levels(uniform: Tensor, config: NoiseScheduleConfig) -> Tensor:
    """Noise levels [B] float32 from numbers [B] uniform in (0, 1), float64, by the inverse of the distribution function."""
    part = _truncation(config)
    probability = uniform.double()
    if part.from_above:
        probability = 1 - probability
    probability = part.start + part.mass * probability
    if config.distribution is NoiseDistribution.logit_normal:
        quantile = torch.special.ndtri(probability)
        if part.from_above:
            quantile = -quantile
        noise_level = torch.sigmoid(config.logit_mean + config.logit_std * quantile)
    else:
        noise_level = probability
    return shift_noise_level(noise_level, config.shift).clamp(config.min_level, config.max_level).float()


@dataclass(frozen=True)
class _Truncation:
    """The probabilities, before the shift, of the levels between min_level and max_level."""

    start: float
    mass: float
    from_above: bool  # counted from 1 downwards: near 1 probabilities counted from 0 have few digits left


def _truncation(config: NoiseScheduleConfig) -> _Truncation:
    ends = torch.tensor([config.min_level, config.max_level], dtype=torch.float64)
    ends = ends / (ends + config.shift * (1 - ends))  # the levels that the shift takes to the ends; 0 and 1 stay exact
    if config.distribution is NoiseDistribution.uniform:
        return _Truncation(start=ends[0].item(), mass=(ends[1] - ends[0]).item(), from_above=False)
    quantiles = (torch.logit(ends) - config.logit_mean) / config.logit_std
    from_above = quantiles[0].item() > 0
    if from_above:
        quantiles = -quantiles.flip(0)
    start, stop = torch.special.ndtr(quantiles).tolist()
    return _Truncation(start=start, mass=stop - start, from_above=from_above)
