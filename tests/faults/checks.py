"""What many cases assert: who ended how and when, and that a second attempt ends as if nothing had happened."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from muybridge.tests.faults.fork_server import Attempt, Fault, ForkServer, Outcome
from muybridge.tests.faults.run_folder import Story, leftovers, read_story
from muybridge.tests.patience import PATIENCE

# What an uninterrupted run of two ranks comes to at a ZeRO stage.
Reference = Callable[[int], Story]

# Seconds from a rank's death to the end of the others, which wait for it in a collective.
DETECTION_SECONDS = 10.0 * PATIENCE


def finish(server: ForkServer, settings: list[str], expected: Story) -> Outcome:
    """A second attempt, which must end as if nothing had happened."""
    outcome = server.run(Attempt(settings))
    assert outcome.codes == [0, 0], outcome.output
    assert outcome.left_behind == []
    run_dir = folder_of(settings)
    got = read_story(run_dir)
    assert got.rows == expected.rows
    assert got.last == expected.last
    assert got.shards == expected.shards
    assert leftovers(run_dir) == []
    return outcome


def folder_of(settings: list[str]) -> Path:
    """The run_dir among settings."""
    (value,) = [text.removeprefix("run_dir=") for text in settings if text.startswith("run_dir=")]
    return Path(value)


def assert_ended(outcome: Outcome, codes: list[int]) -> None:
    """The processes ended with these codes, by themselves, and nothing that they had started runs on."""
    assert outcome.codes == codes, outcome.output
    assert not outcome.is_late
    assert outcome.left_behind == []


def assert_killed_alone(outcome: Outcome, rank: int) -> None:
    """One of two ranks was killed; the other one noticed in time, and asks to be started again."""
    assert outcome.codes[rank] == -signal.SIGKILL, outcome.output
    assert outcome.codes[1 - rank] == 75, outcome.output
    assert not outcome.is_late
    assert seconds_after_fault(outcome, [1 - rank]) < DETECTION_SECONDS
    assert outcome.left_behind == []


def seconds_after_fault(outcome: Outcome, ranks: list[int]) -> float:
    """How long the last of these ranks went on after a fault, which must have struck."""
    assert outcome.faults, outcome.output
    return max(outcome.ranks[rank].seconds_after_fault or 0.0 for rank in ranks)


def in_writer(*faults: Fault) -> Fault:
    """Faults in the process that writes a rank's part of a checkpoint in the background."""
    return {"at": "start", "do": "fault the writer", "with": {"faults": faults}}


def after_step(step: int, do: str, **arguments: object) -> Fault:
    """Something that happens when the engine has taken a step, before the ranks agree on what comes next."""
    return {"at": "after muybridge.train.engine:Engine.step", "nth": step, "do": do, "with": arguments}


def before_step(step: int, do: str, **arguments: object) -> Fault:
    """Something that happens between the backward pass of a step and its update."""
    return {"at": "call muybridge.train.engine:Engine.step", "nth": step, "do": do, "with": arguments}
