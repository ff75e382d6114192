"""Which clip stands in which place of which step: a pure function of the seed and the step, with no state to save.

Every step has one bucket, the same on all ranks. A *stream* is the rows of one dataset in one bucket; it goes through all of them
in a new order each pass, and batches run on across passes, so no row is padded, dropped or repeated early.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from .buckets import Bucket
from .keyed import Permutation, Shares

PLAN_VERSION = 2  # part of the data fingerprint: raise it when any draw below changes

GHOST = -1  # dataset and row of a ghost
SUBSTITUTES = 8  # other rows that are tried for a slot


@dataclass(frozen=True)
class Slot:
    """One place in the global batch of a step, and the clip that fills it.

    A ghost lies behind the global batch, holds no clip and counts for nothing: it only fills up a micro-batch.
    """

    step: int
    position: int  # in the global batch
    bucket: int  # place in the plan's list of buckets
    dataset: int  # place in the plan's list of datasets; GHOST for a ghost
    row: int  # of the dataset's index; GHOST for a ghost
    pass_number: int  # how often this row was drawn before

    @property
    def is_ghost(self) -> bool:
        return self.row == GHOST


@dataclass(frozen=True)
class DatasetRows:
    """What the plan needs of a dataset."""

    name: str  # keys every draw, so that it does not depend on which other datasets there are
    rows: list[np.ndarray]  # for each bucket the rows of the dataset's index, int32 and ascending
    content: str = ""  # changes with the clips behind the rows
    weight: float = 1.0  # share of the samples, relative to the other datasets'

    def __len__(self) -> int:
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Segment:
    """Where the plan in force began: at step 0, or where a run's data changed."""

    start_step: int = 0
    start_sample: int = 0  # samples of the steps before
    # Draws by the hash of a stream before `step`, which is not before the start: streams that are still there go on from them.
    step: int = 0
    drawn: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Segment:
        """The segment of a plan with this `Plan.state`."""
        return cls(state["start_step"], state["start_sample"], state["step"], _unpacked(state["streams"]))

    @classmethod
    def after(cls, state: dict[str, Any]) -> Segment:
        """The segment that begins where a plan with this `Plan.state` stops."""
        return cls(state["step"], state["sample"], state["step"], _unpacked(state["streams"]))


def state_without_streams(step: int, sample: int) -> dict[str, Any]:
    """The `Plan.state` of a run that reached this step, after so many samples, without a plan."""
    return {"start_step": step, "start_sample": sample, "step": step, "sample": sample, "streams": _packed({})}


def _packed(drawn: dict[int, int]) -> str:
    # The differences of sorted hashes are small, and so is what stands in the higher bytes: together they compress well.
    hashes = np.array(sorted(drawn), dtype="<u8")
    counts = np.array([drawn[key] for key in hashes.tolist()], dtype="<u8")
    columns = np.stack([np.diff(hashes, prepend=np.uint64(0)), counts])  # [2, streams]
    planes = columns.view(np.uint8).reshape(2, -1, 8).transpose(0, 2, 1)  # [2, 8 bytes, streams]
    return base64.b85encode(zlib.compress(planes.tobytes(), 9)).decode()


def _unpacked(text: str) -> dict[int, int]:
    planes = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8).reshape(2, 8, -1)
    differences, counts = np.ascontiguousarray(planes.transpose(0, 2, 1)).view("<u8")[..., 0]
    return dict(zip(np.cumsum(differences).tolist(), counts.tolist(), strict=True))


@lru_cache(maxsize=4096)
def _order_of_pass(size: int, seed: int, dataset: str, bucket: str, pass_number: int) -> Permutation:
    return Permutation.keyed(size, seed, "order", dataset, bucket, pass_number)


