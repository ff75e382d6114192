"""Attempts at one run: two at once, many that get nowhere, and ones with other settings than those before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muybridge.tests.faults.checks import Reference, after_step, assert_ended, finish, seconds_after_fault
from muybridge.tests.faults.fork_server import Attempt, ForkServer
from muybridge.tests.faults.run_folder import checkpoint_names, read_rows, resumed_step
from muybridge.tests.patience import PATIENCE


@pytest.fixture
def settings(short_run: list[str], run_dir: Path) -> list[str]:
    return [*short_run, "deepspeed=zero2", f"run_dir={run_dir}"]


def test_a_second_attempt_beside_a_living_one_gives_way(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path, tmp_path: Path
) -> None:
    sign, over = str(tmp_path / "sign"), str(tmp_path / "over")
    first = [after_step(3, "touch", path=sign), after_step(4, "wait for", path=over)]
    second = [
        {"at": "start", "do": "wait for", "with": {"path": sign}},
        {"at": "call muybridge.train.exit_codes:os._exit", "do": "touch", "with": {"path": over}},
    ]
    outcome = server.run(Attempt(settings, faults={0: first}), Attempt(settings, faults={0: second, 1: second[:1]}))
    assert_ended(outcome, [0, 0, 75, 75])
    assert "is in use by another attempt" in outcome.ranks[2].output
    assert "Traceback" not in outcome.output
    finish(server, settings, reference(2))


def test_an_attempt_that_was_taken_for_dead_commits_nothing_more(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    lock = run_dir / "lock.json"
    stolen = after_step(4, "write", path=str(lock), text='{"attempt": "another"}')
    outcome = server.run(Attempt([*settings, "checkpoint.in_background=false"], faults={0: [stolen]}))
    assert_ended(outcome, [75, 75])
    assert "Traceback" not in outcome.output
    assert "taken over by another attempt" in outcome.output
    assert checkpoint_names(run_dir) == ["step-00000002"]
    assert read_rows(run_dir)[-1]["step"] <= 5, "it must not train on"
    assert json.loads(lock.read_text()) == {"attempt": "another"}
    lock.unlink()
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_an_attempt_that_was_taken_for_dead_ends_before_its_next_checkpoint_is_due(
    server: ForkServer, settings: list[str], run_dir: Path
) -> None:
    stolen = after_step(4, "write", path=str(run_dir / "lock.json"), text='{"attempt": "another"}')
    own = ["steps=100000", "checkpoint.every_steps=0"]
    outcome = server.run(Attempt([*settings, *own], faults={0: [stolen]}))
    assert_ended(outcome, [75, 75])
    assert "taken over by another attempt" in outcome.output
    assert seconds_after_fault(outcome, [0, 1]) < 30 * PATIENCE


def test_attempts_that_get_nowhere_are_not_repeated_for_ever(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    own = [*settings, "restart_limit=2"]
    for _ in range(2):
        killed = server.run(Attempt(own, faults={0: [after_step(1, "kill")], 1: [after_step(1, "kill")]}))
        assert 0 not in killed.codes
    refused = server.run(Attempt(own))
    assert_ended(refused, [93, 93])
    assert "made no progress: 2 attempts in a row" in refused.output
    assert "restart_limit=0" in refused.output
    assert "Traceback" not in refused.output
    finish(server, [*settings, "restart_limit=0"], reference(2))


@pytest.mark.faults
def test_attempts_that_get_somewhere_are_repeated(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    own = [*settings, "restart_limit=1", "checkpoint.every_steps=1", "checkpoint.in_background=false"]
    for _ in range(3):  # each commits a step more
        server.run(Attempt(own, faults={1: [after_step(3, "kill")]}))
    assert read_rows(run_dir)[:3] == reference(2).rows[:3]
    outcome = server.run(Attempt(own))
    assert_ended(outcome, [0, 0])
    assert read_rows(run_dir) == reference(2).rows


# --- other settings than before --------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(server: ForkServer, settings: list[str]) -> None:
    """The run, stopped after step 4."""
    assert_ended(server.run(Attempt(settings, faults={0: [after_step(4, "send", name="SIGTERM")]})), [75, 75])


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("seed=7", "seed: 0 saved, 7 now"),
        pytest.param("global_batch=8", "global_batch: 4 saved, 8 now", marks=pytest.mark.faults),
        pytest.param("model.ffn_dim=96", "does not fit the configured model", marks=pytest.mark.faults),
        pytest.param("data.caption_dropout=0.5", "data.caption_dropout", marks=pytest.mark.faults),
    ],
)
def test_settings_that_would_make_another_run_are_refused(
    server: ForkServer, settings: list[str], run_dir: Path, changed: str, words: str
) -> None:
    rows = read_rows(run_dir)
    outcome = server.run(Attempt([*settings, changed]))
    assert_ended(outcome, [64, 64])
    assert words in outcome.output
    assert "Traceback" not in outcome.output
    assert read_rows(run_dir) == rows
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    ("world", "changed"),
    [
        pytest.param(1, ["micro_batch=4"], id="one rank"),
        pytest.param(2, ["deepspeed=zero3"], id="zero3"),
        pytest.param(2, ["deepspeed=zero1", "micro_batch=1"], id="zero1", marks=pytest.mark.faults),
        pytest.param(2, ["data.workers=3"], id="workers", marks=pytest.mark.faults),
        pytest.param(3, ["micro_batch=1"], id="three ranks", marks=pytest.mark.faults),
    ],
)
def test_another_world_stage_or_micro_batch_goes_on_with_the_same_data(
    server: ForkServer, short_run: list[str], run_dir: Path, tmp_path: Path, world: int, changed: list[str]
) -> None:
    settings = [*short_run, "deepspeed=zero2", "deepspeed.precision=fp32"]
    whole = [*settings, f"run_dir={tmp_path / 'whole'}"]
    assert_ended(server.run(Attempt(whole)), [0, 0])
    broken = [*settings, f"run_dir={run_dir}"]
    assert_ended(server.run(Attempt(broken, faults={0: [after_step(4, "send", name="SIGTERM")]})), [75, 75])
    outcome = server.run(Attempt([*broken, *changed, "deepspeed.precision=fp32"], world=world))
    assert_ended(outcome, [0] * world)
    assert resumed_step(outcome.output) == 4
    expected, got = read_rows(tmp_path / "whole"), read_rows(run_dir)
    assert [row["samples_seen"] for row in got] == [row["samples_seen"] for row in expected]
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in expected], rel=2e-5)


@pytest.mark.usefixtures("stopped")
def test_a_run_can_go_back_to_an_older_checkpoint(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    outcome = finish(server, [*settings, "resume=2"], reference(2))
    assert resumed_step(outcome.output) == 2
    (aside,) = (run_dir / "checkpoints" / "set_aside").iterdir()
    assert aside.name.startswith("step-00000004-")


@pytest.mark.usefixtures("stopped")
def test_a_command_that_went_back_goes_on_when_it_is_repeated(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    own = [*settings, "resume=2", "checkpoint.keep_every=2"]
    stopped_again = server.run(Attempt(own, faults={0: [after_step(3, "send", name="SIGTERM")]}))
    assert_ended(stopped_again, [75, 75])
    assert resumed_step(stopped_again.output) == 2
    outcome = finish(server, own, reference(2))
    assert resumed_step(outcome.output) == 5
    assert "resume=2 was done by attempt 2" in outcome.output


@pytest.mark.faults
def test_a_command_that_started_anew_goes_on_when_it_is_repeated(
    server: ForkServer, settings: list[str], reference: Reference
) -> None:
    own = [*settings, "resume=never"]
    assert_ended(server.run(Attempt(own, faults={0: [after_step(4, "send", name="SIGTERM")]})), [75, 75])
    assert resumed_step(finish(server, own, reference(2)).output) == 4


@pytest.mark.usefixtures("stopped")
def test_a_way_back_that_is_refused_costs_no_newer_checkpoint(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    outcome = server.run(Attempt([*settings, "resume=2", "seed=7"]))
    assert_ended(outcome, [64, 64])
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000004"]
    assert resumed_step(finish(server, settings, reference(2)).output) == 4


@pytest.mark.faults
@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("resume", "words"), [("never", "there are checkpoints under"), ("3", "there are: step-00000004")]
)
def test_a_start_that_would_lose_something_is_refused(
    server: ForkServer, settings: list[str], reference: Reference, resume: str, words: str
) -> None:
    outcome = server.run(Attempt([*settings, f"resume={resume}"]))
    assert_ended(outcome, [64, 64])
    assert words in outcome.output
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_a_checkpoint_that_must_be_there_and_is_not_is_an_error(server: ForkServer, settings: list[str]) -> None:
    outcome = server.run(Attempt([*settings, "resume=must"]))
    assert_ended(outcome, [64, 64])
    assert "resume=must: there is no checkpoint under" in outcome.output
