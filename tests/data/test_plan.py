"""The plan is a pure function of (seed, step) and loses or repeats nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muybridge.data.plan import GHOST_ROW, Permutation, Plan, keyed_uniform


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


def test_permutation_shuffles_well() -> None:
    size = 4000
    for key in range(4):
        permutation = Permutation.keyed(size, 7, "test", key)
        values = np.array([permutation(value) for value in range(size)])
        # Independent ranks have a correlation of standard deviation 1/sqrt(size).
        assert abs(np.corrcoef(np.arange(size), values)[0, 1]) < 4 / np.sqrt(size)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(size)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), global_batch=st.integers(1, 24), seed=st.integers(0, 2**32), passes=st.integers(1, 4))
def test_every_row_exactly_once_a_pass(rows: int, global_batch: int, seed: int, passes: int) -> None:
    plan = Plan(rows, global_batch, seed)
    steps = -(-rows * passes // global_batch)
    stream = [slot for step in range(steps) for slot in plan.slots(step)][: rows * passes]
    for number in range(passes):
        one_pass = stream[number * rows : (number + 1) * rows]
        assert sorted(slot.row for slot in one_pass) == list(range(rows))
        assert {slot.pass_number for slot in one_pass} == {number}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 1000),
    world_size=st.integers(1, 6),
    micro_batch=st.integers(1, 4),
    global_batch=st.integers(1, 60),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**32),
)
def test_ranks_and_micro_steps_partition_the_step(
    rows: int, world_size: int, micro_batch: int, global_batch: int, step: int, seed: int
) -> None:
    plan = Plan(rows, global_batch, seed)
    local = [
        plan.local_slots(step, rank=rank, world_size=world_size, micro_batch=micro_batch) for rank in range(world_size)
    ]
    assert all(len(slots) == micro_batch for mine in local for slots in mine)
    (accumulation,) = {len(mine) for mine in local}
    in_order = [slot for m in range(accumulation) for mine in local for slot in mine[m]]
    assert in_order[:global_batch] == plan.slots(step)
    assert [slot.position for slot in in_order] == list(range(accumulation * world_size * micro_batch))
    ghosts = in_order[global_batch:]
    assert all(slot.row == GHOST_ROW for slot in ghosts)
    assert len(ghosts) < world_size * micro_batch


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 1000), before=st.lists(st.integers(0, 10**7), max_size=5), step=st.integers(0, 10**7))
def test_a_step_does_not_depend_on_what_was_asked_before(rows: int, before: list[int], step: int) -> None:
    plan = Plan(rows, 8, 5)
    for other in before:
        plan.slots(other)
    assert plan.slots(step) == Plan(rows, 8, 5).slots(step)


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(slot.row for slot in Plan(100, 100, seed).slots(step)) for seed in range(5) for step in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_one_that_was_released() -> None:
    # Resuming an older run needs the same order: when this must change, raise PLAN_VERSION.
    assert [slot.row for slot in Plan(10, 10, 0).slots(0)] == [9, 1, 6, 4, 8, 7, 2, 3, 5, 0]


def test_keyed_uniform_is_uniform() -> None:
    values = np.array([keyed_uniform(3, "test", row, 0) for row in range(4000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert max(Counter((values * 10).astype(int).tolist()).values()) < 400 + 5 * np.sqrt(400)


def test_a_rank_or_micro_batch_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch=0 must be positive"):
        Plan(10, 8, 0).local_slots(0, rank=0, world_size=3, micro_batch=0)
    with pytest.raises(ValueError, match=r"rank=2 must be in 0..1"):
        Plan(10, 8, 0).local_slots(0, rank=2, world_size=2, micro_batch=1)
