"""Rows of metrics say how many tokens and FLOPs a second a run computes."""

from dataclasses import replace

import pytest
import torch

from muybridge.data.batch import VideoBatch
from muybridge.data.config import Access
from muybridge.train.config import TrainConfig
from muybridge.train.costs import StepFlops
from muybridge.train.utilisation import Utilisation

CPU = torch.device("cpu")


def config_of(access: Access) -> TrainConfig:
    """Clips of 17 frames of 64 x 96 pixels: 5 x 8 x 12 latents, in patches of 1 x 2 x 2."""
    config = TrainConfig()
    config.data.access, config.global_batch, config.micro_batch = access, 4, 2
    config.data.frames, config.data.height, config.data.width = 17, 64, 96
    return config


def batch_of(access: Access) -> VideoBatch:
    places = torch.arange(2)
    batch = VideoBatch(0, 4, places, places, places, torch.ones(2), ["a", "b"], ["", ""])
    if access is Access.latents:
        return replace(batch, latents=torch.zeros(2, 16, 5, 8, 12))
    return replace(batch, frames=torch.zeros(2, 17, 64, 96, 3, dtype=torch.uint8))


@pytest.mark.parametrize("access", [Access.latents, Access.raw])
def test_tokens_are_those_of_all_processes(access: Access) -> None:
    config = config_of(access)
    utilisation = Utilisation(config, 2, CPU)
    for _ in range(3):  # steps
        utilisation.add(batch_of(access))
    row = utilisation.row(2.0)
    assert row["tokens_per_second"] == 3 * 4 * (5 * 4 * 6) / 2.0
    flops = StepFlops.of(config, 2)
    assert flops is not None
    assert row["model_tflops_per_second"] == pytest.approx(flops.step((17, 64, 96), 12) / 2.0 / 2 / 1e12)
    assert set(row) == {"tokens_per_second", "model_tflops_per_second"}  # a CPU has no peak and no memory of its own
    assert utilisation.row(2.0) == {}  # each row counts anew
