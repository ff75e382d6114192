"""The settings of the data: which dataset, what a training clip looks like, and how it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .buckets import Bucket, BucketConfig, FitRules, balanced_micro_batch
from .decode import Decoder, decoder_fault

_DATASET_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")


class Access(StrEnum):
    """What the rows of the dataset are."""

    raw = "raw"  # encoded videos, decoded on the fly
    latents = "latents"  # a latent cache
    # Tars of encoded videos that have no index, read from start to end. Not exact: the order of samples depends on the number of
    # processes, and a run that resumes begins a new one. `muybridge index` makes an index, and exact runs, where that is possible.
    stream = "stream"


@dataclass
class DatasetConfig:
    """One dataset of a mixture."""

    path: str = ""  # dataset folder, as `muybridge prepare` writes it
    weight: float = 1.0  # its share of the samples relative to the other datasets'; 0 leaves it out
    filter: str | None = None  # as `data.filter`, for this dataset

    def faults(self, field: str) -> list[str]:
        """All breaches of the rules, as complete messages."""
        found = [] if self.path else [f"{field}.path must name a dataset folder"]
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            found.append(f"{field}.weight={self.weight} must be a number that is not negative")
        return found + _filter_faults(self.filter, f"{field}.filter")


@dataclass
class DataConfig:
    """Which clips to train on and how to read them."""

    # Dataset folder, as `muybridge prepare` writes it. With access=stream the tars: their folder, or names or URLs with braces
    # (https://host/shard-{000..127}.tar).
    path: str = ""
    # Several datasets by name, instead of `path` and `filter`; empty for one.
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    access: Access = Access.raw  # whether the clips of `path` are decoded, or their cached latents are read
    latents: str | None = None  # folder of the latent caches, which `muybridge encode` writes; null for none
    # Which clips are taken, such as 'motion > 0.5 and not is_hdr', see `row_filter`; null takes all. A latent cache holds the clips
    # of the filter that it was made with, and is refused with another one.
    filter: str | None = None
    # The clip that global_batch and micro_batch are given for, and that sample videos have; trained on where there are no buckets.
    frames: int = 9  # of a training clip; 1 + a multiple of 4
    fps: float = 8.0  # frame rate of a training clip, whatever the video's own
    height: int = 64  # pixels
    width: int = 64  # pixels
    # Clip shapes to train on; each clip goes to the largest that it fits. Empty for the one above.
    buckets: list[BucketConfig] = field(default_factory=list)
    image_share: float | None = None  # share of the samples from buckets of one frame; null leaves it to what there is
    max_upscale: float = 1.25  # clips that would have to be enlarged by more are left out
    max_crop: float = 0.5  # clips of which a larger share of the picture would be cut off are left out
    max_misfit_share: float = 0.5  # the run does not start when more of the clips that the filter takes fit no bucket
    decoder: Decoder = Decoder.decord  # tried first; PyAV, then decord read what it cannot
    workers: int = 2  # decoding processes of each rank; 0 decodes in the training process, which a bad stream may crash
    prefetch: int = 2  # steps decoded ahead; 0 for none
    timeout_seconds: float = 60.0  # a clip that takes longer to decode counts as unreadable
    caption_dropout: float = 0.1  # share of clips whose caption is replaced by the empty one, for guidance; 0 for none
    max_bad_share: float = 0.01  # of the last 10,000 samples; the run ends when more of their clips could not be read
    accept_changes: bool = False  # whether a run may be resumed with other data, from there on in another order

    def faults(self, field: str) -> list[str]:
        """All breaches of the rules, as complete messages."""
        found = self._dataset_faults(field)
        if self.access is Access.latents and not self.latents:
            found.append(
                f"{field}.latents must name a folder with {field}.access=latents; make it with: muybridge encode"
            )
        if self.access is Access.stream:
            found += self._stream_faults(field)
        if self.frames < 1 or self.frames % 4 != 1:
            found.append(
                f"{field}.frames={self.frames} must be 1 + a multiple of 4 (the autoencoder's temporal stride)"
            )
        for name in ("fps", "height", "width", "timeout_seconds"):
            if not getattr(self, name) > 0:
                found.append(f"{field}.{name}={getattr(self, name)} must be positive")
        for name in ("workers", "prefetch"):
            if getattr(self, name) < 0:
                found.append(f"{field}.{name}={getattr(self, name)} must not be negative")
        for name in ("caption_dropout", "max_bad_share", "max_misfit_share"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{field}.{name}={getattr(self, name)} must be in 0..1")
        if fault := decoder_fault(self.decoder, field=f"{field}.decoder"):
            found.append(fault)
        return found + self._bucket_faults(field)

    def sources(self) -> dict[str, DatasetConfig]:
        """The datasets by name; a single one is called "". Sorted: in which order they were set must not matter."""
        return dict(sorted(self.datasets.items())) or {"": DatasetConfig(path=self.path, filter=self.filter)}

    def shapes(self) -> list[BucketConfig]:
        """The clip shapes that are trained on."""
        return self.buckets or [BucketConfig(frames=self.frames, height=self.height, width=self.width)]

    def fit_rules(self) -> FitRules:
        """What a clip must be like to fit a bucket."""
        return FitRules(fps=self.fps, max_upscale=self.max_upscale, max_crop=self.max_crop)

    def transform(self) -> dict[str, Any]:
        """What decides a clip's shape and sampling: a latent cache is only valid for the same."""
        shapes = [f"{shape.name} keep {shape.keep:g}" if shape.keep < 1 else shape.name for shape in self.shapes()]
        return {"buckets": shapes, "fps": self.fps, "max_upscale": self.max_upscale, "max_crop": self.max_crop}

    def _dataset_faults(self, field: str) -> list[str]:
        if not self.datasets:
            found = _filter_faults(self.filter, f"{field}.filter")
            if not self.path:
                found.append(f"{field}.path must name a dataset folder; make one with: muybridge prepare SRC OUT")
            return found
        found = []
        for name, dataset in self.datasets.items():
            if not _DATASET_NAME.fullmatch(name):
                found.append(f"{field}.datasets: the name {name!r} must be 1 to 40 letters, digits, - or _")
            found += dataset.faults(f"{field}.datasets.{name}")
        for name in ("path", "filter"):
            if getattr(self, name):
                found.append(
                    f"{field}.{name}={getattr(self, name)} must be empty with {field}.datasets, which have their own"
                )
        if not any(dataset.weight > 0 for dataset in self.datasets.values()):
            found.append(f"{field}.datasets: one of the weights must be positive")
        return found

    def _stream_faults(self, field: str) -> list[str]:
        found = [
            f"{field}.{name} must not be set with {field}.access=stream, which has no index (make one with: muybridge index)"
            for name in ("datasets", "filter", "image_share")
            if getattr(self, name)
        ]
        if self.workers == 0:
            found.append(
                f"{field}.workers=0 must be at least 1 with {field}.access=stream, whose clips nobody has looked at before"
            )
        return found

    def _bucket_faults(self, field: str) -> list[str]:
        found = [fault for i, bucket in enumerate(self.buckets) for fault in bucket.faults(f"{field}.buckets[{i}]")]
        names = [bucket.name for bucket in self.buckets]
        found += [f"{field}.buckets: {name} comes twice" for name in sorted({n for n in names if names.count(n) > 1})]
        if self.image_share is not None:
            if not 0 <= self.image_share <= 1:
                found.append(f"{field}.image_share={self.image_share} must be in 0..1")
            elif len({shape.frames == 1 for shape in self.shapes()}) == 1:
                found.append(
                    f"{field}.image_share={self.image_share} needs {field}.buckets of one frame and of several frames"
                )
        if not self.max_upscale > 0:
            found.append(f"{field}.max_upscale={self.max_upscale} must be positive")
        if not 0 <= self.max_crop < 1:
            found.append(f"{field}.max_crop={self.max_crop} must be at least 0 and below 1")
        return found


