"""What two or three ranks saved goes on on one to four, at any ZeRO stage: the same losses, and the average of plain sums."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor

from muybridge.tests.faults.checks import assert_ended
from muybridge.tests.faults.fork_server import Attempt, ForkServer
from muybridge.tests.faults.run_folder import read_rows
from muybridge.train.fragments import read_weights

SAVED, STEPS, DECAY = 4, 6, 0.9


class Saved(Protocol):
    """A finished run of so many ranks, and the settings that continue it."""

    def __call__(self, world: int, zero: int) -> tuple[Path, list[str]]: ...


@pytest.fixture(scope="module")
def saved(server: ForkServer, short_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    @cache
    def run(world: int, zero: int) -> tuple[Path, list[str]]:
        run_dir = tmp_path_factory.mktemp("saved") / "run"
        settings = [*short_run, "deepspeed.precision=fp32", f"ema.decays=[{DECAY}]", f"steps={STEPS}", "micro_batch=1"]
        settings += ["checkpoint.every_steps=1", f"checkpoint.keep_last={STEPS}"]
        first = [*settings, f"deepspeed=zero{zero}", "deepspeed.precision=fp32", f"run_dir={run_dir}"]
        assert_ended(server.run(Attempt(first, world=world)), [0] * world)
        return run_dir, settings

    return run


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param((2, 2), (4, 3), id="2 ranks of ZeRO 2 to 4 of ZeRO 3"),
        pytest.param((3, 3), (1, 0), id="3 ranks of ZeRO 3 to 1 of ZeRO 0"),
        *(
            pytest.param(source, target, marks=pytest.mark.faults)
            for source in ((2, 1), (3, 2))
            for target in ((1, 1), (2, 3), (3, 1), (4, 2))
        ),
    ],
)
def test_a_checkpoint_goes_on_in_another_world(
    server: ForkServer, saved: Saved, tmp_path: Path, source: tuple[int, int], target: tuple[int, int]
) -> None:
    whole, settings = saved(*source)
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    world, zero = target
    changed = [f"deepspeed=zero{zero}", "deepspeed.precision=fp32", f"run_dir={run_dir}", f"resume={SAVED}"]
    assert_ended(server.run(Attempt([*settings, *changed], world=world)), [0] * world)

    expected, got = read_rows(whole), read_rows(run_dir)
    assert [row["samples_seen"] for row in got] == [row["samples_seen"] for row in expected]
    # The first loss is that of the weights which were saved: other samples, noise or levels would show in its first digits.
    assert got[SAVED]["loss"] == pytest.approx(expected[SAVED]["loss"], rel=1e-6)
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in expected], rel=2e-5)

    average = read_weights(whole / "checkpoints" / f"step-{SAVED:08d}", "ema")
    for step in range(SAVED + 1, STEPS + 1):
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        average = lerp(average, read_weights(folder, "raw"), min(DECAY, (1 + step) / (10 + step)))
        found = read_weights(folder, "ema")
        assert max(float((found[name] - average[name]).abs().max()) for name in average) < 1e-7


def lerp(average: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> dict[str, Tensor]:
    """One process's average after a step, in float64."""
    return {
        name: decay * old.to(torch.float64) + (1 - decay) * weights[name].to(torch.float64)
        for name, old in average.items()
    }
