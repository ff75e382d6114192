"""Random plans, ways to split their steps over ranks, and runs that are killed and go on in another split."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from muybridge.data.buckets import Bucket
from muybridge.data.draws import Draws, draw
from muybridge.data.plan import DatasetRows, Plan, Segment, Slot

WEIGHTS = (0.0, 1e-9, 0.01, 0.3, 1.0, 1.0, 2.5, 1000.0)
SHAPES = ((1, 32, 32), (1, 64, 48), (5, 32, 32), (9, 48, 64), (9, 64, 48), (17, 32, 32))

Drawn = tuple[int, int, int, int, int, Draws]  # step, position, dataset, row, pass and what is drawn for the clip


@dataclass(frozen=True)
class Case:
    """What a plan is made of."""

    buckets: tuple[Bucket, ...]
    datasets: tuple[DatasetRows, ...]
    seed: int
    image_share: float | None = None

    def plan(self, segment: Segment | None = None, *, micro_batches: list[int] | None = None) -> Plan:
        """The plan, with other micro-batches where they are given: one for each bucket, the list is gone round."""
        buckets = list(self.buckets)
        if micro_batches:
            sizes = (micro_batches[place % len(micro_batches)] for place in range(len(buckets)))
            buckets = [replace(bucket, micro_batch=size) for bucket, size in zip(buckets, sizes)]
        return Plan(buckets, self.datasets, seed=self.seed, image_share=self.image_share, segment=segment)


@st.composite
def cases(draw_from: st.DrawFn, *, max_rows: int = 14, max_batch: int = 9) -> Case:
    """One to five buckets, one to four datasets of any weights, streams of no row, one row or less than a global batch."""
    shapes = draw_from(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5, unique=True))
    sizes = st.tuples(st.integers(1, max_batch), st.integers(1, 4))
    buckets = tuple(Bucket(*shape, *draw_from(sizes)) for shape in shapes)
    counts_of = st.lists(
        st.one_of(st.integers(0, 2), st.integers(0, max_rows)), min_size=len(buckets), max_size=len(buckets)
    )
    number = draw_from(st.integers(1, 4))
    counts = [draw_from(counts_of) for _ in range(number)]
    weights = [draw_from(st.sampled_from(WEIGHTS)) for _ in range(number)]
    if not any(sum(rows) and weight for rows, weight in zip(counts, weights)):
        counts[0][0], weights[0] = 1 + counts[0][0], 1.0
    seed = draw_from(st.integers(0, 2**32))
    datasets = tuple(
        DatasetRows(f"d{d}", scattered_rows(rows, seed + d), weight=weight, content=f"c{d}")
        for d, (rows, weight) in enumerate(zip(counts, weights))
    )
    image_share = draw_from(st.one_of(st.none(), st.sampled_from((0.0, 0.25, 0.5, 0.9, 1.0))))
    case = Case(buckets, datasets, seed, image_share)
    if image_share is not None:
        shares = replace(case, image_share=None).plan().sample_shares
        images = sum(sum(of) for of, bucket in zip(shares, buckets) if bucket.frames == 1)
        # Shares of what is not there are refused, see test_plan.py.
        if (image_share > 0 and images < 1e-6) or (image_share < 1 and images > 1 - 1e-6):
            case = replace(case, image_share=None)
    return case


def scattered_rows(counts: list[int], seed: int) -> list[np.ndarray]:
    """Rows of a dataset with so many clips in each bucket, mixed through its index, which has some that fit none."""
    order = np.random.default_rng(seed).permutation(sum(counts) + 3)
    ends = np.cumsum([0, *counts])
    return [np.sort(order[start:end]).astype(np.int32) for start, end in pairwise(ends)]


def all_ranks(plan: Plan, step: int, world_size: int) -> list[list[list[Slot]]]:
    """The slots of a step as [rank][micro-step][slot]."""
    return [plan.local_slots(step, rank=rank, world_size=world_size) for rank in range(world_size)]


def in_order(ranks: list[list[list[Slot]]]) -> list[Slot]:
    """The slots of all ranks in the order of the global batch, ghosts behind it."""
    return [slot for m in range(len(ranks[0])) for rank in ranks for slot in rank[m]]


def drawn(case: Case, slots: list[Slot]) -> list[Drawn]:
    """What a trainer would have used, without the ghosts."""
    return [
        (
            slot.step,
            slot.position,
            slot.dataset,
            slot.row,
            slot.pass_number,
            draw(
                case.seed,
                case.datasets[slot.dataset].name,
                slot.row,
                slot.pass_number,
                captions=3,
                caption_dropout=0.3,
            ),
        )
        for slot in slots
        if not slot.is_ghost
    ]


@dataclass(frozen=True)
class Leg:
    """A part of a run, from a start to the kill."""

    world_size: int
    micro_batches: list[int]  # of the buckets
    steps: int  # until it is killed
    checkpoint_every: int


def legs(max_steps: int = 12) -> st.SearchStrategy[list[Leg]]:
    """Runs that are killed up to six times."""
    micro_batches = st.lists(st.integers(1, 4), min_size=1, max_size=5)
    leg = st.builds(Leg, st.integers(1, 9), micro_batches, st.integers(1, max_steps), st.integers(1, 7))
    return st.lists(leg, min_size=1, max_size=7)


class Run:
    """A trainer without a model: it takes steps, saves its state as JSON, and forgets all else when it is killed."""

    def __init__(self, case: Case, checkpoint: str | None = None) -> None:
        self.case = case
        self.checkpoint = checkpoint or json.dumps({"plan": case.plan().state(0)})
        self.steps: dict[int, list[Drawn]] = {}

    def take(self, leg: Leg) -> None:
        """Goes on from the last checkpoint, until the kill; a step that is taken again must be what it was."""
        plan = self.case.plan(Segment.of(self.saved["plan"]), micro_batches=leg.micro_batches)
        start = self.saved["plan"]["step"]
        for step in range(start, start + leg.steps):
            found = drawn(self.case, in_order(all_ranks(plan, step, leg.world_size)))
            assert self.steps.setdefault(step, found) == found
            if (step + 1) % leg.checkpoint_every == 0:
                self.checkpoint = json.dumps({"plan": plan.state(step + 1)})

    @property
    def saved(self) -> dict[str, Any]:
        """The last checkpoint."""
        return json.loads(self.checkpoint)


def assert_passes_are_whole(case: Case, slots: list[Slot], *, first_pass: int = 0) -> None:
    """Every row of each stream once a pass: in all passes but the last, and no row twice in the last one."""
    streams: dict[tuple[int, int], dict[int, Counter[int]]] = {}
    for slot in slots:
        passes = streams.setdefault((slot.dataset, slot.bucket), {})
        passes.setdefault(slot.pass_number, Counter())[slot.row] += 1
    for (dataset, bucket), passes in streams.items():
        rows = set(case.datasets[dataset].rows[bucket].tolist())
        assert sorted(passes) == list(range(first_pass, first_pass + len(passes)))
        for number, found in passes.items():
            assert set(found.values()) == {1}
            assert found.keys() <= rows
            assert found.keys() == rows or number == max(passes)
