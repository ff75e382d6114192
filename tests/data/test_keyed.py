"""Draws depend on their key alone, permutations are bijections, and shares are kept at every place."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muybridge.data.keyed import Permutation, Shares, keyed_uniform


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**40), key=st.integers(0, 1000))
def test_permutation_is_a_bijection(size: int, seed: int, key: int) -> None:
    permutation = Permutation.keyed(size, seed, "test", key)
    assert sorted(permutation(value) for value in range(size)) == list(range(size))


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2**20, 2**33), seed=st.integers(0, 2**32))
def test_large_permutation_stays_in_range_and_apart(size: int, seed: int) -> None:
    permutation = Permutation.keyed(size, seed, "test")
    values = [permutation(value) for value in range(200)]
    assert len(set(values)) == 200
    assert all(0 <= value < size for value in values)


SIZES = st.one_of(
    st.integers(1, 40), st.integers(1, 10**7), st.integers(2**32 - 9, 2**33), st.integers(2**63 - 9, 2**64)
)


@settings(max_examples=150, deadline=None)
@given(size=SIZES, keys=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6), data=st.data())
def test_a_permutation_of_many_values_is_that_of_each(size: int, keys: list[int], data: st.DataObject) -> None:
    permutation = Permutation(size, tuple(keys))
    count = data.draw(st.integers(0, 300), label="values")
    start = data.draw(st.integers(0, size - 1), label="first value")
    step = data.draw(st.integers(1, size), label="step")
    values = [(start + i * step) % size for i in range(count)]
    assert permutation.many(values) == [permutation(value) for value in values]


def test_all_values_of_a_permutation_at_once() -> None:
    for size in (1, 2, 31, 32, 33, 4096, 4097, 50_000):
        permutation = Permutation.keyed(size, 3, "test")
        places = permutation.many(range(size))
        assert sorted(places) == list(range(size))
        assert places[-3:] == [permutation(value) for value in range(size)[-3:]]


@pytest.mark.parametrize("count", [1, 500])
def test_a_value_out_of_range_is_refused(count: int) -> None:
    permutation = Permutation.keyed(500, 3, "test")
    with pytest.raises(IndexError, match=r"value=500 must be in 0\.\.499"):
        permutation.many(range(501 - count, 501))


def test_permutation_shuffles_well() -> None:
    size = 4000
    for key in range(4):
        permutation = Permutation.keyed(size, 7, "test", key)
        values = np.array([permutation(value) for value in range(size)])
        # Independent ranks have a correlation of standard deviation 1/sqrt(size).
        assert abs(np.corrcoef(np.arange(size), values)[0, 1]) < 4 / np.sqrt(size)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(size)


def test_keyed_uniform_is_uniform() -> None:
    values = np.array([keyed_uniform(3, "test", row, 0) for row in range(4000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert max(Counter((values * 10).astype(int).tolist()).values()) < 400 + 5 * np.sqrt(400)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(0.01, 100)), min_size=1, max_size=12).filter(any),
    seed=st.integers(0, 2**32),
    places=st.integers(1, 600),
)
def test_shares_are_kept_at_every_place(weights: list[float], seed: int, places: int) -> None:
    shares = Shares(weights, seed, "test")
    counts = [0] * len(weights)
    for place in range(places):
        assert [shares.count(option, place) for option in range(len(weights))] == counts
        counts[shares(place)] += 1
        assert all(abs(n - (place + 1) * w / sum(weights)) <= 4 for n, w in zip(counts, weights, strict=True))


def test_shares_far_out_are_still_right() -> None:
    shares = Shares([3.0, 1.0, 0.0, 4.0], 1, "test")
    for places in (10**6 + 7, 10**12 + 1):
        found = [shares.count(option, places) for option in range(4)]
        assert sum(found) == places
        assert all(abs(n - places * w / 8) <= 4 for n, w in zip(found, [3, 1, 0, 4], strict=True))
        before = [shares.count(option, places + 1) - n for option, n in enumerate(found)]
        assert before.index(1) == shares(places)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [float("nan")]])
def test_shares_that_cannot_be_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="must not be negative, and one must be positive"):
        Shares(weights, 0, "test")
