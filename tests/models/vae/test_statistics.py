"""Streaming latent statistics against one pass over everything."""

import pytest
import torch

from muybridge.models.vae.statistics import LatentStatistics


def test_updates_of_any_size_give_the_mean_and_std_of_all_positions() -> None:
    torch.manual_seed(0)
    # Far from zero, where sums of squares in single precision would lose the spread.
    latents = torch.randn(7, 3, 2, 4, 4) * torch.tensor([0.5, 1.0, 4.0]).view(1, 3, 1, 1, 1) + 300.0
    statistics = LatentStatistics()
    for part in latents.split([1, 4, 2]):
        statistics.update(part)
    positions = latents.double().transpose(0, 1).flatten(1)
    assert statistics.count == positions.shape[1]
    assert statistics.mean == pytest.approx(positions.mean(1).tolist(), abs=1e-9)
    assert statistics.std == pytest.approx(positions.std(1).tolist(), abs=1e-9)


def test_a_dead_channel_and_no_data_are_named() -> None:
    statistics = LatentStatistics()
    with pytest.raises(ValueError, match="saw 0 positions"):
        _ = statistics.std
    latents = torch.randn(2, 3, 1, 2, 2)
    latents[:, 1] = 0.25
    statistics.update(latents)
    with pytest.raises(ValueError, match=r"latent channels \[1\] are constant"):
        _ = statistics.std
