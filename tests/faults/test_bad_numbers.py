"""Numbers that are wrong: losses that are not finite, weights that are not, a flipped bit, a loss far out of what is usual."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muybridge.tests.faults.checks import Reference, after_step, assert_ended, finish, in_writer
from muybridge.tests.faults.fork_server import Attempt, Fault, ForkServer
from muybridge.tests.faults.run_folder import checkpoint_names, read_rows, read_story, resumed_step


def loss_times(factor: float | str, nth: int) -> Fault:
    losses = "after muybridge.train.tasks:TextToVideoTask.losses"
    return {"at": losses, "nth": nth, "do": "scale loss", "with": {"factor": factor}}


@pytest.fixture
def settings(short_run: list[str], run_dir: Path) -> list[str]:
    return [*short_run, "deepspeed=zero2", f"run_dir={run_dir}"]


@pytest.mark.parametrize(
    "zero", [pytest.param(1, marks=pytest.mark.faults), 2, pytest.param(3, marks=pytest.mark.faults)]
)
def test_a_loss_that_is_not_finite_on_one_rank_costs_its_step(
    server: ForkServer, short_run: list[str], run_dir: Path, reference: Reference, zero: int
) -> None:
    settings = [*short_run, f"deepspeed=zero{zero}", f"run_dir={run_dir}"]
    outcome = server.run(Attempt(settings, faults={1: [loss_times("nan", 3)]}))
    assert_ended(outcome, [0, 0])
    rows = read_rows(run_dir)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert rows[:2] == reference(zero).rows[:2]
    # The data go on: the fourth step has its own samples, with the weights that the second one left.
    assert [row["samples_seen"] for row in rows] == [4, 8, 12, 16, 20, 24]
    (line,) = [line for line in outcome.output.splitlines() if "is left out" in line]
    assert "slot" in line
    assert "row" in line


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_losses_that_stay_not_finite_end_the_run(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path, rank: int
) -> None:
    # Behind the checkpoint of step 4, which would keep that a step was left out.
    faults = [loss_times("inf", number) for number in (5, 6)]
    own = ["guards.max_skipped_in_a_row=1"]
    # That checkpoint is still being written when the run ends.
    slow = in_writer({"at": "file fsync", "of": r"step-00000004.*run\.json", "do": "sleep", "with": {"seconds": 3}})
    outcome = server.run(Attempt([*settings, *own], faults={rank: [*faults, slow]}))
    assert_ended(outcome, [77, 77])
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000004"]
    assert "guards.max_skipped_in_a_row" in outcome.ranks[0].output
    assert "Traceback" not in outcome.output
    assert "slot" in outcome.ranks[0].output
    finish(server, settings, reference(2))


def test_weights_that_are_not_finite_are_never_saved(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    outcome = server.run(Attempt(settings, faults={1: [after_step(3, "poison weights")]}))
    assert "holds NaN or infinite values; the checkpoint is refused" in outcome.output
    assert checkpoint_names(run_dir) == ["step-00000002"]
    assert outcome.codes in ([75, 75], [77, 77])
    assert resumed_step(finish(server, settings, reference(2)).output) == 2


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.faults), 2])
def test_a_flipped_bit_in_the_weights_of_one_rank_ends_the_run(
    server: ForkServer, short_run: list[str], reference: Reference, run_dir: Path, zero: int
) -> None:
    settings = [*short_run, f"deepspeed=zero{zero}", f"run_dir={run_dir}"]
    flip = after_step(4, "flip weight")
    outcome = server.run(Attempt([*settings, "guards.hash_every_steps=1"], faults={1: [flip]}))
    assert_ended(outcome, [75, 75])
    assert "Traceback" not in outcome.output
    assert "step-00000004" not in checkpoint_names(run_dir)
    finish(server, settings, reference(zero))


ROLLS_BACK = ["steps=60", "checkpoint.every_steps=10", "guards.spike_policy=roll_back"]


@pytest.mark.faults
@pytest.mark.parametrize("zero", [2, 3])
def test_a_run_that_went_back_and_was_stopped_goes_on_as_one_that_was_not(
    server: ForkServer, short_run: list[str], tmp_path: Path, zero: int
) -> None:
    spike = loss_times(1000, 56)
    common = [*short_run, f"deepspeed=zero{zero}", *ROLLS_BACK, "tracking.log_every_steps=7"]
    whole, stopped = ([*common, f"run_dir={tmp_path / name / 'run'}"] for name in ("whole", "stopped"))
    assert_ended(server.run(Attempt(whole, faults={0: [spike], 1: [spike]})), [0, 0])
    stop = after_step(58, "send", name="SIGTERM")  # two steps after the run went back
    assert_ended(server.run(Attempt(stopped, faults={0: [spike, stop], 1: [spike]})), [75, 75])
    assert resumed_step(finish(server, stopped, read_story(tmp_path / "whole" / "run")).output) == 52


@pytest.mark.faults
def test_a_stop_behind_a_damaged_checkpoint_that_a_run_went_around_is_saved(
    server: ForkServer, settings: list[str], run_dir: Path
) -> None:
    newest = run_dir / "checkpoints" / "step-00000050"
    spike = loss_times(1000, 56)
    faults = [
        after_step(50, "touch", path=str(run_dir / "SAVE")),
        after_step(55, "write", path=str(newest / "MANIFEST.json"), text="{}"),
        spike,
        after_step(66, "send", name="SIGTERM"),  # back from step 40, at 50 again
    ]
    own = [*ROLLS_BACK, "checkpoint.every_steps=20", "checkpoint.in_background=false"]
    outcome = server.run(Attempt([*settings, *own], faults={0: faults, 1: [spike]}))
    assert_ended(outcome, [75, 75])
    assert "back at step 40" in outcome.output
    assert "stopped on request at step 50" in outcome.output
    assert checkpoint_names(run_dir)[-1] == "step-00000050"


@pytest.mark.faults
def test_a_spike_before_the_first_checkpoint_costs_its_step(
    server: ForkServer, settings: list[str], run_dir: Path
) -> None:
    own = ["steps=60", "checkpoint.every_steps=0", "guards.spike_policy=roll_back"]
    spike = loss_times(1000, 56)
    outcome = server.run(Attempt([*settings, *own], faults={0: [spike], 1: [spike]}))
    assert_ended(outcome, [0, 0])
    assert outcome.output.count("stands out") == 1
    assert [row["skipped_steps"] for row in read_rows(run_dir)] == [*[0] * 55, 1, *[0] * 4]


@pytest.mark.faults
def test_a_spike_takes_the_run_back_and_around_its_samples(
    server: ForkServer, settings: list[str], run_dir: Path
) -> None:
    spike = loss_times(1000, 56)
    outcome = server.run(Attempt([*settings, *ROLLS_BACK], faults={0: [spike], 1: [spike]}))
    assert_ended(outcome, [0, 0])
    assert "the run goes back to the last checkpoint" in outcome.output
    rows = read_rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert max(row["loss"] for row in rows) < 100
    events = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    (back,) = [event for event in events if event["event"] == "roll_back"]
    assert (back["from_step"], back["to_step"]) == (55, 50)
    # Samples of the steps between were seen by nobody: what the loader counts jumps over them.
    assert rows[50]["samples_seen"] == 4 * (51 + 6)