def _filter_faults(expression: str | None, field: str) -> list[str]:
    if expression is None:
        return []
    from .row_filter import expression_fault

    fault = expression_fault(expression, field=field)
    return [fault] if fault else []


def build_buckets(
    config: DataConfig,
    *,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    cost: Callable[[int, int, int], float] = lambda frames, height, width: frames * height * width,
) -> list[Bucket]:
    """The buckets with their batches: a step of any of them costs what `global_batch` clips of the config's own shape cost.

    `cost` predicts one sample's from (frames, height, width). The number of processes decides the micro-batches only.
    """
    reference = cost(config.frames, config.height, config.width)
    volume = config.frames * config.height * config.width
    buckets = []
    for shape in config.shapes():
        samples = max(1, round(global_batch * reference / cost(shape.frames, shape.height, shape.width)))
        most = shape.micro_batch
        if not most and shape.volume == volume:
            most = micro_batch
        elif not most:
            most = balanced_micro_batch(samples, world_size=world_size, most=micro_batch * volume // shape.volume)
        buckets.append(Bucket(shape.frames, shape.height, shape.width, samples, most, shape.keep))
    return buckets


def single_clips(config: DataConfig) -> list[Bucket]:
    """The buckets for reading clips one by one, outside training."""
    return build_buckets(config, global_batch=1, micro_batch=1, world_size=1)
