"""What ranks tell each other between steps. Stopping on request: a signal or a stop file sets a flag, and all agree on the step."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal or a scheduler signals every process, and the launcher passes its own signal on: all that is one request.
ONE_REQUEST_SECONDS = 2.0


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a step."""

    stop: bool  # any of them was asked to stop
    replaced_samples: int  # of the step, over all ranks
    is_unreadable: bool  # one of them has read nothing but bad clips for long


def gather_over_gloo() -> Callable[[list[int]], list[list[int]]]:
    """A function that gives every rank the rows of all, equally long, in the order of the ranks. Both are collective."""
    world = dist.get_world_size()
    group = dist.new_group(backend="gloo") if world > 1 else None

    def gather(row: list[int]) -> list[list[int]]:
        if group is None:
            return [row]
        rows = [torch.empty(len(row), dtype=torch.int64) for _ in range(world)]
        dist.all_gather(rows, torch.tensor(row), group=group)
        return [part.tolist() for part in rows]

    return gather


class StopRequest:
    """Remembers that somebody asked the run to stop; another one later ends the process at once."""

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._asked_at: float | None = None
        # Over gloo: asking over NCCL would make every step wait for the GPU.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def agree(self, *, replaced_samples: int, is_unreadable: bool) -> Agreement:
        """Puts together what each rank knows; the same answer on every rank. Collective."""
        asked = self._asked_at is not None or self._stop_file.exists()
        sums = torch.tensor([asked, replaced_samples, is_unreadable], dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        asking, replaced, unreadable = sums.tolist()
        return Agreement(asking > 0, replaced, unreadable > 0)

    def clear(self) -> None:
        """Remove the stop file once it was heeded, or the next attempt would stop at its first step."""
        self._stop_file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None and now - self._asked_at > ONE_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked_at = self._asked_at or now
