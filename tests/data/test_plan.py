"""The plan by example: the released order, what it refuses, and promises that need many rows or another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from muybridge.data.buckets import Bucket
from muybridge.data.keyed import Permutation
from muybridge.data.plan import PLAN_VERSION, DatasetRows, Plan, Segment, Slot, split_places

BUCKETS = [Bucket(1, 32, 32, 6, 2), Bucket(9, 48, 64, 3, 1)]

# Of build(), steps 0 to 3: bucket, dataset, row and pass of each slot.
RELEASED = [
    [(0, 0, 0, 0), (0, 1, 0, 0), (0, 1, 1, 0), (0, 1, 3, 0), (0, 0, 2, 0), (0, 1, 2, 0)],
    [(1, 0, 6, 0), (1, 0, 11, 0), (1, 0, 8, 0)],
    [(1, 0, 7, 0), (1, 0, 5, 0), (1, 0, 9, 0)],
    [(0, 0, 4, 0), (0, 1, 1, 1), (0, 0, 1, 0), (0, 1, 2, 1), (0, 1, 0, 1), (0, 0, 3, 0)],
]


def rows(count: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.int32)


def build(seed: int = 0, **changes: float | None) -> Plan:
    datasets = [DatasetRows("a", [rows(5), rows(7, 5)], weight=2.0), DatasetRows("b", [rows(4), rows(0)])]
    return Plan(BUCKETS, datasets, seed=seed, **changes)


def listed(plan: Plan, steps: range) -> list[list[tuple[int, int, int, int]]]:
    return [[(s.bucket, s.dataset, s.row, s.pass_number) for s in plan.slots(step)] for step in steps]


def test_the_order_is_the_one_that_was_released() -> None:
    # Resuming an older run needs the same order: when this must change, raise PLAN_VERSION.
    assert PLAN_VERSION == 2
    assert listed(build(), range(4)) == RELEASED


def test_another_process_plans_the_same_step() -> None:
    """P1: no hash of Python's, which differ between processes, no order of a set, no clock."""
    program = (
        "import json; from muybridge.tests.data.test_plan import build, listed; "
        "print(json.dumps([listed(build(), range(90, 130)), build().state(10**6)]))"
    )
    expected = json.loads(json.dumps([listed(build(), range(90, 130)), build().state(10**6)]))
    for hash_seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert json.loads(answer.stdout) == expected


def test_every_small_permutation_is_a_bijection() -> None:
    """P9: all sizes up to 300, and those around the powers of two up to 4097, where the network changes its width."""
    near = {size + offset for size in (512, 1024, 2048, 4096) for offset in (-1, 0, 1)}
    for size in sorted({*range(1, 301), *near}):
        permutation = Permutation.keyed(size, size, "test")
        assert len({permutation(value) for value in range(size)}) == size
        for value in (-1, size):
            with pytest.raises(IndexError, match=f"value={value} must be in 0..{size - 1}"):
                permutation(value)


@pytest.mark.parametrize("size", [10**6 + 3, 2**27, 2**32, 2**32 - 5])
def test_a_large_permutation_can_be_undone(size: int) -> None:
    """P9: what has an inverse is a bijection."""
    permutation = Permutation.keyed(size, 5, "test", size)
    half_bits = ((size - 1).bit_length() + 1) // 2
    backwards = Permutation(1 << 2 * half_bits, tuple(reversed(permutation.keys)))

    def swap(value: int) -> int:
        return value >> half_bits | (value & ((1 << half_bits) - 1)) << half_bits

    def undo(value: int) -> int:
        # A Feistel network runs backwards with its keys reversed and both halves swapped before and after.
        value = swap(backwards(swap(value)))
        return value if value < size else undo(value)

    values = np.random.default_rng(0).integers(0, size, 300).tolist()
    assert [undo(permutation(value)) for value in values] == values


