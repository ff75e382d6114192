"""What the fault tests stand on: a forked rank is a rank as a launcher starts it, and no process outlives its case."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from muybridge.tests.faults.checks import Reference
from muybridge.tests.faults.fork_server import Attempt, ForkServer, is_running
from muybridge.tests.faults.run_folder import read_story

SLEEP = {"at": "start", "do": "sleep", "with": {"seconds": 1000}}


def test_forked_ranks_compute_what_launched_ones_do(
    reference: Reference,
    short_run: list[str],
    run_dir: Path,
    launcher: Callable[[int], list[str]],
    command_env: dict[str, str],
) -> None:
    settings = [*short_run, "deepspeed=zero2", f"run_dir={run_dir}"]
    done = subprocess.run(
        [*launcher(2), "-m", "muybridge.train", *settings], capture_output=True, text=True, check=False, env=command_env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    launched, forked = read_story(run_dir), reference(2)
    assert len(forked.rows) == 6
    assert len({row["loss"] for row in forked.rows}) == 6
    assert launched.rows == forked.rows
    assert launched.shards == forked.shards


@pytest.fixture
def light_server(command_env: dict[str, str], tmp_path: Path) -> ForkServer:
    """A server for processes that never come to train: it starts at once."""
    return ForkServer(command_env, tmp_path, preloaded=[])


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"not within 30 s: {what}"
        time.sleep(0.01)


def rank_pids(server: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]


class Interrupted(Exception):
    """What pytest-timeout or Ctrl-C would raise in the middle of a case."""


@contextmanager
def once_both_ranks_run(server: int, strike: Callable[[], None]) -> Iterator[list[int]]:
    """In this block `strike` is called, in the midst of what runs there, when the server has two ranks; gives their numbers."""
    seen: list[int] = []

    def look(*_: object) -> None:
        if not seen and len(pids := rank_pids(server)) == 2:
            seen.extend(pids)
            strike()

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupted_test_leaves_no_process(light_server: ForkServer) -> None:
    server = light_server.pid

    def interrupt() -> None:
        raise Interrupted

    with once_both_ranks_run(server, interrupt) as seen, pytest.raises(Interrupted):
        light_server.run(Attempt([], faults={0: [SLEEP], 1: [SLEEP]}))
    assert len(seen) == 2
    assert not any(map(is_running, [server, *seen]))


def test_ranks_end_with_a_server_that_is_killed(light_server: ForkServer) -> None:
    server = light_server.pid
    with (
        once_both_ranks_run(server, lambda: os.kill(server, signal.SIGKILL)) as seen,
        pytest.raises(AssertionError, match="the fork server died"),
    ):
        light_server.run(Attempt([], faults={0: [SLEEP], 1: [SLEEP]}))
    light_server.close()
    assert len(seen) == 2
    wait_until(lambda: not any(map(is_running, seen)), "the ranks' end")


def test_a_case_ends_at_its_deadline_and_says_so(light_server: ForkServer) -> None:
    outcome = light_server.run(Attempt([], faults={0: [SLEEP], 1: []}, world=2), deadline_seconds=0.5)
    assert outcome.is_late
    assert outcome.ranks[0].code == -signal.SIGKILL
    light_server.close()


def test_what_a_rank_leaves_running_is_found_and_ended(light_server: ForkServer) -> None:
    stray = {"at": "start", "do": "start a process", "with": {"command": ["sleep", "1000"]}}
    outcome = light_server.run(Attempt(["--help"], world=1, faults={0: [stray]}), linger_seconds=0.2)
    assert outcome.codes == [0], outcome.output
    assert outcome.left_behind == ["sleep 1000"]
    assert rank_pids(light_server.pid) == []
    light_server.close()
