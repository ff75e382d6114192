"""When checkpoints are due: by steps, samples, minutes, and by what they cost."""

from pathlib import Path

import pytest

from muybridge.train.checkpoint import CheckpointConfig, Saved
from muybridge.train.save_schedule import SaveSchedule, young_daly_seconds

STEP_SECONDS, STEP_SAMPLES = 10.0, 8


def saved(*, blocking: float, total: float, failure: str = "") -> Saved:
    return Saved(1, Path("x"), failure, blocking_seconds=blocking, total_seconds=total, nbytes=1)


def schedule(*, processes: int = 1, on_gpu: bool = True, **settings: float | None) -> SaveSchedule:
    """One whose run begins at the clock's 1000 seconds."""
    config = CheckpointConfig(**{"every_steps": None, **settings})
    found = SaveSchedule(config, processes=processes, on_gpu=on_gpu)
    found.start(samples=0, seconds=1000.0)
    return found


def due_steps(asked: SaveSchedule, steps: range) -> list[int]:
    return [
        step
        for step in steps
        if asked.is_due(step=step, samples=STEP_SAMPLES * step, seconds=1000 + STEP_SECONDS * step)
    ]


def test_steps_count_from_the_beginning_of_the_run() -> None:
    assert due_steps(schedule(every_steps=4), range(1, 13)) == [4, 8, 12]
    # Also where it goes on in between.
    assert due_steps(schedule(every_steps=4), range(7, 13)) == [8, 12]


def test_none_is_due_where_only_the_last_is_wanted() -> None:
    assert due_steps(schedule(every_steps=0), range(1, 13)) == []


def test_samples_are_due_at_the_step_that_passes_a_multiple() -> None:
    assert due_steps(schedule(every_samples=20), range(1, 11)) == [3, 5, 8, 10]
    resumed = schedule(every_samples=20)
    resumed.start(samples=STEP_SAMPLES * 5, seconds=0.0)
    assert due_steps(resumed, range(6, 11)) == [8, 10]


def test_minutes_run_from_one_save_to_the_next() -> None:
    assert due_steps(schedule(every_minutes=0.5), range(1, 11)) == [3, 6, 9]
    late = schedule(every_minutes=0.5)
    assert late.is_due(step=1, samples=1, seconds=1100.0)
    assert not late.is_due(step=2, samples=2, seconds=1129.0)
    assert late.is_due(step=3, samples=3, seconds=1130.0)


def test_the_interval_follows_from_what_a_save_costs_and_how_many_can_fail() -> None:
    # 2 s at each save, and a failure in 8100 hours of one of 8 GPUs.
    one = schedule(processes=8)
    one.saved(saved(blocking=2.0, total=9.0))
    assert one.interval_seconds() == pytest.approx((4 * 3600 * 8100 / 8) ** 0.5)
    assert one.interval_seconds() == young_daly_seconds(2.0, 8 / (8100 * 3600))
    many = schedule(processes=800)
    many.saved(saved(blocking=2.0, total=9.0))
    assert many.interval_seconds() == pytest.approx(one.interval_seconds() / 10)


def test_the_least_is_lost_at_that_interval() -> None:
    cost, rate = 2.0, 1 / 50_000

    def lost(interval: float) -> float:  # seconds of a second: in saving, and half an interval at each failure
        return cost / interval + rate * interval / 2

    best = young_daly_seconds(cost, rate)
    assert all(lost(best) < lost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_saves_leave_the_disk_time_to_rest() -> None:
    asked = schedule(processes=16_384)
    asked.saved(saved(blocking=0.01, total=5.0))
    assert asked.interval_seconds() == 60.0
    asked.saved(saved(blocking=0.01, total=100.0))
    assert asked.interval_seconds() == 200.0


@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_first_save_of_an_attempt_comes_soon(on_gpu: bool) -> None:
    asked = schedule(on_gpu=on_gpu)
    assert asked.interval_seconds() == 300.0
    asked.saved(saved(blocking=1.0, total=2.0))
    assert asked.interval_seconds() > 1000
    assert schedule(processes=16_384).interval_seconds() == 60.0
    assert schedule(every_minutes=20.0).interval_seconds() == 1200.0


def test_a_failed_save_tells_nothing_of_the_cost() -> None:
    asked = schedule()
    before = asked.interval_seconds()
    asked.saved(saved(blocking=50.0, total=1000.0, failure="the disk is full"))
    assert asked.interval_seconds() == before


def test_the_explanation_says_what_the_interval_rests_on() -> None:
    assert schedule(every_steps=4).explanation() == "a checkpoint every 4 steps"
    assert schedule(every_steps=0).explanation() == "a checkpoint at the end only"
    assert schedule(every_samples=20).explanation() == "a checkpoint every 20 samples"
    assert schedule(every_minutes=2.5).explanation() == "a checkpoint every 2.5 minutes"
    asked = schedule(processes=64)
    expected = "a checkpoint after 5 minutes, and then as often as what it costs suggests; a failure every 127 hours is"
    assert asked.explanation().startswith(expected)
    asked.saved(saved(blocking=0.25, total=9.0))
    assert asked.explanation().startswith(
        "a checkpoint every 7.95 minutes: training stands still for 0.25 s at each; a"
    )
    assert "a failure every 168 hours" in schedule(processes=64, on_gpu=False).explanation()