def test_the_order_of_a_pass_has_nothing_of_the_order_of_the_rows() -> None:
    """P10: the correlation of place and row, of neighbours, and of two passes stays below 0.01."""
    size = 160_000  # the correlation of random orders has a standard deviation of 0.0025
    plan = Plan([Bucket(1, 8, 8, 1, 1)], [DatasetRows("a", [rows(size)])], seed=3)
    orders = [Permutation.keyed(size, 3, "order", "a", "1x8x8", number) for number in range(2)]
    for step in (0, 1, 77, size - 1, size, size + 5):
        assert plan.slots(step)[0].row == orders[step // size](step % size)
    first, second = (np.array([order(place) for place in range(size)]) for order in orders)
    for a, b in ((np.arange(size), first), (first[:-1], first[1:]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.01


def test_a_change_of_the_data_keeps_what_unchanged_datasets_have_reached() -> None:
    old = build()
    other = [DatasetRows("a", [rows(5), rows(6, 5)], weight=2.0), DatasetRows("b", [rows(4), rows(0)])]
    new = Plan(BUCKETS, other, seed=0, segment=Segment.after(old.state(21)))
    drawn = [slot for step in range(21) for slot in old.slots(step)]
    later = [slot for step in range(21, 60) for slot in new.slots(step)]
    assert new.samples_before(21) == old.samples_before(21) == len(drawn)

    def passes(slots: list[Slot], dataset: int, bucket: int) -> list[int]:
        return sorted(slot.pass_number for slot in slots if (slot.dataset, slot.bucket) == (dataset, bucket))

    for stream in ((0, 0), (1, 0)):  # as they were
        assert passes(later, *stream)[0] >= passes(drawn, *stream)[-1]
    assert passes(drawn, 0, 1)[-1] > passes(later, 0, 1)[0] == 0  # its rows are others: a new order
    reweighted = [replace(data, weight=1.0) for data in old.datasets]
    same = Plan(BUCKETS, reweighted, seed=0, segment=Segment.after(old.state(21)))
    assert passes([same.slots(step)[0] for step in range(21, 60)], 0, 1)[0] > 0


def test_a_single_bucket_and_dataset_need_no_choice() -> None:
    plan = Plan([BUCKETS[1]], [DatasetRows("", [rows(1)])], seed=9)
    assert [slot.row for slot in plan.slots(4)] == [0, 0, 0]
    assert [slot.pass_number for slot in sorted(plan.slots(4), key=lambda slot: slot.pass_number)] == [12, 13, 14]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no dataset with a positive weight has a clip"):
        Plan(BUCKETS, [DatasetRows("a", [rows(0), rows(0)]), DatasetRows("b", [rows(1), rows(1)], weight=0.0)], seed=0)
    plan = build()
    with pytest.raises(ValueError, match=r"rank=2 must be in 0..1"):
        plan.local_slots(0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="micro_batch=0 must be positive"):
        split_places(4, rank=0, world_size=1, micro_batch=0)


@pytest.mark.parametrize(("image_share", "missing"), [(0.5, "one frame"), (1.0, "one frame"), (0.0, None)])
def test_a_share_of_images_needs_images(image_share: float, missing: str | None) -> None:
    datasets = [DatasetRows("a", [rows(0), rows(7)])]
    if missing:
        with pytest.raises(ValueError, match=f"data.image_share={image_share} needs clips in buckets of {missing}"):
            Plan(BUCKETS, datasets, seed=0, image_share=image_share)
    else:
        assert {slot.bucket for slot in Plan(BUCKETS, datasets, seed=0, image_share=image_share).slots(5)} == {1}
    with pytest.raises(ValueError, match=r"data.image_share=0.25 needs clips in buckets of several frames"):
        Plan(BUCKETS, [DatasetRows("a", [rows(3), rows(0)])], seed=0, image_share=0.25)


def test_substitutes_are_other_rows_of_the_same_dataset_and_bucket() -> None:
    plan = build()
    for slot in (slot for step in range(10) for slot in plan.slots(step)):
        found = [plan.substitute(slot, attempt) for attempt in range(9)]
        of_stream = plan.datasets[slot.dataset].rows[slot.bucket].tolist()
        tried = [row for row in found if row is not None]
        assert sorted(tried) == of_stream  # all, as there are no more than eight
        assert found[len(tried) :] == [None] * (9 - len(tried))
    many = Plan([BUCKETS[0]], [DatasetRows("a", [rows(100)])], seed=0)
    slots = many.slots(0)
    orders = [[many.substitute(slot, attempt) for attempt in range(9)] for slot in slots]
    assert all(len(set(order[:8])) == 8 and order[8] is None for order in orders)
    assert len({tuple(order) for order in orders}) == len(slots)
