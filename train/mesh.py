"""The processes of a run as a grid of two axes: groups over the data, and within a group the tokens of one clip.

DeepSpeed is never told: it sees all processes in one row, and each one's gradient is the part that comes through its own tokens
(its sequence settings leave the ranks with different gradients at ZeRO 0 to 2).
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist


@dataclass
class ParallelConfig:
    """How the processes share the work."""

    # Processes that share one clip, each with a part of its tokens (Ulysses, arXiv:2309.14509); neighbours, so that they are in one
    # node where it divides the GPUs of a node. 1: every process has clips of its own.
    sequence: int = 1

    def faults(self, field: str) -> list[str]:
        return [] if self.sequence >= 1 else [f"{field}.sequence={self.sequence} must be at least 1"]


@dataclass(frozen=True)
class Axis:
    """This process's place along one axis of the grid, and those in line with it."""

    rank: int
    size: int
    group: dist.ProcessGroup | None  # none where it is alone, nor along `data`, where nothing is sent

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Mesh:
    """Processes along `data` have different clips, those along `sequence` the same ones."""

    data: Axis
    sequence: Axis


def build_mesh(config: ParallelConfig, *, timeout_seconds: float) -> Mesh:
    """The grid of all processes, `data` x `sequence`. Collective along `sequence`; its size divides that of the world.

    `timeout_seconds` is what a collective of a group may take.
    """
    world, rank, width = dist.get_world_size(), dist.get_rank(), config.sequence
    group: dist.ProcessGroup | None = None
    if width > 1:
        first = rank // width * width
        # Each makes its own and waits for its members only: otherwise thousands of processes wait for all at each of their groups.
        # A new group has torch's limit and not that of the first one, which is above those of the watchdog.
        group = dist.new_group(
            list(range(first, first + width)),
            timeout=timedelta(seconds=timeout_seconds),
            use_local_synchronization=True,
        )
    return Mesh(Axis(rank // width, world // width, None), Axis(rank % width, width, group))
