"""Which ranks compute more slowly than the others: all wait for the slowest one, and no other number shows which that is.

Ranks that share clips wait for each other within the forward pass, so that a group has one speed, and which of its ranks is the
slow one cannot be seen.
"""

import socket
from statistics import median_low

import torch.distributed as dist

from .ranks import from_all_ranks

SLOW = 1.15  # times the median
WINDOWS = 3  # in a row, or it was chance
_WINDOW_SECONDS = 5.0  # of computing that the median rank has in a window at least


class SlowRanks:
    """Looks at the seconds of all ranks, a few at a time."""

    def __init__(self, group_size: int) -> None:
        """`group_size` neighbours share their clips; 1 where each rank has its own."""
        self._size = group_size
        self._seconds = [0.0] * (dist.get_world_size() // group_size)  # of groups
        self._slow_windows = [0] * len(self._seconds)

    def add(self, seconds: float) -> list[str]:
        """What there is to say of slow ranks after another row of metrics, in which this rank computed for so long. Collective."""
        told = from_all_ranks((socket.gethostname(), seconds))
        groups = [told[first : first + self._size] for first in range(0, len(told), self._size)]
        # The least of a group, which has least of what a rank does alone and others do not wait for.
        self._seconds = [before + min(s for _, s in group) for before, group in zip(self._seconds, groups, strict=True)]
        middle = median_low(self._seconds)
        if middle < _WINDOW_SECONDS:
            return []
        found = []
        for number, (of_group, group) in enumerate(zip(self._seconds, groups, strict=True)):
            self._slow_windows[number] = self._slow_windows[number] + 1 if of_group > SLOW * middle else 0
            if self._slow_windows[number] == WINDOWS:  # once, until it is as fast as the others in between
                found.append(_sentence(number * self._size, [host for host, _ in group], of_group / middle))
        self._seconds = [0.0] * len(self._seconds)
        return found


def _sentence(first: int, hosts: list[str], ratio: float) -> str:
    if len(hosts) == 1:
        who, usual, machine = f"rank {first}", "the median rank", "its machine"
    else:
        who, usual = f"one of ranks {first} to {first + len(hosts) - 1}", "the median group"
        machine = "the machine" if len(set(hosts)) == 1 else "their machines"
    return (
        f"{who} ({', '.join(dict.fromkeys(hosts))}) takes {ratio:.2f} times as long to compute as {usual}, and all wait for it: "
        f"look at {machine} (heat, power limit, other programs), or leave that one out"
    )
