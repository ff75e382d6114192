"""Noise levels: closed forms of the shift and of the distributions' quantiles."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from muybridge.models.diffusion.noise_schedule import (
    NoiseDistribution,
    NoiseScheduleConfig,
    draw_noise_levels,
    shift_noise_level,
)

GRID = torch.arange(1, 1000, dtype=torch.float64) / 1000


def test_shift_keeps_the_ends_and_moves_the_middle_towards_noise() -> None:
    levels = shift_noise_level(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 3.0)
    assert levels.tolist() == pytest.approx([0, 0.75, 1], abs=1e-12)


def test_shift_multiplies_the_odds_so_shifts_compose() -> None:
    twice = shift_noise_level(shift_noise_level(GRID, 2.0), 1.5)
    torch.testing.assert_close(twice, shift_noise_level(GRID, 3.0))
    torch.testing.assert_close(shift_noise_level(GRID, 1.0), GRID)


def test_uniform_levels_are_the_uniform_numbers() -> None:
    config = NoiseScheduleConfig(distribution=NoiseDistribution.uniform)
    torch.testing.assert_close(draw_noise_levels(GRID, config), GRID.float())


def test_logit_normal_quantiles_follow_the_normal_distribution() -> None:
    config = NoiseScheduleConfig(logit_mean=0.4, logit_std=0.7)
    levels = draw_noise_levels(GRID, config).double()
    z = (torch.logit(levels) - 0.4) / 0.7
    torch.testing.assert_close(0.5 * (1 + torch.erf(z / math.sqrt(2))), GRID, atol=1e-6, rtol=0)


def test_shift_applies_after_the_draw() -> None:
    median = draw_noise_levels(torch.tensor([0.5]), NoiseScheduleConfig(shift=4.0))
    assert median.item() == pytest.approx(0.8)


def test_extreme_draws_stay_finite_and_inside() -> None:
    ends = torch.tensor([2**-53, 1 - 2**-53], dtype=torch.float64)
    for distribution in NoiseDistribution:
        levels = draw_noise_levels(ends, NoiseScheduleConfig(distribution=distribution, shift=5.0))
        assert ((levels >= 0) & (levels <= 1)).all()


@pytest.mark.parametrize("distribution", NoiseDistribution)
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.875), (0.875, 1.0), (0.3, 0.6)])
def test_truncated_levels_are_the_whole_distributions_within_the_ends(
    distribution: NoiseDistribution, shift: float, low: float, high: float
) -> None:
    """P(level <= x | low <= level <= high) = (F(x) - F(low)) / (F(high) - F(low)), F that of the shifted whole."""
    whole = NoiseScheduleConfig(distribution=distribution, shift=shift, logit_mean=0.2, logit_std=0.9)

    def below(level: Tensor) -> Tensor:
        odds = level / (1 - level) / shift
        if distribution is NoiseDistribution.uniform:
            return 1 - 1 / (1 + odds)
        z = (odds.log() - 0.2) / 0.9
        return 0.5 * torch.special.erfc(-z / math.sqrt(2))

    levels = draw_noise_levels(GRID, replace(whole, min_level=low, max_level=high)).double()
    assert ((levels >= low) & (levels <= high)).all()
    ends = below(torch.tensor([low, high], dtype=torch.float64))
    torch.testing.assert_close((below(levels) - ends[0]) / (ends[1] - ends[0]), GRID, atol=1e-5, rtol=0)


@pytest.mark.parametrize("distribution", NoiseDistribution)
@pytest.mark.parametrize("shift", [0.7, 1.0, 3.0, 5.0])
def test_the_whole_range_is_bit_for_bit_the_plain_draw(distribution: NoiseDistribution, shift: float) -> None:
    """Runs that began before levels could be truncated resume on the same levels."""
    plain = torch.sigmoid(torch.special.ndtri(GRID)) if distribution is NoiseDistribution.logit_normal else GRID
    levels = draw_noise_levels(GRID, NoiseScheduleConfig(distribution=distribution, shift=shift))
    assert torch.equal(levels, shift_noise_level(plain, shift).float())


def test_draws_far_out_in_either_tail_keep_their_digits() -> None:
    """Seven deviations out, where probabilities counted from the wrong side would fall on a few steps."""
    high = draw_noise_levels(GRID, NoiseScheduleConfig(min_level=0.9991)).double()
    low = draw_noise_levels(1 - GRID, NoiseScheduleConfig(max_level=1 - 0.9991)).double()
    torch.testing.assert_close(high, 1 - low, atol=1e-7, rtol=0)
    assert low.unique().numel() == GRID.numel()
    tail = torch.special.ndtr(torch.logit(low))
    whole = torch.special.ndtr(torch.logit(torch.tensor(1 - 0.9991, dtype=torch.float64)))
    torch.testing.assert_close(tail / whole, 1 - GRID, atol=1e-4, rtol=0)


def test_faults_name_field_value_and_rule() -> None:
    assert NoiseScheduleConfig().faults("objective.noise") == []
    for low, high in ((0.5, 0.5), (-0.1, 0.5), (0.0, 1.5), (0.9, 0.1)):
        assert NoiseScheduleConfig(min_level=low, max_level=high).faults("objective") == [
            f"objective.min_level={low} and objective.max_level={high} must lie in [0, 1] and in this order "
            "(0 and 1 are off)"
        ]
    nothing = NoiseScheduleConfig(logit_mean=-50.0, min_level=0.9)
    assert nothing.faults("objective") == [
        "objective.min_level=0.9 and objective.max_level=1.0 must enclose levels that "
        "objective.distribution=logit_normal can draw"
    ]
    assert NoiseScheduleConfig(logit_std=0, shift=-1).faults("objective.noise") == [
        "objective.noise.logit_std=0 must be greater than 0",
        "objective.noise.shift=-1 must be greater than 0 (1 is off)",
    ]
