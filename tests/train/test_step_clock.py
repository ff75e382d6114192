"""The parts of a step's time do not overlap, and leave out what is not of a step."""

import time

import pytest
import torch

from muybridge.train.step_clock import Part, StepClock, time_row


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")),
    ],
)
def test_the_clock_counts_what_is_computed_and_nothing_else(device: str) -> None:
    clock = StepClock(torch.device(device))
    ones = torch.ones(1500, 1500, device=device)
    assert set(clock.take().values()) == {0.0}
    began = time.perf_counter()
    for _ in range(2):
        with clock.running(Part.forward):
            (ones @ ones).sum().item()
    spent = time.perf_counter() - began
    time.sleep(0.5)
    seconds = clock.take()
    assert 0 < seconds.pop(Part.forward) <= spent
    assert set(seconds.values()) == {0.0}
    assert set(clock.take().values()) == {0.0}


def test_the_parts_of_a_row_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("muybridge.train.step_clock.time.perf_counter", lambda: now[0])
    clock = StepClock(torch.device("cpu"))

    def spend(part: Part, seconds: float) -> None:
        with clock.running(part):
            now[0] += seconds

    for _ in range(2):
        with clock.running(Part.forward):
            spend(Part.vae, 2.0)
            spend(Part.text, 1.0)
            now[0] += 4.0
        with clock.running(Part.backward):
            now[0] += 8.0
            spend(Part.communication, 0.5)
        spend(Part.optimizer, 0.25)
        spend(Part.vae, 100.0)  # of a validation
    assert time_row(clock.take(), steps=2) == {
        "vae_seconds_per_step": 2.0,
        "text_seconds_per_step": 1.0,
        "model_seconds_per_step": 12.0,
        "communication_seconds_per_step": 0.5,
        "optimizer_seconds_per_step": 0.25,
    }
