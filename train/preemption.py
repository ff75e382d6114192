"""Stopping on request: a signal or a stop file sets a flag, and all ranks agree on the step at which they stop."""

import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal or a scheduler signals every process, and the launcher passes its own signal on: all that is one request.
ONE_REQUEST_SECONDS = 2.0


class StopRequest:
    """Remembers that somebody asked the run to stop; another one later ends the process at once."""

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._asked_at: float | None = None
        # Over gloo: asking over NCCL would make every step wait for the GPU.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. Collective."""
        asked = self._asked_at is not None or self._stop_file.exists()
        if dist.get_world_size() == 1:
            return asked
        flag = torch.tensor(float(asked))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def clear(self) -> None:
        """Remove the stop file once it was heeded, or the next attempt would stop at its first step."""
        self._stop_file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None and now - self._asked_at > ONE_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked_at = self._asked_at or now
