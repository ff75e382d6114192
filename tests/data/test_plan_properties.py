"""What the plan promises for any buckets, datasets and weights, on any number of ranks, however often a run is killed.

`MUYBRIDGE_TEST_HISTORIES=1000` tries as many histories of kills and changed world sizes as it says.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muybridge.data.buckets import Bucket
from muybridge.data.plan import DatasetRows, Plan, Segment, micro_steps
from muybridge.models.diffusion.noise_schedule import NoiseScheduleConfig
from muybridge.models.diffusion.objective import keyed_noise, keyed_noise_levels
from muybridge.tests.data.plan_cases import (
    Case,
    Leg,
    Run,
    all_ranks,
    assert_passes_are_whole,
    cases,
    drawn,
    in_order,
    legs,
    scattered_rows,
)

HISTORIES = int(os.environ.get("MUYBRIDGE_TEST_HISTORIES", "60"))
QUICK = settings(max_examples=60, deadline=None)


@QUICK
@given(case=cases(), before=st.lists(st.integers(0, 10**6), max_size=4), step=st.integers(0, 10**6))
def test_a_step_is_the_same_whatever_was_asked_before(case: Case, before: list[int], step: int) -> None:
    """P1: no plan remembers anything."""
    asked = case.plan()
    for other in before:
        asked.local_slots(other, rank=1, world_size=3)
    assert asked.slots(step) == case.plan().slots(step)
    assert asked.state(step) == case.plan().state(step)


@QUICK
@given(case=cases(), world_size=st.integers(1, 9), step=st.integers(0, 10**7))
def test_ranks_and_micro_steps_partition_a_step(case: Case, world_size: int, step: int) -> None:
    """P2, P4, P5: every slot on one rank once; one bucket, one micro-batch and as many micro-steps on all ranks."""
    plan = case.plan()
    bucket = case.buckets[plan.bucket(step)]
    ranks = all_ranks(plan, step, world_size)
    assert {len(rank) for rank in ranks} == {-(-bucket.global_batch // (world_size * bucket.micro_batch))}
    assert {len(group) for rank in ranks for group in rank} == {bucket.micro_batch}
    slots = in_order(ranks)
    assert [slot.position for slot in slots] == list(range(len(slots)))
    assert {(slot.step, slot.bucket) for slot in slots} == {(step, plan.bucket(step))}
    assert slots[: bucket.global_batch] == plan.slots(step)
    ghosts = slots[bucket.global_batch :]
    assert all(slot.is_ghost for slot in ghosts)
    assert not any(slot.is_ghost for slot in plan.slots(step))
    assert len(ghosts) < world_size * bucket.micro_batch


@QUICK
@given(case=cases(), steps=st.integers(1, 60))
def test_every_row_comes_once_a_pass(case: Case, steps: int) -> None:
    """P3, for streams of one row and of fewer rows than a global batch, too."""
    plan = case.plan()
    slots = [slot for step in range(steps) for slot in plan.slots(step)]
    assert_passes_are_whole(case, slots)
    assert plan.samples_before(steps) == len(slots)


@settings(max_examples=HISTORIES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), history=legs())
def test_a_run_that_is_killed_and_resized_takes_the_same_samples(case: Case, history: list[Leg]) -> None:
    """P6: the committed samples, with all their draws, are those of one process that was never stopped."""
    run = Run(case)
    for leg in history:
        run.take(leg)
    plan = case.plan()
    assert sorted(run.steps) == list(range(len(run.steps)))
    assert run.steps == {step: drawn(case, plan.slots(step)) for step in run.steps}


@QUICK
@given(case=cases(), steps=st.integers(1, 80))
def test_shares_are_kept_at_every_step(case: Case, steps: int) -> None:
    """P7: within four samples of a dataset in a bucket, and four steps of a bucket."""
    plan = case.plan()
    step_counts: Counter[int] = Counter()
    counts: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        slots = plan.slots(step)
        step_counts[plan.bucket(step)] += 1
        counts.update((slot.bucket, slot.dataset) for slot in slots)
        for b, bucket in enumerate(case.buckets):
            assert abs(step_counts[b] - (step + 1) * plan.step_shares[b]) <= 4
            for d, share in enumerate(plan.sample_shares[b]):
                of_bucket = step_counts[b] * bucket.global_batch
                expected = of_bucket * share / sum(plan.sample_shares[b]) if of_bucket else 0
                assert abs(counts[b, d] - expected) <= 4


@QUICK
@given(case=cases())
def test_samples_are_shared_as_the_weights_and_the_image_share_say(case: Case) -> None:
    """The shares themselves: of each dataset its weight, spread over the buckets as its clips are."""
    plan = replace(case, image_share=None).plan()
    total = sum(data.weight for data in case.datasets if len(data))
    for d, data in enumerate(case.datasets):
        expected = data.weight / total if len(data) else 0
        assert abs(sum(shares[d] for shares in plan.sample_shares) - expected) < 1e-12
        for shares, rows in zip(plan.sample_shares, data.rows):
            assert abs(shares[d] * len(data) - expected * len(rows)) < 1e-9
    if case.image_share is not None:
        shares_of = case.plan().sample_shares
        images = sum(sum(shares) for shares, bucket in zip(shares_of, case.buckets) if bucket.frames == 1)
        assert abs(images - case.image_share) < 1e-9
    plan = case.plan()
    samples = sum(share * bucket.global_batch for share, bucket in zip(plan.step_shares, case.buckets))
    for share, bucket, shares in zip(plan.step_shares, case.buckets, plan.sample_shares):
        assert abs(share * bucket.global_batch / samples - sum(shares)) < 1e-9


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(40, 200), seed=st.integers(0, 2**32))
def test_passes_and_seeds_have_orders_of_their_own(rows: int, seed: int) -> None:
    """P10, the first half."""

    def order(seed: int, pass_number: int) -> list[int]:
        data = DatasetRows("a", [np.arange(rows, dtype=np.int32)])
        plan = Plan([Bucket(1, 8, 8, 1, 1)], [data], seed=seed)  # a larger batch has an order of its own within
        return [plan.slots(pass_number * rows + place)[0].row for place in range(rows)]

    orders = [order(seed, 0), order(seed, 1), order(seed, 2), order(seed + 1, 0)]
    assert len(set(map(tuple, orders))) == 4
    # Of two random orders about one place is the same.
    assert all(sum(x == y for x, y in zip(a, b)) < 12 for i, a in enumerate(orders) for b in orders[:i])


@QUICK
@given(case=cases(), world_size=st.integers(1, 9), step=st.integers(0, 10**6))
def test_noise_and_timesteps_are_the_same_on_any_number_of_ranks(case: Case, world_size: int, step: int) -> None:
    """P14, bit for bit; caption dropout is among the draws of P6."""
    plan = case.plan()
    whole = [slot.position for slot in plan.slots(step)]
    levels = NoiseScheduleConfig()
    shape = (2, 1, 3, 3)
    noise = keyed_noise(case.seed, step, whole, shape)
    noise_levels = keyed_noise_levels(case.seed, step, whole, levels)
    for group in (group for rank in all_ranks(plan, step, world_size) for group in rank):
        places = [slot.position for slot in group]
        real = [i for i, slot in enumerate(group) if not slot.is_ghost]
        mine = [places[i] for i in real]
        assert torch.equal(keyed_noise(case.seed, step, places, shape)[real], noise[mine])
        assert torch.equal(keyed_noise_levels(case.seed, step, places, levels)[real], noise_levels[mine])


@QUICK
@given(case=cases(), steps=st.integers(1, 40))
def test_nothing_is_drawn_that_has_no_share(case: Case, steps: int) -> None:
    """P15: no dataset of weight 0, no bucket without a clip, and no image where their share is 0."""
    plan = case.plan()
    for slot in (slot for step in range(steps) for slot in plan.slots(step)):
        assert case.datasets[slot.dataset].weight > 0
        assert slot.row in case.datasets[slot.dataset].rows[slot.bucket]
        assert case.image_share != 0 or case.buckets[slot.bucket].frames > 1
        assert case.image_share != 1 or case.buckets[slot.bucket].frames == 1


@QUICK
@given(case=cases(), clips=st.integers(1, 80), world_size=st.integers(1, 5))
def test_validation_visits_each_clip_once_on_any_number_of_ranks(case: Case, clips: int, world_size: int) -> None:
    plan = case.plan()
    ranks = [plan.each_once(clips, rank=rank, world_size=world_size) for rank in range(world_size)]
    alone = replace(case, buckets=tuple(replace(b, micro_batch=7) for b in case.buckets)).plan()
    whole = [slot for group in alone.each_once(clips, rank=0, world_size=1) for slot in group if not slot.is_ghost]
    assert len({tuple((group[0].bucket, len(group)) for group in rank) for rank in ranks}) == 1
    found = [slot for rank in ranks for group in rank for slot in group if not slot.is_ghost]
    assert sorted(found, key=lambda slot: slot.position) == sorted(whole, key=lambda slot: slot.position)
    assert len({(slot.dataset, slot.row) for slot in found}) == len(found)
    assert len({slot.position for slot in found}) == len(found)  # they key the noise
    assert len(found) == min(clips, sum(len(data) for data in case.datasets if data.weight > 0))


@QUICK
@given(case=cases(), world_size=st.integers(1, 9))
def test_the_share_of_ghosts_is_what_the_steps_have(case: Case, world_size: int) -> None:
    plan = case.plan()
    pixels = samples = 0.0
    for share, bucket in zip(plan.step_shares, case.buckets):
        accumulation = micro_steps(bucket.global_batch, world_size=world_size, micro_batch=bucket.micro_batch)
        pixels += share * bucket.clip_bytes * accumulation * bucket.micro_batch * world_size
        samples += share * bucket.clip_bytes * bucket.global_batch
    assert abs(plan.ghost_share(world_size) - (1 - samples / pixels)) < 1e-12


CHANGES = (
    "a dataset more",
    "a dataset less",
    "another filter",
    "other clips",
    "other weights",
    "a bucket more",
    "other batches",
)


def changed(case: Case, change: str) -> Case:
    """The data of a case after somebody changed the configuration."""
    datasets = list(case.datasets)
    if change == "a dataset more":
        datasets.insert(0, DatasetRows("new", scattered_rows([3] * len(case.buckets), 5), weight=1.0))
    elif change == "a dataset less":
        datasets.append(DatasetRows("kept", scattered_rows([2] * len(case.buckets), 6), weight=1.0))
        datasets.pop(0)
    elif change == "another filter":
        datasets[0] = replace(datasets[0], rows=[rows[::2] for rows in datasets[0].rows], weight=1.0)
        datasets.append(DatasetRows("kept", scattered_rows([2] * len(case.buckets), 6), weight=1.0))
    elif change == "other clips":
        datasets = [replace(data, rows=[rows + 1 for rows in data.rows], weight=1.0) for data in datasets]
    elif change == "other weights":
        datasets = [replace(data, weight=1.0 + d) for d, data in enumerate(datasets)]
    elif change == "a bucket more":
        bucket = Bucket(21, 16, 16, 4, 2)
        datasets = [replace(data, rows=[*data.rows, np.arange(100, 103, dtype=np.int32)]) for data in datasets]
        return replace(case, buckets=(*case.buckets, bucket), datasets=tuple(datasets), image_share=None)
    else:
        buckets = tuple(replace(bucket, global_batch=bucket.global_batch + 1) for bucket in case.buckets)
        return replace(case, buckets=buckets)
    return replace(case, datasets=tuple(datasets), image_share=None)


@settings(max_examples=120, deadline=None)
@given(
    case=cases(),
    change=st.sampled_from(CHANGES),
    before=st.integers(0, 25),
    after=st.lists(st.integers(1, 25), min_size=1, max_size=3),
    world_size=st.integers(1, 5),
)
def test_streams_that_did_not_change_go_on_after_a_change_of_the_data(
    case: Case, change: str, before: int, after: list[int], world_size: int
) -> None:
    """A segment of its own: exactly once a pass across it, killed or not; a stream whose rows changed begins anew."""
    old, new = case.plan(), changed(case, change)
    segment = Segment.after(json.loads(json.dumps(old.state(before))))
    run = Run(new, json.dumps({"plan": new.plan(segment).state(before)}))
    for steps in after:
        run.take(Leg(world_size, [2, 1], steps, checkpoint_every=4))
    plan = new.plan(segment)
    assert plan.segment.start_step == before
    assert plan.samples_before(before) == old.samples_before(before)
    assert run.steps == {step: drawn(new, plan.slots(step)) for step in run.steps}

    # The history of each stream by what stays of it, its names.
    history: dict[tuple[str, str], list[tuple[int, int]]] = {}
    slots_before = [slot for step in range(before) for slot in old.slots(step)]
    slots_after = [slot for step in range(before, max(run.steps) + 1) for slot in plan.slots(step)]
    rows_before = {(data.name, b.name): rows for data in case.datasets for b, rows in zip(case.buckets, data.rows)}
    rows_after = {(data.name, b.name): rows for data in new.datasets for b, rows in zip(new.buckets, data.rows)}
    for part, slots, rows_of in ((case, slots_before, rows_before), (new, slots_after, rows_after)):
        for slot in slots:
            stream = part.datasets[slot.dataset].name, part.buckets[slot.bucket].name
            if np.array_equal(rows_of[stream], rows_after.get(stream, ())):  # what was drawn of others is forgotten
                history.setdefault(stream, []).append((slot.pass_number, slot.row))
    for stream, draws in history.items():
        rows = rows_after[stream].tolist()
        passes = max(number for number, _ in draws)
        assert len(set(draws)) == len(draws)
        assert {(number, row) for number in range(passes) for row in rows} <= set(draws)
        assert {row for _, row in draws} <= set(rows)
