"""A thread that ends a run which no longer goes on, and says which rank is to blame: one that hangs, or one that is gone.

The loop says what it does (`enter`, `phase`), and each phase has a time limit. Where one is exceeded on any rank, or a process is
gone, all ranks write the stacks of their threads, rank 0 says who is behind, and all end, so that the launcher can start anew.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from .exit_codes import ExitCode
from .rank_link import Message, RankLink, link_ranks
from .stacks import Doing, what_it_does, write_stacks
from .verdict import Cause, Standing, verdict

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 3.0  # in which each rank says where it is
_WRITE_SECONDS = 5.0  # for the stacks, on a file system that may be what hangs
_GRACE_SECONDS = 15.0  # in which the others may come to the same end by themselves after one has left
# Without a single turn of this thread something holds the interpreter, and only faulthandler's own thread can say where. It cannot
# end the process: it would also end one that was suspended for so long. The others do, for which this one does not answer.
_HELD_SECONDS, _REARM_SECONDS = 1800.0, 10.0


class Phase(Enum):
    """What a rank is at, in the order in which it comes to that at a count of steps; the value is a word for people."""

    setup = "setup"
    warm_up = "the compilation of a shape"
    # After a step, which it counts.
    save = "the checkpoint"
    validation = "the validation"
    data = "the wait for data"
    agreement = "the wait for the others' data"  # it has its own
    step = "the step"
    export = "the export"
    end = "the end of the run"  # uploads, and the deletion of old checkpoints

    @property
    def order(self) -> int:
        return list(Phase).index(self)


# `agreement` has no limit: the rank that is waited for has one.
_SETTINGS = {
    Phase.setup: "setup_seconds",
    Phase.warm_up: "setup_seconds",
    Phase.data: "data_seconds",
    Phase.step: "step_seconds",
    Phase.save: "save_seconds",
    Phase.validation: "validation_seconds",
    Phase.export: "save_seconds",
    Phase.end: "save_seconds",
}


@dataclass
class WatchdogConfig:
    """How long a rank may be at one thing before the run counts as hanging; 0 is without a limit."""

    # The start, up to the first step; the first time of every other phase may take as long, as it compiles code and opens files.
    setup_seconds: float = 1800.0
    # One wait for the data of a step.
    data_seconds: float = 600.0
    # One optimizer step.
    step_seconds: float = 900.0
    # Writing a checkpoint, or the model at the end; what is left to do after that.
    save_seconds: float = 1800.0
    # One batch of a validation, or one step of the sampler that makes its videos.
    validation_seconds: float = 1800.0

    def faults(self, field: str) -> list[str]:
        names = dict.fromkeys(_SETTINGS.values())
        values = {name: getattr(self, name) for name in names}
        return [
            f"{field}.{name}={value} must be 0 (no limit) or more seconds"
            for name, value in values.items()
            if not value >= 0  # also what is no number
        ]


class _Position(NamedTuple):
    phase: Phase
    step: int
    since: float
    setting: str  # that limits it; none without a limit
    limit: float  # seconds; 0 without one


class Watchdog:
    """One a rank. It is started by its making, which is collective, and ends with `stop`."""

    def __init__(self, config: WatchdogConfig, stacks: Path, *, on_end: Callable[[str, int], None]) -> None:
        """`stacks` is the folder for what the threads did; `on_end` gets the message and exit code before this process ends."""
        self._config = config
        self._stacks, self._on_end = stacks, on_end
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._begun: set[Phase] = set()  # phases that are not at their first time
        self._stopped = threading.Event()
        self._gives_way, self._ending = threading.Event(), threading.Event()
        self._goodbyes: set[int] = set()
        self._left: tuple[float, Cause] | None = None  # when one ended for a reason of its own, and which
        self._told_at: float | None = None
        self._link, self._hosts = self._connect()
        self.enter(Phase.setup, 0)
        self._known, self._age, self._looked = self._position, 0.0, time.monotonic()
        self._armed = -_REARM_SECONDS
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: Phase, step: int) -> None:
        """Say what comes now."""
        setting = _SETTINGS.get(phase, "")
        if phase not in self._begun:
            self._begun.add(phase)
            setting = self._longer_first(setting)
        limit = getattr(self._config, setting) if setting else 0.0
        self._position = _Position(phase, step, time.monotonic(), setting, limit)

    @contextmanager
    def phase(self, phase: Phase, step: int) -> Iterator[None]:
        """What comes in this block; behind it is again what was before, with a new time limit."""
        before = self._position
        self.enter(phase, step)
        try:
            yield
        finally:
            self.enter(before.phase, before.step)

    def give_way(self, timeout_seconds: float = _ANSWER_SECONDS) -> None:
        """To be called where a collective failed: if that is because another rank is gone or has ended, this process ends here as
        all do, else this returns after so many seconds."""
        self._gives_way.set()
        self._wake()
        if self._ending.wait(timeout_seconds):
            self._thread.join()  # which ends the process

    def stop(self, cause: str = "", code: int = ExitCode.requeue) -> None:
        """Ends the watch. With a cause, this rank ends for a reason of its own: the others end with this exit code, too."""
        if self._stopped.is_set():
            return
        # First of all: the thread closes the link once it knows of the stop, and without a word this rank would be gone.
        if self._link is not None:
            self._link.send({"kind": "bye", "rank": self._rank, "cause": cause, "code": code})
        self._stopped.set()
        self._wake()
        self._thread.join(2 * _LOOK_SECONDS)

    def _longer_first(self, setting: str) -> str:
        config, usual = self._config, getattr(self._config, setting) if setting else 0.0
        if usual and not 0 < config.setup_seconds <= usual:
            return "setup_seconds"
        return setting

    def _connect(self) -> tuple[RankLink | None, dict[int, str]]:
        if self._world > 1:
            try:
                return link_ranks()
            except ConnectionError as error:  # on every rank
                if self._rank == 0:
                    _log.warning("muybridge: each rank is watched on its own, they cannot tell each other: %s", error)
        return None, {self._rank: socket.gethostname()}

    def _wake(self) -> None:
        if self._link is not None:
            self._link.wake()

    # In the thread.

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:
            print(f"muybridge: the watch failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if self._ending.is_set():
                os._exit(ExitCode.requeue)
            if self._link is not None:  # a run that is well goes on without it
                self._link.send({"kind": "bye", "rank": self._rank, "cause": "", "code": ExitCode.requeue})
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self._link is not None:
                self._link.close()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            if self._link is None:
                self._stopped.wait(_LOOK_SECONDS)
            else:
                for rank, message in self._link.poll(_LOOK_SECONDS):
                    self._hear(rank, message)
            if not self._stopped.is_set():
                self._look(time.monotonic())

    def _hear(self, rank: int, message: Message | None) -> None:
        if message is None:
            if rank not in self._goodbyes:
                self._end_all(Cause(rank, self._hosts[rank], "gone"))
        elif message["kind"] == "bye":
            self._goodbyes.add(rank)
            if message["cause"] and self._left is None:
                cause = Cause(rank, self._hosts[rank], "left", text=message["cause"], code=message["code"])
                self._left = time.monotonic(), cause
        elif message["kind"] == "alarm":
            self._end_all(Cause(**message["cause"]))
        elif message["kind"] == "report":
            self._report()

    def _look(self, now: float) -> None:
        if now - self._armed > _REARM_SECONDS:
            with suppress(OSError, ValueError, RuntimeError, AttributeError):  # without a stderr that is a file
                faulthandler.dump_traceback_later(_HELD_SECONDS)
            self._armed = now
        # A process that was suspended has not used its time, so only what this thread saw of it counts.
        if self._position is not self._known:
            self._known, self._age = self._position, 0.0
        self._age += min(now - max(self._looked, self._known.since), 2 * _LOOK_SECONDS)
        self._looked = now
        if self._left is not None and (self._gives_way.is_set() or now - self._left[0] > _GRACE_SECONDS):
            self._end_all(self._left[1])
        phase, step, _, setting, limit = self._known
        if limit and self._age > limit:
            text = f"{phase.value}, step {step}, for more than the {limit:g} s of watchdog.{setting}"
            self._end_all(Cause(self._rank, socket.gethostname(), "late", text=text))

    def _end_all(self, cause: Cause) -> None:
        """Ends this process, and by way of rank 0 all others."""
        self._ending.set()
        if self._rank and self._link is not None and self._link.ranks and 0 not in self._goodbyes:
            if self._told_at is None:
                self._told_at = time.monotonic()
                self._link.send({"kind": "alarm", "cause": vars(cause)})
            elif time.monotonic() - self._told_at > 2 * _ANSWER_SECONDS:  # rank 0 does not answer
                self._end([self._standing()], cause, silent={0: self._hosts[0]})
            return
        standings = [self._standing()]
        silent: dict[int, str] = {}
        if self._link is not None and self._rank == 0:
            self._link.send({"kind": "report"})
            silent = {rank: self._hosts[rank] for rank in self._link.ranks if rank not in self._goodbyes}
        self._write_stacks(standings[0])
        deadline = time.monotonic() + _ANSWER_SECONDS
        while silent and self._link is not None and (left := deadline - time.monotonic()) > 0:
            for rank, message in self._link.poll(left):
                if message is None or message["kind"] == "standing":
                    silent.pop(rank, None)
                if message is not None and message["kind"] == "standing":
                    standings.append(Standing(**message["standing"]))
        self._end(standings, cause, silent=silent)

    def _report(self) -> None:
        """Tells rank 0 where this one is, and ends with it."""
        assert self._link is not None
        self._ending.set()
        standing = self._standing()
        self._link.send({"kind": "standing", "standing": vars(standing)})
        self._write_stacks(standing)
        deadline = time.monotonic() + 4 * _ANSWER_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            for _, message in self._link.poll(left):
                if message is not None and message["kind"] == "end":
                    self._exit(message["text"], message["code"])
                if message is None:
                    self._exit("rank 0 ended", ExitCode.requeue)
        self._exit("rank 0 does not answer", ExitCode.requeue)

    def _end(self, standings: list[Standing], cause: Cause, *, silent: dict[int, str]) -> NoReturn:
        text = verdict(cause, standings, silent=silent, world=self._world, stacks=self._stacks)
        print(f"muybridge: {text}", file=sys.stderr, flush=True)
        if self._link is not None and self._rank == 0:
            self._link.send({"kind": "end", "text": text, "code": cause.code})
        self._exit(text, cause.code)

    def _exit(self, text: str, code: int) -> NoReturn:
        _within(_WRITE_SECONDS, lambda: self._on_end(text, code))
        _within(_WRITE_SECONDS, sys.stdout.flush)
        _within(_WRITE_SECONDS, sys.stderr.flush)
        os._exit(code)

    def _standing(self) -> Standing:
        phase, step, since, _, _ = self._position
        doing = [Doing("an unknown place", in_collective=False, collectives=0, last_collective="")]
        _within(_ANSWER_SECONDS / 2, lambda: doing.append(what_it_does()))
        return Standing(
            rank=self._rank,
            host=socket.gethostname(),
            step=step,
            order=phase.order,
            phase=phase.value,
            seconds=round(time.monotonic() - since, 1),
            **vars(doing[-1]),
        )

    def _write_stacks(self, standing: Standing) -> None:
        heading = f"rank {standing.rank} on {standing.host}, process {os.getpid()}: {standing.words()}"
        path = self._stacks / f"rank-{self._rank:05d}.txt"
        _within(_WRITE_SECONDS, lambda: write_stacks(path, heading))


def _within(seconds: float, do: Callable[[], None]) -> None:
    # In a thread of its own: what is asked or written to may be what hangs, and an end must come all the same.
    def tried() -> None:
        try:
            do()
        except Exception as error:
            print(f"muybridge: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tried, daemon=True)
    thread.start()
    thread.join(seconds)
