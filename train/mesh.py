"""The processes of a run as a grid of two axes: groups over the data, and within a group the tokens of one clip.

DeepSpeed is never told: it sees all processes in one row, and each one's gradient is the part that comes through its own tokens
(its sequence settings leave the ranks with different gradients at ZeRO 0 to 2).
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
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
    """This process's place along one axis of the grid, and those in line with it; no group where it is alone."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Mesh:
    """Processes along `data` have different clips, those along `sequence` the same ones."""

    data: Axis
    sequence: Axis


def build_mesh(config: ParallelConfig, *, timeout_seconds: float) -> Mesh:
    """The grid of all processes, `data` x `sequence`. Collective; the world size is a multiple of `config.sequence`.

    `timeout_seconds` is what a collective of a group may take.
    """
    world, rank, width = dist.get_world_size(), dist.get_rank(), config.sequence
    data: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None
    if width > 1:
        grid = torch.arange(world).view(-1, width)
        # A new group has torch's limit and not that of the first one, which is above those of the watchdog.
        timeout = timedelta(seconds=timeout_seconds)
        data, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=timeout)
        sequence, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=timeout)
    elif world > 1:
        data = dist.group.WORLD
    return Mesh(Axis(rank // width, world // width, data), Axis(rank % width, width, sequence))
