"""What ranks tell each other while a run goes on: a stop or a save that was asked for, bad clips, parts of a checkpoint on disk.

A signal or a file sets a flag; what follows from it is agreed, so that all ranks do the same in the same step. Every loop that can
take long asks: for data, over validation clips, over the steps of a sampler.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from .life import Asked, stop_file

# SIGUSR2 is what the Slurm template asks for: libraries have uses of their own for SIGUSR1.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# A terminal or a scheduler signals every process, and the launcher passes its own signal on: all that is one request.
ONE_REQUEST_SECONDS = 2.0


class StopAgreed(Exception):
    """All ranks leave what they do here, to save and stop."""


class StoppedInSetUp(BaseException):
    """A signal came before there was anything to save."""

    @property
    def asked(self) -> Asked:
        """Who sent it."""
        return _sender(signal.Signals[str(self)])


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a step."""

    stop: bool  # any of them was asked to stop
    save: bool  # somebody asked for a checkpoint
    replaced_samples: int  # of the step, over all ranks
    is_unreadable: bool  # one of them has read nothing but bad clips for long
    is_written: bool  # all have written their part of the checkpoint in flight
    is_lost: bool  # another attempt has taken the run over
    seconds: float  # since the start of the run, on the clock of rank 0


def gather_over_gloo(timeout_seconds: float) -> Callable[[list[int]], list[list[int]]]:
    """A function that gives every rank the rows of all, equally long, in the order of the ranks. Both are collective."""
    world = dist.get_world_size()
    group = _gloo_group(timeout_seconds)

    def gather(row: list[int]) -> list[list[int]]:
        if group is None:
            return [row]
        rows = [torch.empty(len(row), dtype=torch.int64) for _ in range(world)]
        dist.all_gather(rows, torch.tensor(row), group=group)
        return [part.tolist() for part in rows]

    return gather


def _gloo_group(timeout_seconds: float) -> dist.ProcessGroup | None:
    # One for each use: data are agreed on in a thread beside the loop's, and a group takes one collective after the other.
    # A new group has torch's 30 minutes and not those of the first one: a rank that waits here must outlast the watchdog.
    return (
        dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        if dist.get_world_size() > 1
        else None
    )


def leave_on_signal() -> None:
    """Until there is a `Requests`, a signal raises StoppedInSetUp."""

    def leave(number: int, frame: FrameType | None) -> None:
        # The launcher's copy of the same signal must not cut short what ends the attempt in order.
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise StoppedInSetUp(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, leave)


def _sender(number: int) -> Asked:
    # Schedulers have no use for what a terminal sends.
    return Asked.user if number == signal.SIGINT else Asked.scheduler


class Requests:
    """Remembers what somebody asked the run for; a second request to stop, later, ends the process at once.

    In a Slurm job it does not: Slurm repeats SIGTERM while it counts down to SIGKILL, and a save may be done before that.
    """

    def __init__(self, run_dir: Path, *, timeout_seconds: float) -> None:
        """Collective. From here on, signals ask for a stop; so does a file STOP in the run directory, and SAVE for a checkpoint."""
        self._stop_file, self._save_file = run_dir / "STOP", run_dir / "SAVE"
        self._script_file = stop_file()
        self._asked_at: float | None = None
        # Of a stop that was agreed, as rank 0 has it.
        self.asked = Asked.scheduler
        self._began = time.monotonic()
        # One process's view of a shared folder is enough, and a stat of every rank at every step much for a file server.
        self._looks_at_files = dist.get_rank() == 0
        # Over gloo: asking over NCCL would make every step wait for the GPU.
        self._group = _gloo_group(timeout_seconds)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def agree(self, *, replaced_samples: int, is_unreadable: bool, is_written: bool, is_lost: bool) -> Agreement:
        """Puts together what each rank knows after a step; the same answer on every rank. Collective."""
        wants_save = self._looks_at_files and self._save_file.exists()
        seconds = time.monotonic() - self._began if self._looks_at_files else 0.0
        numbers = [self._asks(), wants_save, replaced_samples, is_unreadable, not is_written, is_lost, seconds]
        asking, saving, replaced, unreadable, unwritten, lost, seconds = self._sum(numbers)
        if wants_save:
            self._save_file.unlink(missing_ok=True)
        return Agreement(asking > 0, saving > 0, int(replaced), unreadable > 0, unwritten == 0, lost > 0, seconds)

    def all_ready(self, is_ready: bool) -> bool:
        """Whether every rank is ready to go on. Raises StopAgreed on all of them where one was asked to stop first. Collective."""
        asking, waiting = self._sum([self._asks(), not is_ready])
        if asking and waiting:
            raise StopAgreed
        return not waiting

    def check(self) -> None:
        """Raises StopAgreed on every rank where one was asked to stop. Collective."""
        self.all_ready(is_ready=False)

    def clear(self) -> None:
        """Remove the stop file once it was heeded, or the next attempt would stop at its first step."""
        self._stop_file.unlink(missing_ok=True)

    def _asks(self) -> bool:
        if self._looks_at_files:
            if self._stop_file.exists():
                self.asked = Asked.user
                return True
            if self._script_file is not None and self._script_file.exists():
                return True
        return self._asked_at is not None

    def _sum(self, numbers: list[float]) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        return sums.tolist()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_repeated = self._asked_at is not None and now - self._asked_at > ONE_REQUEST_SECONDS
        if is_repeated and self._script_file is None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self._asked_at is None:
            self._asked_at, self.asked = now, _sender(number)
