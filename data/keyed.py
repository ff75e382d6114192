"""Randomness without a state: every draw is a function of the seed and of what it is for, so any process can repeat any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

_ROUNDS = 6
_BITS = 64
_MASK = (1 << _BITS) - 1


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
            left = node.lefts(place)
            if node.lefts(place + 1) > left:
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


def _mix(bits: int) -> int:
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _MASK
    return bits ^ bits >> 31
