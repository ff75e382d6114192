"""Stopping on request: a signal or a stop file sets a flag, and all ranks agree on the step at which they stop."""

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that somebody asked the run to stop; a second signal ends the process at once."""

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._asked = False
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. Collective."""
        asked = self._asked or self._stop_file.exists()
        if dist.get_world_size() == 1:
            return asked
        flag = torch.tensor(float(asked), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked = True
