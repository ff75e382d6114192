"""Noise levels: closed forms of the shift and of the distributions' quantiles."""

import math

import pytest
import torch

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


def test_faults_name_field_value_and_rule() -> None:
    assert NoiseScheduleConfig().faults("objective.noise") == []
    assert NoiseScheduleConfig(logit_std=0, shift=-1).faults("objective.noise") == [
        "objective.noise.logit_std=0 must be greater than 0",
        "objective.noise.shift=-1 must be greater than 0 (1 is off)",
    ]
