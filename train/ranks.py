"""What ranks tell each other outside of steps: one decides for all, or all hear what each of them found. All is collective."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_rank_0(value: T) -> T:
    """What rank 0 passes; the others' values are not looked at."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: T) -> list[T]:
    """What every rank passes, in the order of the ranks."""
    box = [value] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def on_rank_0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, where alone it runs. Its ValueError or OSError is raised on every rank."""
    answer: T | None = None
    error: ValueError | OSError | None = None
    if dist.get_rank() == 0:
        try:
            answer = work()
        except (ValueError, OSError) as raised:
            error = raised
    found, message, is_value_error = from_rank_0((answer, error and str(error), isinstance(error, ValueError)))
    if error is not None:
        raise error
    if message is not None:
        raise (ValueError if is_value_error else OSError)(message)
    return found  # type: ignore[return-value]
