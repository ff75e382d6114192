"""Randomness without a state: every draw is a function of the seed and of what it is for, so any process can repeat any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

Bits = TypeVar("Bits", int, np.ndarray)  # a number below 2**64, or an array of them

_ROUNDS = 6
_BITS = 64
_MASK = (1 << _BITS) - 1
_WORTH_AN_ARRAY = 32  # values: the network takes 3 us for one, and 60 us for an array of any length up to a thousand


def keyed_bits(seed: int, purpose: str, *key: int | str) -> int:
    """64 random bits that depend on the arguments alone."""
    text = ":".join([str(seed), purpose, *map(str, key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keyed_uniform(seed: int, purpose: str, *key: int | str) -> float:
    """A random number in [0, 1) that depends on the arguments alone."""
    return (keyed_bits(seed, purpose, *key) >> 11) / (1 << 53)


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection of 0..size-1 that computes any single value in O(1): a Feistel network with cycle walking."""

    size: int
    keys: tuple[int, ...]

    @classmethod
    def keyed(cls, size: int, seed: int, purpose: str, *key: int | str) -> Permutation:
        """The permutation of `size` values that belongs to these keys."""
        return cls(size, tuple(keyed_bits(seed, purpose, *key, number) for number in range(_ROUNDS)))

    def __call__(self, value: int) -> int:
        """The value's place in the order. Raises IndexError."""
        if not 0 <= value < self.size:
            raise IndexError(f"value={value} must be in 0..{self.size - 1}")
        return self._walk(value)

    def many(self, values: Sequence[int]) -> list[int]:
        """The places of many values. Raises IndexError."""
        if len(values) < _WORTH_AN_ARRAY:
            return [self(value) for value in values]
        assert self.size <= 1 << _BITS
        found = np.array(values, dtype=np.uint64)
        if int(found.max()) >= self.size:
            raise IndexError(f"value={found.max()} must be in 0..{self.size - 1}")
        waiting = np.arange(len(found))
        while len(waiting) >= _WORTH_AN_ARRAY:
            found[waiting] = self._network(found[waiting])
            waiting = waiting[found[waiting] >= self.size]
        places = found.tolist()
        for index in waiting.tolist():
            places[index] = self._walk(places[index])
        return places

    @cached_property
    def _half_bits(self) -> int:
        return max(1, ((self.size - 1).bit_length() + 1) // 2)

    def _walk(self, value: int) -> int:
        # The network permutes 0..4**half_bits - 1, at most four times the size; following its cycle until it comes back
        # below the size permutes what we need, in fewer than four rounds on average.
        value = self._network(value)
        while value >= self.size:
            value = self._network(value)
        return value

    def _network(self, value: Bits) -> Bits:
        half_bits = self._half_bits
        half_mask = (1 << half_bits) - 1
        left, right = value >> half_bits, value & half_mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        return left << half_bits | right


class Shares:
    """An endless sequence of options in which each has its share: up to any place, all counts are right to within 4.

    A binary tree of options: each node sends a place to its left or right side by the Beatty sequence of the left side's share
    p, which is at place t where floor(p (t + 1) + b) > floor(p t + b). So the counts at a node are off by less than 1, and how
    often an option came among the first t places is known without going through them.
    """

    def __init__(self, shares: Sequence[float], seed: int, purpose: str, *key: int | str) -> None:
        """Shares are relative: not negative, one of them positive. An option with share 0 never comes."""
        self._shares, self._seed, self._purpose, self._key = shares, seed, purpose, key
        options = sorted((option for option, share in enumerate(shares) if share > 0), key=lambda o: (-shares[o], o))
        if not options or min(shares) < 0:
            raise ValueError(f"shares={list(shares)} must not be negative, and one must be positive")
        self._paths: dict[int, list[tuple[_Node, bool]]] = {}
        self._root = self._build(options, [])

    def __call__(self, place: int) -> int:
        """The option at a place."""
        return self.draw(place)[0]

    def draw(self, place: int) -> tuple[int, int]:
        """The option at a place, and how often it came before."""
        node = self._root
        while isinstance(node, _Node):
            left, is_left = node.split(place)
            if is_left:
                place, node = left, node.left
            else:
                place, node = place - left, node.right
        return node, place

    def count(self, option: int, places: int) -> int:
        """How often the option comes among the first `places` places."""
        if option not in self._paths:
            return 0
        for node, is_left in self._paths[option]:
            places = node.lefts(places) if is_left else places - node.lefts(places)
        return places

    def _build(self, options: list[int], path: list[tuple[_Node, bool]]) -> _Node | int:
        if len(options) == 1:
            self._paths[options[0]] = path
            return options[0]
        # Split where both sides weigh most alike: errors of the nodes above shrink with the share on the way down.
        total = sum(self._shares[option] for option in options)
        sums = [sum(self._shares[option] for option in options[:length]) for length in range(1, len(options))]
        length = 1 + min(range(len(sums)), key=lambda i: abs(2 * sums[i] - total))
        share = int(sums[length - 1] / total * 2**53) << (_BITS - 53)
        node = _Node(share, keyed_bits(self._seed, self._purpose, *self._key, len(path), options[0]))
        node.left = self._build(options[:length], [*path, (node, True)])
        node.right = self._build(options[length:], [*path, (node, False)])
        return node


class _Node:
    left: _Node | int
    right: _Node | int

    def __init__(self, share: int, offset: int) -> None:
        self._share, self._offset = share, offset  # of the left side and of the sequence, both in units of 2^-64

    def lefts(self, places: int) -> int:
        """How many of the first `places` places go to the left."""
        return (self._share * places + self._offset) >> _BITS

    def split(self, place: int) -> tuple[int, bool]:
        """`lefts(place)`, and whether the place itself goes to the left: whether `lefts(place + 1)` is more."""
        units = self._share * place + self._offset
        return units >> _BITS, (units & _MASK) + self._share > _MASK


def _mix(bits: Bits) -> Bits:
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _MASK
    return bits ^ bits >> 31
