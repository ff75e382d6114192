"""One attempt at a time in a run directory: a file that says who is at work there, and that changes as long as they are.

Whether its holder lives is decided by what the file says and whether that changes, never by a time that a file system or another
machine's clock gives. Where the holder was on this machine, its process is looked up.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch.distributed as dist

from .life import is_later_life_of_the_same_job, life_name
from .ranks import on_rank_0

LOCK_NAME = "lock.json"
BEAT_SECONDS = 5.0
# In which a holder that lives shows it; of another machine's files one may see an older state for most of a minute.
_WATCHED_BEATS, _WATCHED_BEATS_ELSEWHERE = 3, 12
_SETTLE_SECONDS = 0.5  # in which two who take over the same lock find out which of them has it
_LAST_WRITE_SECONDS = 5.0  # for a beat that is being written at the end, on a file system that may hang

_log = logging.getLogger(__name__)


class RunIsLocked(RuntimeError):
    """Another attempt is at work in the run directory."""


@dataclass(frozen=True)
class _Holder:
    """Who is at work; the same beat after beat but for the counter."""

    attempt: str
    host: str
    pid: int
    started: str  # of the process, in the kernel's ticks since the boot
    boot: str
    pid_namespace: str
    life: str = ""  # of a Slurm job
    beat: int = 0

    def words(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """The lock of a run directory; rank 0 holds it for all. Without `release` it is as good as gone once the process is."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_NAME
        self._own = _this_process()
        self._released = threading.Event()
        self._lost = threading.Event()
        self._asking = threading.Lock()  # the beat and whoever commits
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock; takes up to a minute where nobody can say whether its holder lives. Collective.

        Raises RunIsLocked where another attempt holds it, and OSError where the file cannot be written, on all ranks.
        """
        if problem := on_rank_0(self._acquire):
            raise RunIsLocked(problem)

    def still_ours(self) -> bool:
        """Whether the file still says so, to be asked before anything is committed; the answer of rank 0 is the one that counts."""
        return dist.get_rank() != 0 or self._is_still_ours()

    @property
    def is_lost(self) -> bool:
        """Whether rank 0 has seen that another attempt took over; asks no file, and is known a beat after it happened."""
        return self._lost.is_set()

    def release(self) -> None:
        """Let the next attempt begin at once."""
        self._released.set()
        if self._thread is not None:
            self._thread.join(_LAST_WRITE_SECONDS)
            self._thread = None
            if self._is_ours():
                self._path.unlink(missing_ok=True)

    def _acquire(self) -> str:
        # Empty, or who else holds the lock.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            content = self._read()
            if content is None:
                continue
            holder = _parsed(content)
            is_alive = self._is_alive(holder) if holder is not None else None
            who = holder.words() if holder is not None else "somebody who has not said yet who it is"
            if is_alive is None:
                is_elsewhere = holder is not None and holder.host != self._own.host
                seconds = BEAT_SECONDS * (_WATCHED_BEATS_ELSEWHERE if is_elsewhere else _WATCHED_BEATS)
                text = "muybridge: %s is locked by %s; watching for %.0f s whether that still lives"
                _log.warning(text, self._path, who, seconds)
                is_alive = self._changes(content, seconds)
            if is_alive:
                return (
                    f"run_dir={self._path.parent} is in use by another attempt ({who}, in {LOCK_NAME}); stop that, or wait for "
                    "its end"
                )
            if self._take_over(content):
                break
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        return ""

    def _is_alive(self, holder: _Holder) -> bool | None:
        # What Slurm has replaced may still run where a node is cut off. It commits nothing: the lock is no longer its own.
        if is_later_life_of_the_same_job(self._own.life, holder.life):
            return False
        return _is_alive(holder)

    def _create(self) -> bool:
        try:
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "w") as opened:
            opened.write(json.dumps(asdict(self._own)))
        return True

    def _changes(self, content: str, seconds: float) -> bool:
        # Whether somebody writes to the lock; a lock that goes away is nobody's.
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 10)
            now = self._read()
            if now != content:
                return now is not None
        return False

    def _take_over(self, content: str) -> bool:
        # Of those who do it at the same time the last one has it, which each sees a little later.
        if self._read() != content:
            return False
        self._write(self._own)
        time.sleep(_SETTLE_SECONDS)
        return self._is_ours()

    def _beat(self) -> None:
        has_failed = False
        while not self._released.wait(BEAT_SECONDS):
            try:
                if not self._is_still_ours():
                    _log.warning("muybridge: %s was taken over by another attempt", self._path)
                    return
                self._own = replace(self._own, beat=self._own.beat + 1)
                self._write(self._own)
                has_failed = False
            except OSError as error:
                if not has_failed:
                    _log.warning(
                        "muybridge: %s cannot be kept up, another attempt may take it over: %s", self._path, error
                    )
                has_failed = True

    def _is_still_ours(self) -> bool:
        with self._asking:
            # One that a person has removed is nobody's, and ours again if nobody else was first.
            if not self._is_ours() and not (self._read() is None and self._create()):
                self._lost.set()
            return not self._lost.is_set()

    def _is_ours(self) -> bool:
        holder = _parsed(self._read() or "")
        return holder is not None and holder.attempt == self._own.attempt

    def _read(self) -> str | None:
        return _content(self._path)

    def _write(self, holder: _Holder) -> None:
        staging = self._path.with_name(f"{LOCK_NAME}.{holder.attempt}.tmp")
        try:
            staging.write_text(json.dumps(asdict(holder)), encoding="utf-8")
            staging.replace(self._path)
        except OSError:
            with suppress(OSError):
                staging.unlink(missing_ok=True)
            raise


def holder_at_work(run_dir: Path) -> str:
    """Who is at work in a run directory, in words; "" for nobody. Takes no lock.

    Takes up to 15 s where only the file can tell whether its holder lives: a new attempt looks more closely.
    """
    path = run_dir / LOCK_NAME
    first = _content(path)
    holder = _parsed(first or "")
    if holder is None:
        return ""
    is_alive = _is_alive(holder)
    end = time.monotonic() + _WATCHED_BEATS * BEAT_SECONDS
    while is_alive is None and time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 10)
        if (now := _content(path)) != first:
            is_alive = now is not None
    return holder.words() if is_alive else ""


def _content(path: Path) -> str | None:
    # None where there is no lock; a link that leads nowhere is one that says nothing.
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "" if path.is_symlink() else None


def _this_process() -> _Holder:
    boot = namespace = ""
    with suppress(OSError):  # not on every system, then only beats tell
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return _Holder(uuid.uuid4().hex, socket.gethostname(), pid, _started(pid) or "", boot, namespace, life_name())


def _is_alive(holder: _Holder) -> bool | None:
    """None where this cannot be told from here."""
    here = _this_process()
    if not here.boot or (holder.boot, holder.pid_namespace) != (here.boot, here.pid_namespace):
        return None
    return _started(holder.pid) == holder.started


def _started(pid: int) -> str | None:
    """When a process of this machine was started; None where there is none, or it only waits for its parent to take note."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _parsed(content: str) -> _Holder | None:
    """None for what is no lock, or not all of one."""
    try:
        return _Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None
