"""A rank that is gone, hangs, or never comes: the others notice in time, say which one it was, and ask to be started again."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from muybridge.tests.faults.checks import (
    Reference,
    assert_ended,
    assert_killed_alone,
    before_step,
    finish,
    seconds_after_fault,
)
from muybridge.tests.faults.fork_server import Attempt, Fault, ForkServer, Outcome
from muybridge.tests.faults.run_folder import resumed_step
from muybridge.tests.patience import PATIENCE

HOST = socket.gethostname()
# A limit that no healthy step reaches, on a busy machine either, and the time in which the ranks tell each other.
LIMIT_SECONDS, ANSWER_SECONDS = 8 * PATIENCE, 10 * PATIENCE


@pytest.fixture
def settings(short_run: list[str], run_dir: Path) -> list[str]:
    return [*short_run, "deepspeed=zero2", f"run_dir={run_dir}"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_end_with_a_rank_that_is_killed(
    server: ForkServer, settings: list[str], reference: Reference, rank: int
) -> None:
    killed = server.run(Attempt(settings, faults={rank: [before_step(5, "kill")]}))
    assert_killed_alone(killed, rank)
    assert f"rank {rank} ({HOST}) is gone: its process was killed or crashed" in killed.ranks[1 - rank].output
    assert "the same command goes on from the last checkpoint" in killed.ranks[1 - rank].output
    assert resumed_step(finish(server, settings, reference(2)).output) in (2, 4)


@pytest.mark.faults
def test_the_others_end_with_a_rank_that_crashes_in_a_library(
    server: ForkServer, settings: list[str], reference: Reference
) -> None:
    crashed = server.run(Attempt(settings, faults={1: [before_step(5, "send", name="SIGSEGV")]}))
    assert_ended(crashed, [75, -signal.SIGSEGV])
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_the_others_end_with_a_rank_that_fails_by_itself(
    server: ForkServer, settings: list[str], reference: Reference
) -> None:
    failed = server.run(Attempt(settings, faults={1: [before_step(5, "fail", kind="builtins:KeyError")]}))
    assert_ended(failed, [1, 1])
    assert "KeyError" in failed.ranks[1].output
    assert f"rank 1 ({HOST}) ended: KeyError" in failed.ranks[0].output
    finish(server, settings, reference(2))


def hang(at: str, nth: int = 1, **more: object) -> Fault:
    return {"at": at, "nth": nth, "do": "sleep", "with": {"seconds": 1000}, **more}


def assert_found_to_hang(outcome: Outcome, words: str, run_dir: Path) -> None:
    assert_ended(outcome, [75, 75])
    assert seconds_after_fault(outcome, [0, 1]) < LIMIT_SECONDS + ANSWER_SECONDS
    assert words in outcome.ranks[0].output
    assert f"behind is rank 1 ({HOST})" in outcome.ranks[0].output
    stacks = sorted((run_dir / "stacks" / "attempt-1").iterdir())
    assert [path.name for path in stacks] == ["rank-00000.txt", "rank-00001.txt"]
    assert "in sleep" in stacks[1].read_text()  # the injected function


def test_a_rank_that_hangs_in_a_step_is_named(
    server: ForkServer, settings: list[str], reference: Reference, run_dir: Path
) -> None:
    own = [f"watchdog.step_seconds={LIMIT_SECONDS}"]
    hung = server.run(Attempt([*settings, *own], faults={1: [hang("call muybridge.train.engine:Engine.step", 5)]}))
    assert_found_to_hang(hung, f"is in the step, step 4, for more than the {LIMIT_SECONDS} s", run_dir)
    assert resumed_step(finish(server, settings, reference(2)).output) in (2, 4)


@pytest.mark.faults
def test_what_follows_the_last_step_may_take_longer_than_a_step(server: ForkServer, settings: list[str]) -> None:
    own = ["watchdog.step_seconds=5", "watchdog.data_seconds=5"]
    upload = {"at": "call muybridge.train.tracking:Tracker.close", "do": "sleep", "with": {"seconds": 9}}
    assert_ended(server.run(Attempt([*settings, *own], faults={0: [upload]})), [0, 0])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("limit", "words", "own", "fault"),
    [
        pytest.param(
            "data_seconds",
            "is in the wait for data, step 3",
            [],
            hang("call muybridge.train.ahead:BackgroundNext._next", 4),
            id="data",
        ),
        pytest.param(
            "save_seconds",
            "is in the checkpoint, step 4",
            ["checkpoint.in_background=false"],
            hang("file fsync", of=r"step-00000004.*/shard-00001"),
            id="save",
        ),
        pytest.param(
            "validation_seconds",
            "is in the validation, step 4",
            ["validation.every_steps=2", "validation.prompts=[a red circle,a blue square]", "sampler.steps=2"],
            hang("call muybridge.train.trainer:sample_videos", 2),
            id="validation",
        ),
        pytest.param(
            "setup_seconds",
            "is in setup, step 0",
            [],
            hang("call muybridge.train.trainer:build_optimizer"),
            id="set-up",
        ),
    ],
)
def test_a_rank_that_hangs_elsewhere_is_named(
    server: ForkServer,
    settings: list[str],
    reference: Reference,
    run_dir: Path,
    limit: str,
    words: str,
    own: list[str],
    fault: Fault,
) -> None:
    hung = server.run(Attempt([*settings, *own, f"watchdog.{limit}={LIMIT_SECONDS}"], faults={1: [fault]}))
    assert_found_to_hang(hung, words, run_dir)
    finish(server, settings, reference(2))


@pytest.mark.faults
def test_a_rank_that_is_only_slow_is_waited_for(server: ForkServer, settings: list[str], reference: Reference) -> None:
    own = [f"watchdog.{name}_seconds={2 * LIMIT_SECONDS}" for name in ("step", "data", "save")]
    slow = [
        {"at": "call muybridge.train.engine:Engine.step", "nth": 4, "do": "sleep", "with": {"seconds": LIMIT_SECONDS}},
        {
            "at": "call muybridge.train.ahead:BackgroundNext._next",
            "nth": 5,
            "do": "sleep",
            "with": {"seconds": LIMIT_SECONDS},
        },
    ]
    outcome = server.run(Attempt([*settings, *own], faults={0: slow}))
    assert_ended(outcome, [0, 0])
    finish(server, settings, reference(2))


# --- ranks that do not find each other -------------------------------------------------------------------------------------------

# The watchdog's limits must lie below those of collectives.
UNWATCHED = [f"watchdog.{name}_seconds=0" for name in ("setup", "data", "step", "save", "validation")]


def test_a_port_that_is_taken_is_named(server: ForkServer, settings: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        outcome = server.run(Attempt(settings, environment={"MASTER_PORT": str(port)}, missing=[1]))
    assert_ended(outcome, [75])
    assert f"MASTER_PORT={port}" in outcome.output
    assert "Traceback" not in outcome.output


def test_a_rank_that_never_comes_is_not_waited_for_without_end(server: ForkServer, settings: list[str]) -> None:
    outcome = server.run(Attempt([*settings, *UNWATCHED, "deepspeed.timeout_seconds=2"], missing=[1]))
    assert_ended(outcome, [75])
    assert "Traceback" not in outcome.output


@pytest.mark.faults
def test_a_world_of_more_ranks_than_come_is_refused(server: ForkServer, settings: list[str]) -> None:
    own = [*settings, *UNWATCHED, "deepspeed.timeout_seconds=5"]
    outcome = server.run(Attempt(own, environment={"WORLD_SIZE": "3"}))
    assert_ended(outcome, [75, 75])
    assert "WORLD_SIZE=3" in outcome.output
    assert "Traceback" not in outcome.output
