"""The processes of a run as a grid of two axes: groups over the data, and within a group the tokens of one clip.

DeepSpeed is never told: it sees all processes in one row, and each one's gradient is the part that comes through its own tokens
(its sequence settings leave the ranks with different gradients at ZeRO 0 to 2).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

DATA, SEQUENCE = "data", "sequence"


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


def build_mesh(config: ParallelConfig, device: torch.device) -> Mesh:
    """The grid of all processes, `data` x `sequence`. Collective; the world size is a multiple of `config.sequence`."""
    world, rank, width = dist.get_world_size(), dist.get_rank(), config.sequence
    places = {DATA: (rank // width, world // width), SEQUENCE: (rank % width, width)}
    groups: dict[str, dist.ProcessGroup | None] = dict.fromkeys(places)
    if width > 1:
        grid = init_device_mesh(device.type, (world // width, width), mesh_dim_names=(DATA, SEQUENCE))
        groups = {name: grid.get_group(name) for name in places}
    elif world > 1:
        groups[DATA] = dist.group.WORLD
    return Mesh(**{name: Axis(*place, groups[name]) for name, place in places.items()})
