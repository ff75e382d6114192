from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muybridge.train import ranks, throughput
from muybridge.train.engine import StepResult
from muybridge.train.throughput import MetricsWindow


class FakeGroup:
    """The ranks of a process group, whose collectives work on a list of what each rank would send."""

    def __init__(self, others: list[Any]) -> None:
        self.others = others

    def as_dist(self, rank: int = 0) -> SimpleNamespace:
        def all_reduce(totals: torch.Tensor) -> None:
            for other in self.others:
                totals += other

        def all_gather_object(box: list[Any], own: Any) -> None:
            box[:] = [own, *self.others]

        return SimpleNamespace(
            get_rank=lambda: rank,
            get_world_size=lambda: 1 + len(self.others),
            all_reduce=all_reduce,
            all_gather_object=all_gather_object,
        )


def install(monkeypatch: pytest.MonkeyPatch, group: SimpleNamespace) -> None:
    for module in (throughput, ranks):
        monkeypatch.setattr(module, "dist", group)


RESULT = StepResult(grad_norm=2.0, applied=True)
CPU = torch.device("cpu")


def test_a_row_is_the_mean_over_all_samples_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # The other rank had losses 1 and 2 and terms 5 and 5.
    install(monkeypatch, FakeGroup([torch.tensor([3.0, 10.0, 2.0])]).as_dist())
    window = MetricsWindow(CPU)
    # A ghost counts for nothing.
    window.add(torch.tensor([4.0, 5.0, 9.0]), {"kl": torch.tensor([1.0, 1.0, 7.0])}, torch.tensor([1.0, 1.0, 0.0]))
    window.end_step(samples=4, applied=True)
    row = window.close(RESULT, lr=0.1)
    assert (row["loss"], row["kl"]) == (3.0, 3.0)
    assert (row["grad_norm"], row["lr"], row["skipped_steps"]) == (2.0, 0.1, 0.0)
    assert row["samples_per_second"] == pytest.approx(4 / row["seconds_per_step"])


def test_a_window_taken_up_from_a_checkpoint_gives_the_same_row(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGroup([]).as_dist())
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(3, generator=generator) for _ in range(7)]
    whole, first, second = (MetricsWindow(CPU) for _ in range(3))
    for number, batch in enumerate(batches):
        for window in (whole, first if number < 4 else second):
            if number == 4 and window is second:
                second.restore(first.state())
            window.add(batch, {}, torch.ones(3))
            window.end_step(samples=3, applied=number != 2)
    expected, got = whole.close(RESULT, lr=0.1), second.close(RESULT, lr=0.1)
    for name in ("loss", "skipped_steps"):
        assert got[name] == expected[name], name
    assert got["skipped_steps"] == 1


def test_the_sums_of_more_ranks_all_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = [{"sums": {"loss": float(rank)}, "samples": 2, "skipped": 1} for rank in (1, 2, 3)]
    install(monkeypatch, FakeGroup([]).as_dist())
    window = MetricsWindow(CPU)
    window.restore(saved)
    window.add(torch.tensor([4.0, 0.0]), {}, torch.ones(2))
    window.end_step(samples=1, applied=True)
    assert window.close(RESULT, lr=0.1)["loss"] == pytest.approx(10 / 8)


def test_the_sums_of_fewer_ranks_are_taken_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = [{"sums": {"loss": 6.0}, "samples": 2, "skipped": 1}]
    sums = []
    for rank in range(2):
        install(monkeypatch, FakeGroup([None]).as_dist(rank))
        window = MetricsWindow(CPU)
        window.restore(saved)
        sums.append(window.state()[0])
    assert [entry["samples"] for entry in sums] == [2, 0]
    assert [entry["sums"] for entry in sums] == [{"loss": 6.0}, {"loss": 0.0}]


def test_all_ranks_add_up_a_row_whose_steps_since_a_resume_were_all_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = [{"sums": {"loss": 6.0}, "samples": 2, "skipped": 1}]
    for rank, of_the_other in enumerate(([0.0, 0.0], [6.0, 2.0])):
        install(monkeypatch, FakeGroup([torch.tensor(of_the_other)]).as_dist(rank))
        window = MetricsWindow(CPU)
        window.restore(saved)
        window.add(torch.tensor([float("nan")]), {}, torch.ones(1))
        window.end_step(samples=1, applied=False)
        assert window.close(StepResult(grad_norm=2.0, applied=False), lr=0.1)["loss"] == 3.0


def test_a_row_closes_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGroup([]).as_dist())
    window = MetricsWindow(CPU)
    for loss in (1.0, 7.0):
        window.add(torch.tensor([loss]), {}, torch.ones(1))
        window.end_step(samples=1, applied=True)
        assert window.close(RESULT, lr=0.1)["loss"] == loss
    assert window.state() == [{"sums": {}, "samples": 0, "skipped": 0}]
