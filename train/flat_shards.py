"""Where DeepSpeed keeps this rank's fp32 master weights at each ZeRO stage: flat tensors, with the address of every piece in them.

The averages and the checkpoints see a list of `FlatShard`s and nothing else of DeepSpeed's layout.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ADAMW_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one parameter: elements [start, start + numel) of it lie at `offset` of a flat shard."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass
class FlatShard:
    """A tensor of fp32 master weights that this rank owns, what lies where in it, and its optimizer's state."""

    # As the optimizer holds it, so that optimizer states can be made in its shape; on the host where the optimizer is.
    parameter: Tensor
    fragments: list[Fragment]
    optimizer_state: dict[str, Any]
    # What the optimizer keeps of each element, beside its count of steps: tensors in the state that checkpoints hold.
    state_names: tuple[str, ...] = ADAMW_STATES

    @property
    def master(self) -> Tensor:
        """The weights as one flat tensor that shares the optimizer's storage."""
        return self.parameter.view(-1)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a whole parameter, also where ZeRO-3 has split it over the processes and nothing of it is in `data`."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter the whole value [its shape], in its own dtype; where it is split over the processes, this rank's piece."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        parameter.copy_(value)
        return
    piece = value.reshape(-1)[dist.get_rank() * partition.numel() :][: partition.numel()]
    partition[: piece.numel()].copy_(piece)
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        # A node's copy, of the value before: forwards would read it, and those of frozen weights for ever.
        parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]


def build_shards(optimizer: Any, names: dict[nn.Parameter, str], *, zero: int) -> list[FlatShard]:
    """The shards of the optimizer that DeepSpeed made for a ZeRO stage, given the names of the trained parameters."""
    if zero == 0:
        return [
            FlatShard(
                parameter=parameter.data,
                fragments=[Fragment(name, start=0, numel=parameter.numel(), offset=0)],
                optimizer_state=optimizer.state[parameter],
            )
            for parameter, name in names.items()
        ]
    state = optimizer.optimizer.state
    if zero == 3:
        return [
            FlatShard(master.data, _stage3_fragments(group, names), state[master])
            for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ]
    return [
        FlatShard(master.data, _stage12_fragments(group, names), state[master])
        for group, master in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
    ]


def _stage12_fragments(group: list[nn.Parameter], names: dict[nn.Parameter, str]) -> list[Fragment]:
    fragments = []
    for parameter in group:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # lies wholly in other ranks' partitions
            continue
        in_parameter, in_shard = mapping.lp_fragment_address, mapping.hp_fragment_address
        fragments.append(Fragment(names[parameter], in_parameter.start, in_parameter.numel, offset=in_shard.start))
    return fragments


def _stage3_fragments(group: list[nn.Parameter], names: dict[nn.Parameter, str]) -> list[Fragment]:
    fragments, offset, rank = [], 0, dist.get_rank()
    for parameter in group:
        partition = parameter.partition_numel()  # type: ignore[attr-defined]
        start = rank * partition
        numel = min(partition, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if numel > 0:  # the last ranks can hold nothing but padding
            fragments.append(Fragment(names[parameter], start, numel, offset))
        offset += partition
    return fragments
