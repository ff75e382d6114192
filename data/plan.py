"""Which clip stands in which place of which step: a pure function of the seed and the step, with no state to save.

This is the seam for buckets and mixtures: a richer plan keeps `slots` and `local_slots` and adds fields to `Slot`; the
loader only ever asks for the slots of a step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

PLAN_VERSION = 1  # part of the data fingerprint: raise it when any draw below changes

GHOST_ROW = -1

_ROUNDS = 6
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Slot:
    """One place in the global batch of a step, and the clip that fills it.

    A ghost lies behind the global batch, holds no clip and counts for nothing: it only fills up a micro-batch.
    """

    step: int
    position: int  # in the global batch
    row: int  # GHOST_ROW for a ghost
    pass_number: int  # how often this row was drawn before


def keyed_bits(seed: int, purpose: str, *key: int) -> int:
    """64 random bits that depend on the arguments alone."""
    text = ":".join([str(seed), purpose, *map(str, key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keyed_uniform(seed: int, purpose: str, *key: int) -> float:
    """A random number in [0, 1) that depends on the arguments alone."""
    return (keyed_bits(seed, purpose, *key) >> 11) / (1 << 53)


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection of 0..size-1 that computes any single value in O(1): a Feistel network with cycle walking."""

    size: int
    keys: tuple[int, ...]

    @classmethod
    def keyed(cls, size: int, seed: int, purpose: str, *key: int) -> Permutation:
        """The permutation of `size` values that belongs to these keys."""
        return cls(size, tuple(keyed_bits(seed, purpose, *key, number) for number in range(_ROUNDS)))

    def __call__(self, value: int) -> int:
        if not 0 <= value < self.size:
            raise IndexError(f"value={value} must be in 0..{self.size - 1}")
        half_bits = max(1, ((self.size - 1).bit_length() + 1) // 2)
        half_mask = (1 << half_bits) - 1
        # The network permutes 0..4**half_bits - 1, at most four times the size; following its cycle until it comes back
        # below the size permutes what we need, in fewer than four rounds on average.
        while True:
            left, right = value >> half_bits, value & half_mask
            for key in self.keys:
                left, right = right, left ^ (_mix(right ^ key) & half_mask)
            value = left << half_bits | right
            if value < self.size:
                return value


def _mix(bits: int) -> int:
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _MASK
    return bits ^ bits >> 31


@lru_cache(maxsize=16)
def _order_of_pass(size: int, seed: int, pass_number: int) -> Permutation:
    return Permutation.keyed(size, seed, "order", pass_number)


@dataclass(frozen=True)
class Plan:
    """Goes through all rows in a new order each pass; batches run on across passes, so none is padded or dropped."""

    rows: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.global_batch < 1:
            raise ValueError(f"rows={self.rows} and global_batch={self.global_batch} must be positive")

    def slots(self, step: int) -> list[Slot]:
        """The slots of a step, in the order of their positions."""
        if step < 0:
            raise ValueError(f"step={step} must not be negative")
        slots = []
        for position in range(self.global_batch):
            pass_number, place = divmod(step * self.global_batch + position, self.rows)
            row = _order_of_pass(self.rows, self.seed, pass_number)(place)
            slots.append(Slot(step, position, row, pass_number))
        return slots

    def local_slots(self, step: int, *, rank: int, world_size: int, micro_batch: int) -> list[list[Slot]]:
        """One rank's slots, one list of `micro_batch` per micro-step; as many lists on every rank, filled up with ghosts.

        In micro-step m rank r takes `micro_batch` slots from position (m * world_size + r) * micro_batch on.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in 0..{world_size - 1}")
        together = world_size * micro_batch
        places = micro_steps(self.global_batch, world_size=world_size, micro_batch=micro_batch) * together
        ghosts = [Slot(step, position, GHOST_ROW, 0) for position in range(self.global_batch, places)]
        slots = self.slots(step) + ghosts
        return [slots[i : i + micro_batch] for i in range(rank * micro_batch, places, together)]


def micro_steps(global_batch: int, *, world_size: int, micro_batch: int) -> int:
    """Micro-batches of each rank in one step: the least whose places hold the global batch."""
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} must be positive")
    return -(-global_batch // (world_size * micro_batch))
