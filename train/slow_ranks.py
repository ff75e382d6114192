"""Which rank computes more slowly than the others: all wait for the slowest one, and no other number shows which that is."""

import socket
from statistics import median_low

import torch.distributed as dist

from .ranks import from_all_ranks

SLOW = 1.15  # times the median
WINDOWS = 3  # in a row, or it was chance
_WINDOW_SECONDS = 5.0  # of computing that the median rank has in a window at least


class SlowRanks:
    """Looks at the seconds of all ranks, a few at a time."""

    def __init__(self) -> None:
        self._seconds = [0.0] * dist.get_world_size()
        self._slow_windows = [0] * dist.get_world_size()

    def add(self, seconds: float) -> list[str]:
        """What there is to say of slow ranks after another row of metrics, in which this rank computed for so long. Collective."""
        told = from_all_ranks((socket.gethostname(), seconds))
        self._seconds = [before + more for before, (_, more) in zip(self._seconds, told, strict=True)]
        middle = median_low(self._seconds)
        if middle < _WINDOW_SECONDS:
            return []
        found = []
        for rank, of_rank in enumerate(self._seconds):
            self._slow_windows[rank] = self._slow_windows[rank] + 1 if of_rank > SLOW * middle else 0
            if self._slow_windows[rank] == WINDOWS:  # once, until it is as fast as the others in between
                found.append(
                    f"rank {rank} ({told[rank][0]}) takes {of_rank / middle:.2f} times as long to compute as the median rank, and "
                    "all wait for it: look at its machine (heat, power limit, other programs), or leave that one out"
                )
        self._seconds = [0.0] * len(self._seconds)
        return found
