"""How ranks that read different shards come to one bucket a step: they tell each other what they have, and all choose alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

# Gives every rank the rows of all ranks, in their order. Collective.
Gather = Callable[[list[int]], list[list[int]]]


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after they asked each other."""

    bucket: int | None  # of the next step; None where not all ranks have one ready
    all_have_some: bool  # every rank has a step's clips of some bucket
    hopeless: int | None  # the first rank that finds nothing it can use
    unreadable: int | None  # the first rank that has met nothing but bad samples for long


def alone(row: list[int]) -> list[list[int]]:
    """The `Gather` of a single process."""
    return [row]


def agree(
    ready: Sequence[int], *, needed: Sequence[int], is_hopeless: bool, is_unreadable: bool, gather: Gather
) -> Agreement:
    """Puts together what each rank has ready of each bucket; the same answer on every rank. Collective."""
    rows = gather([*ready, int(is_hopeless), int(is_unreadable)])
    hopeless, unreadable = ([row[place] for row in rows] for place in (-2, -1))
    of_ranks = [row[:-2] for row in rows]
    return Agreement(
        common_bucket(of_ranks, needed),
        all(common_bucket([row], needed) is not None for row in of_ranks),
        hopeless.index(1) if any(hopeless) else None,
        unreadable.index(1) if any(unreadable) else None,
    )


def common_bucket(ready: Sequence[Sequence[int]], needed: Sequence[int]) -> int | None:
    """The bucket of which every rank has a step's clips, and the poorest rank most; None where there is none.

    `ready` is [ranks][buckets]; a step takes the `needed` clips of its bucket on each rank.
    """
    least = [min(clips) for clips in zip(*ready, strict=True)]
    full = [bucket for bucket, clips in enumerate(least) if clips >= needed[bucket]]
    return max(full, key=lambda bucket: (Fraction(least[bucket], needed[bucket]), -bucket), default=None)