class Plan:
    """The slots of every step."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        datasets: Sequence[DatasetRows],
        *,
        seed: int,
        image_share: float | None = None,
        segment: Segment | None = None,
    ) -> None:
        """`image_share` is the share of the samples that come from buckets of one frame; None leaves it to what there is.

        Raises ValueError where there is nothing to draw from, or the segment is one of other data.
        """
        if not any(len(dataset) and dataset.weight > 0 for dataset in datasets):
            raise ValueError("no dataset with a positive weight has a clip")
        self.buckets, self.datasets, self.seed = list(buckets), list(datasets), seed
        self.segment = segment or Segment()
        start = self.segment.start_step
        self.sample_shares = self._sample_shares(image_share)  # [buckets][datasets], their sum is 1
        per_step = [sum(shares) / b.global_batch for shares, b in zip(self.sample_shares, self.buckets, strict=True)]
        self.step_shares = [share / sum(per_step) for share in per_step]
        self._bucket_of_step = Shares(self.step_shares, seed, "bucket", start)
        self._dataset_of_slot = {
            place: Shares(shares, seed, "dataset", self.buckets[place].name, start)
            for place, shares in enumerate(self.sample_shares)
            if sum(shares) > 0
        }
        self._stream_hashes = [[self._stream_hash(d, b) for b in range(len(buckets))] for d in range(len(datasets))]
        self._drawn_before = [
            [
                self.segment.drawn.get(key, 0) - self._drawn_since(d, b, self.segment.step)
                for b, key in enumerate(hashes)
            ]
            for d, hashes in enumerate(self._stream_hashes)
        ]
        if min(map(min, self._drawn_before)) < 0:
            raise ValueError(
                "the checkpoint was made with other rows of the datasets, though their settings are the same"
            )

    def bucket(self, step: int) -> int:
        """The bucket of a step, as a place in the list."""
        if step < self.segment.start_step:
            raise ValueError(f"step={step} must not be before this plan begins, at step {self.segment.start_step}")
        return self._bucket_of_step(step - self.segment.start_step)

    def slots(self, step: int) -> list[Slot]:
        """The slots of a step, in the order of their positions."""
        positions = range(self.buckets[self.bucket(step)].global_batch)
        slots = self._slots_at(step, positions)
        return [slots[position] for position in positions]

    def local_slots(self, step: int, *, rank: int, world_size: int) -> list[list[Slot]]:
        """One rank's slots, one list for each micro-step; as many lists on every rank, filled up with ghosts.

        In micro-step m rank r takes `micro_batch` slots from position (m * world_size + r) * micro_batch on.
        """
        number = self.bucket(step)
        bucket = self.buckets[number]
        groups = split_places(bucket.global_batch, rank=rank, world_size=world_size, micro_batch=bucket.micro_batch)
        real = [place for group in groups for place in group if place < bucket.global_batch]
        slots = self._slots_at(step, real)
        return [[slots.get(place) or Slot(step, place, number, GHOST, GHOST, 0) for place in group] for group in groups]

    def substitute(self, slot: Slot, attempt: int) -> int | None:
        """The row to take where the row of a slot cannot be read, for attempts 0 to SUBSTITUTES - 1; None for no more."""
        rows = self.datasets[slot.dataset].rows[slot.bucket]
        if attempt >= min(SUBSTITUTES, len(rows)):
            return None
        order = Permutation.keyed(len(rows), self.seed, "substitute", slot.step, slot.position)
        return int(rows[order(attempt)])

    def each_once(self, clips: int, *, rank: int, world_size: int) -> list[list[Slot]]:
        """`clips` rows, or all with a weight if there are fewer, each in one slot on one rank: the same ones every time.

        All ranks get as many groups, of the same buckets in the same order, filled up with ghosts.
        """
        weighted = [d for d, dataset in enumerate(self.datasets) if dataset.weight > 0]
        streams = [(b, d) for d in weighted for b in range(len(self.buckets))]
        ends = np.cumsum([len(self.datasets[d].rows[b]) for b, d in streams])
        rows = int(ends[-1])
        order = Permutation.keyed(rows, self.seed, "each_once")
        by_bucket: dict[int, list[Slot]] = {}
        for position in range(min(clips, rows)):
            number = order(position)
            stream = int(np.searchsorted(ends, number, side="right"))
            b, d = streams[stream]
            row = int(self.datasets[d].rows[b][number - int(ends[stream])])  # counted from the end
            by_bucket.setdefault(b, []).append(Slot(0, position, b, d, row, 0))
        groups, ghosts = [], rows
        for b, slots in sorted(by_bucket.items()):
            micro_batch = self.buckets[b].micro_batch
            for group in split_places(len(slots), rank=rank, world_size=world_size, micro_batch=micro_batch):
                groups.append([slots[i] if i < len(slots) else Slot(0, ghosts + i, b, GHOST, GHOST, 0) for i in group])
        return groups

    def samples_before(self, step: int) -> int:
        """Samples of all steps before a step."""
        return self.segment.start_sample + sum(self._places(b, step) for b in range(len(self.buckets)))

    def state(self, step: int) -> dict[str, Any]:
        """The plan before a step as JSON, a few bytes a stream: all that a plan for other data needs to go on there."""
        drawn: dict[int, int] = {}
        for d, hashes in enumerate(self._stream_hashes):
            for b, key in enumerate(hashes):
                if count := self._drawn(d, b, step):
                    drawn[key] = count
        return {
            "start_step": self.segment.start_step,
            "start_sample": self.segment.start_sample,
            "step": step,
            "sample": self.samples_before(step),
            "streams": _packed(drawn),
        }

    def ghost_share(self, world_size: int) -> float:
        """The share of all places that hold no sample, and are computed for nothing; weighted by their pixels."""
        return ghost_share(self.buckets, self.step_shares, world_size)

    def _slots_at(self, step: int, positions: Sequence[int]) -> dict[int, Slot]:
        number = self.bucket(step)
        bucket = self.buckets[number]
        first = self._places(number, step)
        choice = self._dataset_of_slot[number]
        # Which dataset comes where is regular; without this a rank could get always the same one.
        order = Permutation.keyed(bucket.global_batch, self.seed, "position", step)
        before = [counts[number] for counts in self._drawn_before]
        lengths = [len(dataset.rows[number]) for dataset in self.datasets]
        # Positions and places by dataset and pass number.
        passes: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for position, slot_place in zip(positions, order.many(positions), strict=True):
            dataset, count = choice.draw(first + slot_place)
            pass_number, place = divmod(before[dataset] + count, lengths[dataset])
            at, places = passes.setdefault((dataset, pass_number), ([], []))
            at.append(position)
            places.append(place)
        slots = {}
        for (dataset, pass_number), (at, places) in passes.items():
            source = self.datasets[dataset]
            rows = source.rows[number]
            order = _order_of_pass(lengths[dataset], self.seed, source.name, bucket.name, pass_number)
            chosen = rows[order.many(places)].tolist()
            for position, row in zip(at, chosen, strict=True):
                slots[position] = Slot(step, position, number, dataset, row, pass_number)
        return slots

    def _places(self, bucket: int, step: int) -> int:
        # Slots of a bucket in this segment before a step.
        steps = self._bucket_of_step.count(bucket, step - self.segment.start_step)
        return steps * self.buckets[bucket].global_batch

    def _drawn_since(self, dataset: int, bucket: int, step: int) -> int:
        # How often a stream was drawn from in this segment before a step.
        choice = self._dataset_of_slot.get(bucket)
        return choice.count(dataset, self._places(bucket, step)) if choice else 0

    def _drawn(self, dataset: int, bucket: int, step: int) -> int:
        return self._drawn_before[dataset][bucket] + self._drawn_since(dataset, bucket, step)

    def _sample_shares(self, image_share: float | None) -> list[list[float]]:
        weight = sum(dataset.weight for dataset in self.datasets if len(dataset))
        shares = [
            [data.weight / weight * len(data.rows[b]) / len(data) if len(data) else 0.0 for data in self.datasets]
            for b in range(len(self.buckets))
        ]
        if image_share is None:
            return shares
        images = sum(sum(of) for of, bucket in zip(shares, self.buckets, strict=True) if bucket.frames == 1)
        for wanted, found, what in (
            (image_share, images, "one frame"),
            (1 - image_share, 1 - images, "several frames"),
        ):
            if wanted > 0 and found <= 1e-12:
                raise ValueError(f"data.image_share={image_share} needs clips in buckets of {what}, and there are none")
        factors = [
            image_share / images
            if bucket.frames == 1 and images
            else (1 - image_share) / (1 - images)
            if images < 1
            else 0.0
            for bucket in self.buckets
        ]
        return [[share * factor for share in of] for of, factor in zip(shares, factors, strict=True)]

    def _stream_hash(self, dataset: int, bucket: int) -> int:
        rows = self.datasets[dataset].rows[bucket]
        text = f"{self.datasets[dataset].name}:{self.datasets[dataset].content}:{self.buckets[bucket].name}:{len(rows)}"
        digest = hashlib.blake2b(text.encode(), digest_size=4)
        digest.update(np.ascontiguousarray(rows, dtype=np.int32).tobytes())
        return int.from_bytes(digest.digest(), "little")


def ghost_share(buckets: Sequence[Bucket], step_shares: Sequence[float], world_size: int) -> float:
    """The share of all places that hold no sample; weighted by their pixels. `step_shares` is how often each bucket comes."""
    samples = places = 0.0
    for share, bucket in zip(step_shares, buckets, strict=True):
        accumulation = micro_steps(bucket.global_batch, world_size=world_size, micro_batch=bucket.micro_batch)
        samples += share * bucket.global_batch * bucket.clip_bytes
        places += share * accumulation * world_size * bucket.micro_batch * bucket.clip_bytes
    return 1 - samples / places


def micro_steps(global_batch: int, *, world_size: int, micro_batch: int) -> int:
    """Micro-batches of each rank in one step: the least whose places hold the global batch."""
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} must be positive")
    return -(-global_batch // (world_size * micro_batch))


def split_places(global_batch: int, *, rank: int, world_size: int, micro_batch: int) -> list[range]:
    """The places of one rank, a range for each micro-step; those from `global_batch` on are ghosts."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must be in 0..{world_size - 1}")
    together = world_size * micro_batch
    steps = micro_steps(global_batch, world_size=world_size, micro_batch=micro_batch)
    return [range(start, start + micro_batch) for start in range(rank * micro_batch, steps * together, together)]
