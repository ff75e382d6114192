"""Which bucket a clip belongs to, why some have none, and how large the batches of each bucket are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muybridge.data.buckets import (
    NO_BUCKET,
    Assignment,
    Bucket,
    BucketConfig,
    FitRules,
    assign_buckets,
    balanced_micro_batch,
)
from muybridge.data.config import DataConfig, build_buckets, single_clips
from muybridge.data.plan import micro_steps

RULES = FitRules(fps=8.0, max_upscale=1.25, max_crop=0.5)
TYPES = {"duration_seconds": np.float64, "is_image": np.bool_, "checksum": np.uint32}


class Clips:
    """An index of clips that are 2 s long at 24 frames a second, 640x360 pixels, unless a column says otherwise."""

    def __init__(self, count: int = 1, **columns: Any) -> None:
        usual = {"duration_seconds": 2.0, "fps_numerator": 24, "fps_denominator": 1, "width": 640, "height": 360}
        values = {**usual, "is_image": False, "checksum": np.arange(count), **columns}
        self._columns: dict[str, np.ndarray] = {
            name: np.broadcast_to(np.asarray(value, dtype=TYPES.get(name, np.int32)), (count,)).copy()
            for name, value in values.items()
        }
        self._count = count

    def __len__(self) -> int:
        return self._count

    def column(self, name: str) -> np.ndarray:
        return self._columns[name]


def bucket(frames: int, height: int, width: int, keep: float = 1.0) -> Bucket:
    return Bucket(frames, height, width, 4, 1, keep)


def assign(
    clips: Clips, buckets: list[Bucket], rules: FitRules = RULES, chosen: np.ndarray | None = None
) -> Assignment:
    return assign_buckets(clips, buckets, rules, np.ones(len(clips), dtype=bool) if chosen is None else chosen)


def test_a_clip_goes_to_the_largest_bucket_that_it_fits() -> None:
    buckets = [bucket(1, 360, 640), bucket(9, 180, 320), bucket(9, 360, 640), bucket(17, 180, 320), bucket(33, 36, 64)]
    assert assign(Clips(), buckets).buckets.tolist() == [2]  # the most pixels of a clip, not the most frames
    # 17 frames at 8 a second span 2 s, and the last frame of a clip of 2 s starts before its end.
    durations = [2.0, 2.05, 1.05, 1.0, 0.5]
    small = Clips(5, duration_seconds=durations, width=320, height=180)
    assert assign(small, buckets).buckets.tolist() == [1, 3, 1, NO_BUCKET, NO_BUCKET]


def test_of_buckets_alike_the_one_that_crops_least_is_taken() -> None:
    buckets = [bucket(9, 64, 64), bucket(9, 48, 84), bucket(9, 84, 48)]
    clips = Clips(5, width=[100, 160, 90, 110, 130], height=[100, 90, 160, 100, 100])
    # The square cuts 13 % off 130 x 100 pixels more than the flat one does.
    assert assign(clips, buckets).buckets.tolist() == [0, 1, 2, 0, 0]
    flatter = Clips(2, width=[132, 133], height=100)  # between 1 and 84/48 the middle is their geometric mean
    assert assign(flatter, buckets).buckets.tolist() == [0, 1]
    # Of buckets of another size the larger one wins, even where it crops more.
    assert assign(Clips(1, width=100, height=100), [bucket(9, 32, 32), bucket(9, 48, 84)]).buckets.tolist() == [1]


def test_clips_are_enlarged_and_cropped_so_far_and_no_further() -> None:
    buckets = [bucket(9, 100, 200)]
    clips = Clips(6, width=[160, 159, 200, 200, 400, 401], height=[100, 100, 80, 79, 100, 100])
    found = assign(clips, buckets)
    assert found.buckets.tolist() == [0, NO_BUCKET, 0, NO_BUCKET, 0, NO_BUCKET]
    reasons = {reason: rows.tolist() for reason, rows in found.excluded.items()}
    assert reasons == {
        "too small for 9x100x200 (data.max_upscale=1.25)": [1, 3],
        "of another aspect ratio than all buckets (data.max_crop=0.5)": [5],
    }
    assert assign(clips, buckets, FitRules(8.0, 1.0, 0.0)).buckets.tolist() == [NO_BUCKET] * 6
    assert assign(Clips(1, width=400, height=200), buckets, FitRules(8.0, 1.0, 0.0)).buckets.tolist() == [0]


def test_still_images_go_to_buckets_of_one_frame_only() -> None:
    clips = Clips(3, is_image=[True, True, False], duration_seconds=[0.04, 100.0, 0.04], width=64, height=64)
    assert assign(clips, [bucket(9, 64, 64), bucket(1, 64, 64)]).buckets.tolist() == [1, 1, 1]
    found = assign(clips, [bucket(9, 64, 64), bucket(5, 64, 64)])
    assert found.buckets.tolist() == [NO_BUCKET] * 3
    assert {reason: rows.tolist() for reason, rows in found.excluded.items()} == {
        "still images, which have no 5 frames": [0, 1],
        "too short for 5 frames at 8 fps": [2],
    }


def test_what_a_bucket_does_not_keep_goes_on_to_the_next_smaller_one() -> None:
    count = 4000
    checksums = np.random.default_rng(0).integers(0, 2**32, count)
    buckets = [bucket(9, 64, 64, keep=0.25), bucket(9, 32, 32, keep=0.5), bucket(1, 32, 32)]
    clips = Clips(count, checksum=checksums)
    found = assign(clips, buckets).buckets
    assert np.bincount(found, minlength=3) / count == pytest.approx([0.25, 0.375, 0.375], abs=0.03)
    # By the bytes of the clip: neither its place in the index nor other clips or buckets matter.
    order = np.random.default_rng(1).permutation(count)[:1000]
    assert (assign(Clips(1000, checksum=checksums[order]), buckets).buckets == found[order]).all()
    assert ((assign(clips, [*buckets[:2], bucket(5, 16, 16)]).buckets == 0) == (found == 0)).all()
    more = [bucket(9, 64, 64, keep=0.3), *buckets[1:]]
    assert (assign(clips, more).buckets[found == 0] == 0).all()  # who was kept stays when more are
    left = assign(clips, buckets[:2])
    [(reason, rows)] = left.excluded.items()
    assert reason == "left over by the buckets' keep"
    assert rows.tolist() == np.flatnonzero(found == 2).tolist()


def test_the_reason_is_the_nearest_that_a_clip_came_to_a_bucket() -> None:
    buckets = [bucket(9, 64, 64, keep=1e-9), bucket(17, 512, 512)]
    clips = Clips(
        4, duration_seconds=[0.1, 3.0, 3.0, 3.0], width=[64, 20, 640, 64], height=[64, 20, 64, 64], checksum=1 << 31
    )
    found = assign(clips, buckets)
    reasons = {row: reason.split()[0:2] for reason, rows in found.excluded.items() for row in rows.tolist()}
    assert reasons == {0: ["too", "short"], 1: ["too", "small"], 2: ["of", "another"], 3: ["left", "over"]}


def test_rows_that_were_not_chosen_have_no_bucket_and_no_reason() -> None:
    found = assign(Clips(4), [bucket(9, 64, 64)], chosen=np.array([True, False, True, False]))
    assert found.buckets.tolist() == [0, NO_BUCKET, 0, NO_BUCKET]
    assert found.excluded == {}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shapes=st.lists(
        st.tuples(st.sampled_from((1, 5, 17)), st.sampled_from((32, 48, 96)), st.sampled_from((32, 64, 96))),
        min_size=1,
        max_size=6,
        unique=True,
    ),
)
def test_every_chosen_row_has_a_bucket_that_it_fits_or_one_reason(
    seed: int, shapes: list[tuple[int, int, int]]
) -> None:
    generator = np.random.default_rng(seed)
    count = 200
    columns = {"width": generator.integers(16, 200, count), "height": generator.integers(16, 200, count)}
    durations, images = generator.uniform(0.1, 4, count), generator.random(count) < 0.2
    clips = Clips(count, duration_seconds=durations, is_image=images, **columns)
    chosen = generator.random(count) < 0.8
    buckets = [bucket(*shape) for shape in shapes]
    found = assign(clips, buckets, chosen=chosen)
    excluded = np.concatenate([*found.excluded.values(), np.array([], dtype=int)])
    assert sorted([*excluded, *np.flatnonzero(found.buckets != NO_BUCKET)]) == np.flatnonzero(chosen).tolist()

    def fits(row: int, place: int) -> bool:
        shape = buckets[place]
        scale = [shape.width / columns["width"][row], shape.height / columns["height"][row]]
        last_start = durations[row] - 1 / 24
        is_long = shape.frames == 1 or (last_start >= (shape.frames - 1) / 8 - 1e-3 and not images[row])
        return bool(is_long and max(scale) <= 1.25 and min(scale) / max(scale) >= 0.5 - 1e-6)

    for row, place in enumerate(found.buckets.tolist()):
        if place != NO_BUCKET:
            assert fits(row, place)
            best = max(b.clip_bytes for i, b in enumerate(buckets) if fits(row, i))
            assert buckets[place].clip_bytes >= 0.7 * best  # buckets alike are chosen from by their crop
        elif chosen[row]:
            assert not any(fits(row, i) for i in range(len(buckets)))


def test_steps_of_all_buckets_cost_alike() -> None:
    shapes = [BucketConfig(1, 64, 64), BucketConfig(9, 64, 96), BucketConfig(17, 128, 128), BucketConfig(33, 96, 128)]
    config = DataConfig(path="x", frames=17, height=128, width=128, buckets=shapes)

    def cost(frames: int, height: int, width: int) -> float:
        tokens = frames * height * width / 1024
        return tokens + tokens**2 / 500

    for world_size in (1, 3):
        buckets = build_buckets(config, global_batch=64, micro_batch=4, world_size=world_size, cost=cost)
        costs = [b.global_batch * cost(b.frames, b.height, b.width) for b in buckets]
        assert max(costs) < 1.1 * min(costs)
        assert [b.name for b in buckets] == [shape.name for shape in shapes]
        assert buckets[2].global_batch == 64
        assert buckets[2].micro_batch == 4
        # Of no bucket more pixels at a time than the run's own micro-batch has, and one clip where that is larger.
        assert all(b.micro_batch * b.clip_bytes <= max(4 * buckets[2].clip_bytes, b.clip_bytes) for b in buckets)
    sizes = [b.global_batch for b in build_buckets(config, global_batch=64, micro_batch=9, world_size=7, cost=cost)]
    assert sizes == [b.global_batch for b in buckets]  # neither processes nor micro-batches decide what a step is


def test_a_bucket_may_set_its_own_micro_batch() -> None:
    config = DataConfig(path="x", buckets=[BucketConfig(9, 64, 64), BucketConfig(1, 64, 64, micro_batch=5, keep=0.5)])
    own, image = build_buckets(config, global_batch=8, micro_batch=2, world_size=2)
    assert (own.global_batch, own.micro_batch, own.keep) == (8, 2, 1.0)
    assert (image.global_batch, image.micro_batch, image.keep) == (72, 5, 0.5)
    assert [(b.global_batch, b.micro_batch) for b in single_clips(config)] == [(1, 1), (9, 5)]


@settings(max_examples=100, deadline=None)
@given(global_batch=st.integers(1, 200), world_size=st.integers(1, 9), most=st.integers(0, 40))
def test_a_balanced_micro_batch_leaves_the_fewest_places_empty(global_batch: int, world_size: int, most: int) -> None:
    found = balanced_micro_batch(global_batch, world_size=world_size, most=most)

    def steps(micro_batch: int) -> int:
        return micro_steps(global_batch, world_size=world_size, micro_batch=micro_batch)

    allowed = range(1, max(1, min(most, global_batch)) + 1)
    assert found in allowed
    fewest = min(map(steps, allowed))
    assert steps(found) == fewest
    assert found == min(micro_batch for micro_batch in allowed if steps(micro_batch) == fewest)


def test_all_faults_of_a_bucket_are_named() -> None:
    assert BucketConfig(1, 64, 64).faults("data.buckets[0]") == []
    faults = BucketConfig(frames=6, height=0, width=-2, keep=0.0, micro_batch=-1).faults("data.buckets[1]")
    assert [fault.split(" must ")[0] for fault in faults] == [
        "data.buckets[1].frames=6",
        "data.buckets[1].height=0",
        "data.buckets[1].width=-2",
        "data.buckets[1].keep=0.0",
        "data.buckets[1].micro_batch=-1",
    ]
