"""Two attempts at one run: whoever lives has it, whoever is dead has not, wherever it was."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from muybridge.train import run_lock
from muybridge.train.run_lock import LOCK_NAME, RunIsLocked, RunLock

BEAT = 0.3  # with room for a busy machine


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "on_rank_0", lambda work: work())
    monkeypatch.setattr(run_lock.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(run_lock, "_WATCHED_BEATS_ELSEWHERE", 6)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.3)


Fork = Callable[[Callable[[], object]], int]


@pytest.fixture
def fork() -> Iterator[Fork]:
    """Runs a function in a process of its own, which then sleeps; returns its number. It is killed at the end."""
    children = []

    def start(function: Callable[[], object]) -> int:
        pid = os.fork()
        if not pid:
            try:
                function()
                time.sleep(60)
            finally:
                os._exit(1)
        children.append(pid)
        return pid

    yield start
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def elsewhere(lock: RunLock) -> RunLock:
    """A lock whose process is on another machine."""
    lock._own = replace(lock._own, host="node-7", boot="another", pid=1)
    return lock


def hold(run_dir: Path, change: Callable[[RunLock], RunLock] = lambda lock: lock) -> Callable[[], object]:
    return lambda: change(RunLock(run_dir)).acquire()


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 40
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def until_held(run_dir: Path) -> str:
    lock = run_dir / LOCK_NAME
    until(lambda: lock.exists() and lock.read_text() != "")
    return lock.read_text()


def test_a_released_lock_is_free(tmp_path: Path) -> None:
    for _ in range(2):
        lock = RunLock(tmp_path / "run")
        lock.acquire()
        assert lock.still_ours()
        lock.release()
        assert not list((tmp_path / "run").iterdir())


def test_the_holder_shows_that_it_lives(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    text = (tmp_path / LOCK_NAME).read_text()
    until(lambda: (tmp_path / LOCK_NAME).read_text() != text)
    first, later = json.loads(text), json.loads((tmp_path / LOCK_NAME).read_text())
    assert later["beat"] > first["beat"]
    assert {**later, "beat": 0} == {**first, "beat": 0}
    lock.release()


def test_an_attempt_that_lives_on_this_machine_is_named_at_once(tmp_path: Path, fork: Fork) -> None:
    pid = fork(hold(tmp_path))
    until_held(tmp_path)
    os.kill(pid, signal.SIGSTOP)  # however long it does not show it
    lock = RunLock(tmp_path)
    lock._changes = lambda *watched: pytest.fail("there is nothing to wait for")  # type: ignore[method-assign]
    with pytest.raises(RunIsLocked, match=rf"run_dir=.* \(process {pid} on "):
        lock.acquire()


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path, is_reaped: bool) -> None:
    pid = os.fork()
    if not pid:
        hold(tmp_path)()
        time.sleep(60)
    content = until_held(tmp_path)
    os.kill(pid, signal.SIGKILL)
    if is_reaped:
        os.waitpid(pid, 0)
    else:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    lock = RunLock(tmp_path)
    lock._changes = lambda *watched: pytest.fail("there is nothing to wait for")  # type: ignore[method-assign]
    lock.acquire()
    assert lock.still_ours()
    assert (tmp_path / LOCK_NAME).read_text() != content
    lock.release()
    if not is_reaped:
        os.waitpid(pid, 0)


def test_another_process_with_the_same_number_does_not_keep_the_lock(tmp_path: Path) -> None:
    dead = RunLock(tmp_path)
    dead._own = replace(dead._own, started="1")
    dead._create()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_an_attempt_that_lives_on_another_machine_is_found_by_its_beat(
    tmp_path: Path, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_WATCHED_BEATS_ELSEWHERE", 200)  # ended by the first beat that is seen
    fork(hold(tmp_path, elsewhere))
    until_held(tmp_path)
    with pytest.raises(RunIsLocked, match=r"in use by another attempt \(process 1 on node-7"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"attempt": "x"}'])
def test_a_lock_that_nobody_keeps_up_is_taken_over(tmp_path: Path, content: str | None) -> None:
    if content is None:
        elsewhere(RunLock(tmp_path))._create()
    else:
        (tmp_path / LOCK_NAME).write_text(content)
    began = time.monotonic()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert lock.still_ours()
    assert time.monotonic() - began > (6 if content is None else 3) * BEAT
    lock.release()


def test_a_later_life_of_the_same_job_waits_for_no_beat(
    tmp_path: Path, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The earlier one lives, on a node that Slurm has lost sight of.
    monkeypatch.setenv("MUYBRIDGE_LIFE_DIR", str(tmp_path / "7.0"))
    cut_off = elsewhere(RunLock(tmp_path))
    cut_off.acquire()
    for life in ("8.1", ""):  # another job, or none, has nobody's word that it is over
        monkeypatch.setenv("MUYBRIDGE_LIFE_DIR", str(tmp_path / life) if life else "")
        with pytest.raises(RunIsLocked):
            RunLock(tmp_path).acquire()
    monkeypatch.setenv("MUYBRIDGE_LIFE_DIR", str(tmp_path / "7.1"))
    monkeypatch.setattr(RunLock, "_changes", lambda *_: pytest.fail("it watched the beat"))
    lock = RunLock(tmp_path)
    lock.acquire()
    assert lock.still_ours()
    assert not cut_off.still_ours()
    cut_off.release()
    assert lock.still_ours()
    lock.release()


def test_of_four_who_take_over_one_has_it(tmp_path: Path, fork: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(RunLock(tmp_path))._create()
    ready, written, taken, refused = (tmp_path / name for name in ("ready", "written", "taken", "refused"))
    for folder in (ready, written, taken, refused):
        folder.mkdir()

    def count(*folders: Path) -> int:
        return sum(len(list(folder.iterdir())) for folder in folders)

    def contend() -> None:
        lock = RunLock(tmp_path)
        write, sleep = lock._write, time.sleep

        def late_write(holder: run_lock._Holder) -> None:
            lock._write = write  # type: ignore[method-assign]  # the beat's
            (ready / str(os.getpid())).touch()
            until(lambda: count(ready) == 4)  # all have seen the same lock
            write(holder)
            (written / str(os.getpid())).touch()

        def long_sleep(seconds: float) -> None:
            if seconds == run_lock._SETTLE_SECONDS:
                until(lambda: count(written) == 4)  # that is long enough for them, however busy the machine is
            sleep(seconds)

        lock._write = late_write  # type: ignore[method-assign]
        monkeypatch.setattr(run_lock, "time", SimpleNamespace(sleep=long_sleep, monotonic=time.monotonic))
        try:
            lock.acquire()
            (taken / str(os.getpid())).touch()
        except RunIsLocked:
            (refused / str(os.getpid())).touch()

    for _ in range(4):
        fork(contend)
    until(lambda: count(taken, refused) == 4)
    assert count(taken) == 1


def test_who_has_lost_the_lock_knows_it_and_leaves_it_to_the_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow, quick = RunLock(tmp_path), RunLock(tmp_path)
    slow.acquire()
    quick._write(quick._own)
    until(lambda: slow.is_lost)
    assert not quick.is_lost
    assert not slow.still_ours()
    assert quick._is_ours(), "the beat of one must not take back what the other has"
    assert "taken over by another attempt" in caplog.text
    slow.release()
    assert quick._is_ours()


@pytest.mark.parametrize("is_asked_first", [True, False])
def test_a_lock_that_a_person_removed_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_asked_first: bool
) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / LOCK_NAME).unlink()
    if is_asked_first:
        assert lock.still_ours()
    until_held(tmp_path)
    assert lock.still_ours()
    with pytest.raises(RunIsLocked):
        RunLock(tmp_path).acquire()
    assert not caplog.text
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_and_taken_is_lost(tmp_path: Path) -> None:
    lock, quick = RunLock(tmp_path), RunLock(tmp_path)
    lock._create()
    (tmp_path / LOCK_NAME).unlink()
    quick._create()
    assert not lock.still_ours()


def test_a_beat_that_cannot_be_written_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    failed: list[object] = []

    def fail(value: object) -> str:
        failed.append(value)
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "json", SimpleNamespace(dumps=fail, loads=json.loads))
        until(lambda: len(failed) >= 3)
    assert caplog.text.count("No space left") == 1
    assert lock.still_ours()
    before = until_held(tmp_path)
    until(lambda: until_held(tmp_path) != before)
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_run_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        RunLock(tmp_path / "file").acquire()
