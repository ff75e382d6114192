"""What `muybridge doctor` knows of a run's data: facts of its datasets, clips and buckets, and what is worth a change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..data.buckets import Bucket, balanced_micro_batch
from ..data.config import DataConfig
from ..data.open_dataset import OpenDataset
from ..data.plan import Plan, micro_steps, split_places

GHOST_SHARE_WORTH_A_NOTE = 0.03
COST_TOLERANCE = 0.1
# Where the bars of the histograms begin and end.
_EDGES: dict[str, list[float]] = {
    "seconds of video": [1, 2, 4, 8, 16, 32, 64],
    "pixels of the shorter side": [128, 256, 360, 480, 720, 1080, 2160],
    "width / height": [0.5, 0.6, 0.75, 0.9, 1.1, 1.4, 1.7, 2],
}


@dataclass
class DatasetFacts:
    """A dataset: its clips, and which of them are taken."""

    name: str
    path: str
    clips: int
    taken: int
    left_out: dict[str, int]  # reason -> clips
    weight: float
    sample_share: float  # of all samples of the run


@dataclass
class BucketFacts:
    """A bucket: its batches and what they waste; and, once clips were decoded, the time that they take."""

    name: str
    clips: int
    step_share: float  # of all steps of the run
    samples_per_step: int
    micro_batch: int
    micro_steps: int  # of each rank in a step
    clips_per_rank: int  # in a step, on the rank with the most
    tokens_per_step: int | None  # None for an autoencoder, which has no tokens
    relative_cost: float  # FLOPs of a step, as a multiple of what global_batch clips of the run's own shape need
    ghost_share: float  # of the places of a step
    cut_share: float | None = None  # of the picture, mean over the samples; None where there are no clips
    scale: float | None = None  # from the video's pixels to the bucket's, mean over the samples
    enlarged_share: float | None = None  # of the samples
    clips_per_cpu_second: float | None = None  # None where none was decoded

    @property
    def step_cpu_seconds(self) -> float | None:
        """CPU seconds that the busiest rank needs to read its clips of a step."""
        return self.clips_per_rank / self.clips_per_cpu_second if self.clips_per_cpu_second else None


@dataclass
class HistogramBar:
    """The clips with a value in [start, end); None is without an end."""

    start: float | None
    end: float | None
    clips: int = 0
    taken: int = 0

    @property
    def label(self) -> str:
        """The values, to be read."""
        if self.start is None:
            return f"below {self.end:g}"
        return f"{self.start:g} and more" if self.end is None else f"{self.start:g} to {self.end:g}"


@dataclass
class Totals:
    """Means over the steps of a run."""

    clips: int
    taken: int
    samples_per_step: float
    tokens_per_step: float | None
    ghost_share: float  # of all places of all steps, weighted by their pixels
    cut_share: float  # of the picture, mean over the samples


@dataclass
class Facts:
    """All that is known without decoding."""

    datasets: list[DatasetFacts]
    buckets: list[BucketFacts]
    histograms: dict[str, list[HistogramBar]]
    totals: Totals
    notes: list[str] = field(default_factory=list)  # what is worth a change, and which


@dataclass
class ReadingSpeed:
    """How fast clips are read against what the steps of a run need; None where no clip was read."""

    cores: int  # that read for one training process
    clips_per_step: float  # of one training process, mean over the steps
    mean_cpu_seconds: float | None  # of a step
    slowest_cpu_seconds: float | None  # of a step of the slowest bucket
    slowest_bucket: str | None
    steps_per_second: float | None  # that the cores can feed, mean over the steps
    step_seconds: float | None  # of a training step, as the user said
    cores_needed: float | None  # for steps of this length, mean over the steps
    workers_needed: int | None  # whole ones, enough for the slowest bucket

    @property
    def is_enough(self) -> bool:
        """Whether the cores can feed steps of the given length, whatever their bucket."""
        return self.workers_needed is not None and self.workers_needed <= self.cores


def collect_facts(
    config: DataConfig,
    opened: Sequence[OpenDataset],
    plan: Plan,
    *,
    global_batch: int,
    processes: int,
    cost: Callable[[int, int, int], float],
    tokens: Callable[[int, int, int], int] | None,
) -> Facts:
    """Looks at indexes and plan. `cost` and `tokens` are those of one clip of (frames, height, width)."""
    reference = global_batch * cost(config.frames, config.height, config.width)
    buckets = [_bucket_facts(place, opened, plan, processes) for place in range(len(plan.buckets))]
    for bucket, found in zip(plan.buckets, buckets, strict=True):
        shape = bucket.frames, bucket.height, bucket.width
        found.relative_cost = bucket.global_batch * cost(*shape) / reference
        found.tokens_per_step = bucket.global_batch * tokens(*shape) if tokens else None
    samples = sum(found.step_share * found.samples_per_step for found in buckets)
    cut = sum(found.step_share * found.samples_per_step * (found.cut_share or 0.0) for found in buckets)
    facts = Facts(
        datasets=[
            _dataset_facts(dataset, sum(shares[place] for shares in plan.sample_shares))
            for place, dataset in enumerate(opened)
        ],
        buckets=buckets,
        histograms=_histograms(opened),
        totals=Totals(
            clips=sum(len(dataset.index) for dataset in opened),
            taken=sum(len(dataset.rows) for dataset in opened),
            samples_per_step=samples,
            tokens_per_step=sum(b.step_share * (b.tokens_per_step or 0) for b in buckets) if tokens else None,
            ghost_share=plan.ghost_share(processes),
            cut_share=cut / samples,
        ),
    )
    fields = [f"data.buckets[{place}].micro_batch" for place in range(len(config.buckets))] or ["micro_batch"]
    facts.notes = _notes(facts.buckets, plan.buckets, fields, processes)
    return facts


def _dataset_facts(dataset: OpenDataset, sample_share: float) -> DatasetFacts:
    return DatasetFacts(
        name=dataset.rows.name,
        path=str(dataset.index.folder),
        clips=len(dataset.index),
        taken=len(dataset.rows),
        left_out={reason: len(rows) for reason, rows in dataset.excluded.items()},
        weight=dataset.rows.weight,
        sample_share=sample_share,
    )


def _bucket_facts(place: int, opened: Sequence[OpenDataset], plan: Plan, processes: int) -> BucketFacts:
    bucket = plan.buckets[place]
    sizes = {"world_size": processes, "micro_batch": bucket.micro_batch}
    steps = micro_steps(bucket.global_batch, **sizes)
    groups = split_places(bucket.global_batch, rank=0, **sizes)
    found = BucketFacts(
        name=bucket.name,
        clips=sum(len(dataset.rows.rows[place]) for dataset in opened),
        step_share=plan.step_shares[place],
        samples_per_step=bucket.global_batch,
        micro_batch=bucket.micro_batch,
        micro_steps=steps,
        clips_per_rank=sum(position < bucket.global_batch for group in groups for position in group),
        tokens_per_step=None,
        relative_cost=1.0,
        ghost_share=1 - bucket.global_batch / (steps * processes * bucket.micro_batch),
    )
    total = 0.0
    sums = np.zeros(3)
    for dataset, share in zip(opened, plan.sample_shares[place], strict=True):
        if share > 0:
            rows = dataset.rows.rows[place]
            x, y = (
                side / dataset.index.column(name)[rows]
                for side, name in ((bucket.width, "width"), (bucket.height, "height"))
            )
            scale = np.maximum(x, y)
            sums += share * np.array([np.mean(1 - np.minimum(x, y) / scale), scale.mean(), np.mean(scale > 1)])
            total += share
    if total:
        found.cut_share, found.scale, found.enlarged_share = (float(value) for value in sums / total)
    return found


def _histograms(opened: Sequence[OpenDataset]) -> dict[str, list[HistogramBar]]:
    found = {}
    for name, edges in _EDGES.items():
        bars = [HistogramBar(start, end) for start, end in zip([None, *edges], [*edges, None], strict=True)]
        for dataset in opened:
            values, counts_too = _values(dataset, name)
            is_taken = np.zeros(len(dataset.index), dtype=bool)
            for rows in dataset.rows.rows:
                is_taken[rows] = True
            places = np.digitize(values, edges)
            for place, bar in enumerate(bars):
                here = (places == place) & counts_too
                bar.clips += int(here.sum())
                bar.taken += int((here & is_taken).sum())
        while bars and not bars[0].clips:
            del bars[0]
        while bars and not bars[-1].clips:
            del bars[-1]
        found[name] = bars
    return found


def _values(dataset: OpenDataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    # The values of all rows, and which of them count.
    index = dataset.index
    width, height = index.column("width"), index.column("height")
    everything = np.ones(len(index), dtype=bool)
    if name == "seconds of video":
        return index.column("duration_seconds"), ~index.column("is_image")
    return (width / height if name == "width / height" else np.minimum(width, height)), everything


def _notes(facts: list[BucketFacts], buckets: Sequence[Bucket], fields: list[str], processes: int) -> list[str]:
    notes = []
    for found, bucket, field_name in zip(facts, buckets, fields, strict=True):
        if not found.clips:
            notes.append(
                f"{found.name}: no clip fits, or larger buckets take them all; training refuses such a bucket: take it out"
            )
            continue
        if abs(found.relative_cost - 1) > COST_TOLERANCE:
            notes.append(
                f"{found.name}: a step costs {found.relative_cost:.2f} times what the reference costs, as it is of "
                f"whole samples ({found.samples_per_step}); a larger global_batch brings it nearer"
            )
        if found.ghost_share > GHOST_SHARE_WORTH_A_NOTE:
            notes.append(
                f"{found.name}: {found.ghost_share:.0%} of the computation is for ghosts ({found.samples_per_step} samples in "
                f"{processes} processes x {found.micro_steps} micro-steps of {found.micro_batch}): "
                f"{_cure_for_ghosts(bucket, field_name, processes)}"
            )
    return notes


def misfit_notes(opened: Sequence[OpenDataset], max_misfit_share: float) -> list[str]:
    """A warning for each dataset that training refuses, as too many of its clips fit no bucket."""
    return [
        f"{dataset.rows.name or 'data.path'}: {dataset.misfits} clips that are wanted fit no bucket, a larger share than "
        f"data.max_misfit_share={max_misfit_share:g}; training refuses that"
        for dataset in opened
        if dataset.misfits > max_misfit_share * (len(dataset.rows) + dataset.misfits)
    ]


def _cure_for_ghosts(bucket: Bucket, field_name: str, processes: int) -> str:
    samples = bucket.global_batch
    better = balanced_micro_batch(samples, world_size=processes, most=bucket.micro_batch)
    places = micro_steps(samples, world_size=processes, micro_batch=better) * processes * better
    if 1 - samples / places <= GHOST_SHARE_WORTH_A_NOTE:
        return f"set {field_name}={better}"
    return f"with {field_name}={better} and a global_batch {places / samples:.3g} times as large no place stays empty"


def reading_speed(buckets: Sequence[BucketFacts], *, cores: int, step_seconds: float | None) -> ReadingSpeed:
    """What `cores` cores can feed, and how many are needed for steps of `step_seconds`."""
    timed = [(found, seconds) for found in buckets if (seconds := found.step_cpu_seconds) is not None]
    found = ReadingSpeed(cores, 0.0, None, None, None, None, step_seconds, None, None)
    if not timed:
        return found
    share = sum(bucket.step_share for bucket, _ in timed)
    found.clips_per_step = sum(bucket.step_share * bucket.clips_per_rank for bucket, _ in timed) / share
    mean = sum(bucket.step_share * seconds for bucket, seconds in timed) / share
    slowest, most = max(timed, key=lambda pair: pair[1])
    found.mean_cpu_seconds, found.slowest_cpu_seconds, found.slowest_bucket = mean, most, slowest.name
    found.steps_per_second = cores / mean
    if step_seconds is not None:
        found.cores_needed, found.workers_needed = mean / step_seconds, math.ceil(most / step_seconds)
    return found
