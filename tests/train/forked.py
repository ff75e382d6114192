"""Ranks as forked processes: a start of torch costs seconds, a fork nothing. For programs that have nothing but imported so far."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muybridge.tests.patience import PATIENCE

Rank = Callable[[int, Path], None]
DEADLINE = 120.0 * PATIENCE  # of a group that should have ended long before


@dataclass
class Group:
    """Some ranks of one process group in a folder of their own, each of which ends with the function's exit or with 0."""

    folder: Path
    pids: list[int]
    began: float
    codes: dict[int, int] = field(default_factory=dict)  # by rank; negative for a signal
    seconds: dict[int, float] = field(default_factory=dict)

    def has_ended(self) -> bool:
        """Whether all ranks have; those that have not by the deadline are killed."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    self.seconds[rank] = time.monotonic() - self.began
                elif time.monotonic() - self.began > DEADLINE:
                    self.kill(rank)
                    with open(self.folder / f"said-{rank}", "a") as said:
                        said.write(f"killed by its test: it did not end within {DEADLINE:g} s\n")
        return len(self.codes) == len(self.pids)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a rank that runs."""
        os.kill(self.pids[rank], number)

    def facts(self) -> dict[str, Any]:
        """Exit codes, times and what was said, as JSON."""
        said = [(self.folder / f"said-{rank}").read_text() for rank in range(len(self.pids))]
        codes, seconds = ([values.get(rank) for rank in range(len(self.pids))] for values in (self.codes, self.seconds))
        return {"codes": codes, "seconds": seconds, "said": said}


def start(function: Rank, folder: Path, *, world: int = 2) -> Group:
    """Runs `function(rank, folder)` in each of so many processes, joined over gloo; stdout and stderr go to files in the folder."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            _be(rank, world, function, folder)
        pids.append(pid)
    return Group(folder, pids, began)


def wait_for(group: Group) -> None:
    """Shows what the ranks of a group said, and ends this program where one of them failed."""
    while not group.has_ended():
        time.sleep(0.01)
    print("\n".join(group.facts()["said"]))
    if any(group.codes.values()):
        sys.exit(f"a world of {len(group.pids)} ended with {group.codes}")


def _be(rank: int, world: int, function: Rank, folder: Path) -> None:
    code = 1
    try:
        said = os.open(folder / f"said-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=DEADLINE))
        function(rank, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
