"""A run that is asked to stop, wherever it is: all ranks stop after the same step, save, and ask to be started again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from muybridge.tests.faults.checks import Reference, after_step, assert_ended, before_step, finish, seconds_after_fault
from muybridge.tests.faults.fork_server import Attempt, ForkServer
from muybridge.tests.faults.run_folder import checkpoint_names, leftovers, read_rows, resumed_step
from muybridge.tests.patience import PATIENCE


@pytest.fixture
def settings(short_run: list[str], run_dir: Path) -> list[str]:
    return [*short_run, "deepspeed=zero2", f"run_dir={run_dir}"]


def test_a_signal_to_all_ranks_stops_them_after_their_step(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    stop = after_step(3, "send", name="SIGTERM")
    stopped = server.run(Attempt(settings, faults={0: [stop], 1: [stop]}))
    assert_ended(stopped, [75, 75])
    assert "stopped on request at step 3" in stopped.output
    assert checkpoint_names(run_dir) == ["step-00000002", "step-00000003"]
    assert resumed_step(finish(server, settings, reference(2)).output) == 3


@pytest.mark.parametrize(
    "name",
    ["SIGUSR2", *(pytest.param(name, marks=pytest.mark.faults) for name in ("SIGTERM", "SIGINT", "SIGUSR1"))],
)
def test_a_signal_to_one_rank_stops_both_after_the_same_step(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path, name: str
) -> None:
    stopped = server.run(Attempt(settings, faults={1: [after_step(3, "send", name=name)]}))
    assert_ended(stopped, [75, 75])
    assert checkpoint_names(run_dir)[-1] == "step-00000003"
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_a_stop_file_is_heeded_by_all(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    stopped = server.run(Attempt(settings, faults={1: [after_step(3, "touch", path=str(run_dir / "STOP"))]}))
    assert_ended(stopped, [75, 75])
    finish(server, settings, reference(2))


def test_a_signal_is_heard_while_a_rank_waits_for_its_data(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    stuck = {"at": "call muybridge.train.ahead:BackgroundNext._next", "nth": 4, "do": "send and sleep"}
    stopped = server.run(Attempt(settings, faults={1: [stuck | {"with": {"name": "SIGTERM", "seconds": 1000}}]}))
    assert_ended(stopped, [75, 75])
    assert seconds_after_fault(stopped, [0, 1]) < 15 * PATIENCE
    assert checkpoint_names(run_dir)[-1] == "step-00000003"
    finish(server, settings, reference(2))


def test_a_signal_is_heard_during_a_validation(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    own = ["validation.every_steps=3", "validation.prompts=[a red circle,a blue square]", "sampler.steps=50"]
    stop = {"at": "call muybridge.train.trainer:Trainer._validate", "do": "send", "with": {"name": "SIGTERM"}}
    stopped = server.run(Attempt([*settings, *own], faults={1: [stop]}))
    assert_ended(stopped, [75, 75])
    assert checkpoint_names(run_dir)[-1] == "step-00000003"
    assert not list((run_dir / "validation").rglob("*.mp4"))
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_a_stop_in_the_last_validation_leaves_that_out_and_no_stop_file(
    server: ForkServer, settings: list[str], run_dir: Path
) -> None:
    own = ["validation.every_steps=6", "validation.prompts=[a red circle,a blue square]", "sampler.steps=50"]
    stop = {"at": "call muybridge.train.trainer:Trainer._validate", "do": "touch"}
    outcome = server.run(Attempt([*settings, *own], faults={0: [stop | {"with": {"path": str(run_dir / "STOP")}}]}))
    assert_ended(outcome, [0, 0])
    assert "the last validation was cut short" in outcome.output
    assert not (run_dir / "STOP").exists()


@pytest.mark.faults
def test_a_signal_late_in_set_up_closes_what_was_opened(server: ForkServer, settings: list[str]) -> None:
    late = {"at": "call muybridge.train.trainer:write_provenance", "do": "send", "with": {"name": "SIGTERM"}}
    closed = {"at": "call muybridge.train.tracking:Tracker.close", "do": "nothing"}
    stopped = server.run(Attempt(settings, faults={0: [late, closed]}))
    assert_ended(stopped, [75, 75])
    assert closed["at"] in [fault["at"] for fault in stopped.faults]


@pytest.mark.faults
def test_a_signal_during_a_save_lets_it_finish(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    during = {"at": "file mkdir", "of": r"step-00000004\.tmp", "do": "send", "with": {"name": "SIGTERM"}}
    stopped = server.run(Attempt(settings, faults={0: [during]}))
    assert_ended(stopped, [75, 75])
    assert checkpoint_names(run_dir) == ["step-00000004", "step-00000005"]
    finish(server, settings, reference(2))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_a_signal_during_set_up_leaves_nothing_to_save(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path, rank: int
) -> None:
    early = {"at": "call muybridge.train.trainer:build_task", "do": "send", "with": {"name": "SIGTERM"}}
    stopped = server.run(Attempt(settings, faults={rank: [early]}))
    assert_ended(stopped, [75, 75])
    assert "Traceback" not in stopped.output
    assert not (run_dir / "checkpoints").exists() or checkpoint_names(run_dir) == []
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_two_signals_at_once_are_one_request_during_set_up(
    server: ForkServer, settings: list[str], reference: Reference
) -> None:
    once = {"at": "call muybridge.train.trainer:build_task", "do": "send", "with": {"name": "SIGINT"}}
    again = {"at": "call muybridge.train.one_attempt:OneAttempt.end", "do": "send", "with": {"name": "SIGTERM"}}
    stopped = server.run(Attempt(settings, faults={rank: [once, again] for rank in range(2)}))
    assert_ended(stopped, [75, 75])
    assert "Traceback" not in stopped.output
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_two_signals_at_once_are_one_request(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    twice = after_step(3, "send", name="SIGTERM", times=2, pause_seconds=0.1)
    stopped = server.run(Attempt(settings, faults={0: [twice], 1: [twice]}))
    assert_ended(stopped, [75, 75])
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_a_second_signal_ends_a_run_that_is_stuck(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    insist = before_step(4, "send", name="SIGTERM", times=2, pause_seconds=2.2)
    ended = server.run(Attempt(settings, faults={0: [insist], 1: [insist]}))
    assert_ended(ended, [-signal.SIGTERM, -signal.SIGTERM])
    assert resumed_step(finish(server, settings, reference(2)).output) == 2


def test_decoding_processes_ignore_a_signal_to_everybody(
    server: ForkServer, short_run: list[str], run_dir: Path
) -> None:
    settings = [*short_run, "data.access=raw", "data.workers=1", "steps=4", "deepspeed=zero2"]
    whole = server.run(Attempt([*settings, f"run_dir={run_dir.with_name('whole')}"]))
    assert_ended(whole, [0, 0])
    everybody = after_step(3, "send to session", name="SIGTERM")
    stopped = server.run(Attempt([*settings, f"run_dir={run_dir}"], faults={0: [everybody], 1: [everybody]}))
    assert_ended(stopped, [75, 75])
    assert "decoder crashed" not in stopped.output
    resumed = server.run(Attempt([*settings, f"run_dir={run_dir}"]))
    assert_ended(resumed, [0, 0])
    assert resumed_step(resumed.output) == 3
    assert len(read_rows(run_dir)) == 4
    assert read_rows(run_dir) == read_rows(run_dir.with_name("whole"))
    assert leftovers(run_dir) == []
