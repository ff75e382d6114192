"""Buckets: the clip shapes that a run trains on, and which of them each clip of an index belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

NO_BUCKET = -1
LEFT_OVER = "left over by the buckets' keep"  # the one reason that is no misfit
# Buckets with as many frames and at least this share of the area are alike: clips go to the one of their aspect ratio. Steps
# between the usual resolutions are larger (480p has 0.43 of 720p), and shapes of one resolution differ by less.
_SAME_AREA = 0.7
_SLACK_TOLERANCE_SECONDS = 1e-3  # durations are rounded in some containers
_CHUNK = 1 << 17  # rows at a time: all temporary arrays stay in the processor's cache


@dataclass
class BucketConfig:
    """One clip shape of `data.buckets`."""

    frames: int = 1  # 1 + a multiple of 4; 1 for still images
    height: int = 64  # pixels
    width: int = 64  # pixels
    keep: float = (
        1.0  # share of the clips that fit here and stay; the others go on to the next smaller bucket that they fit
    )
    # Clips of one forward on one rank; 0 takes as many as have at most the pixels of the run's micro_batch.
    micro_batch: int = 0

    @property
    def name(self) -> str:
        """Frames x height x width."""
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def volume(self) -> int:
        """Pixels of a clip."""
        return self.frames * self.height * self.width

    def faults(self, field: str) -> list[str]:
        """All breaches of the rules, as complete messages."""
        found = []
        if self.frames < 1 or self.frames % 4 != 1:
            found.append(
                f"{field}.frames={self.frames} must be 1 + a multiple of 4 (the autoencoder's temporal stride)"
            )
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                found.append(f"{field}.{name}={getattr(self, name)} must be positive")
        if not 0 < self.keep <= 1:
            found.append(f"{field}.keep={self.keep} must be above 0 and at most 1")
        if self.micro_batch < 0:
            found.append(f"{field}.micro_batch={self.micro_batch} must not be negative")
        return found


@dataclass(frozen=True)
class Bucket:
    """A clip shape, with the samples of a step of such clips."""

    frames: int
    height: int  # pixels
    width: int  # pixels
    global_batch: int  # samples of one optimizer step over all ranks
    micro_batch: int  # samples of one forward on one rank
    keep: float = 1.0

    @property
    def name(self) -> str:
        """Frames x height x width."""
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def clip_bytes(self) -> int:
        """Bytes of a decoded clip, uint8 RGB."""
        return self.frames * self.height * self.width * 3


@dataclass(frozen=True)
class FitRules:
    """What a clip must be like to fit a bucket."""

    fps: float  # frame rate of the training clips
    max_upscale: float  # a clip may be enlarged by this factor at most
    max_crop: float  # share of the picture that may be cut off


class Columns(Protocol):
    """What the assignment needs of an index."""

    def __len__(self) -> int: ...

    def column(self, name: str) -> np.ndarray: ...


@dataclass
class Assignment:
    """The bucket of every row, and why some have none."""

    buckets: np.ndarray  # int16, place in the list of buckets; NO_BUCKET for rows that fit none
    excluded: dict[str, np.ndarray] = field(default_factory=dict)  # reason -> rows, ascending


def assign_buckets(index: Columns, buckets: Sequence[Bucket], rules: FitRules, chosen: np.ndarray) -> Assignment:
    """Gives every chosen row (bool [rows]) the largest bucket that it fits, of those alike the one that crops least.

    What a bucket does not keep goes on to the next smaller one. Depends on nothing but the clips and the buckets: the draw behind
    `keep` is keyed by the checksum of the clip's bytes.
    """
    levels = _levels(buckets)
    names = ("duration_seconds", "fps_numerator", "fps_denominator", "width", "height", "is_image", "checksum")
    columns = {name: index.column(name) for name in names}
    assigned = np.full(len(index), NO_BUCKET, dtype=np.int16)
    faults = np.zeros(len(index), dtype=np.uint8)
    for start in range(0, len(index), _CHUNK):
        part = slice(start, start + _CHUNK)
        clips = {name: column[part] for name, column in columns.items()}
        _assign_part(clips, buckets, levels, rules, chosen[part], assigned[part], faults[part])
    excluded = {}
    for fault, reason in enumerate(_reasons(buckets, rules), start=1):
        if len(rows := np.flatnonzero(faults == fault)):
            excluded[reason] = rows
    return Assignment(assigned, excluded)


# In the order in which a clip passes them; the last one that it fails for all buckets is the reason why it has none.
_TOO_SHORT, _NO_IMAGES, _TOO_SMALL, _TOO_LONG_A_SIDE, _NOT_KEPT = range(1, 6)


def _reasons(buckets: Sequence[Bucket], rules: FitRules) -> list[str]:
    shortest = min(buckets, key=lambda bucket: bucket.frames)
    smallest = min(buckets, key=lambda bucket: bucket.height * bucket.width)
    return [
        f"too short for {shortest.frames} frames at {rules.fps:g} fps",
        f"still images, which have no {shortest.frames} frames",
        f"too small for {smallest.name} (data.max_upscale={rules.max_upscale:g})",
        f"of another aspect ratio than all buckets (data.max_crop={rules.max_crop:g})",
        LEFT_OVER,
    ]


def _levels(buckets: Sequence[Bucket]) -> list[list[int]]:
    # Places of buckets, largest first; those with as many frames and about the same area together.
    order = sorted(range(len(buckets)), key=lambda i: (-buckets[i].clip_bytes, i))
    levels: list[list[int]] = []
    for place in order:
        for level in levels:
            first, bucket = buckets[level[0]], buckets[place]
            if first.frames == bucket.frames and bucket.clip_bytes >= _SAME_AREA * first.clip_bytes:
                level.append(place)
                break
        else:
            levels.append([place])
    return levels


def _assign_part(
    clips: dict[str, np.ndarray],
    buckets: Sequence[Bucket],
    levels: list[list[int]],
    rules: FitRules,
    chosen: np.ndarray,
    assigned: np.ndarray,
    faults: np.ndarray,
) -> None:
    # Fills `assigned` and `faults` of a part of the rows in place.
    is_image = clips["is_image"]
    last_start = clips["duration_seconds"] - clips["fps_denominator"] / clips["fps_numerator"]
    width, height = clips["width"].astype(np.float32), clips["height"].astype(np.float32)
    passed = np.where(chosen, np.where(is_image, _NO_IMAGES, _TOO_SHORT), 0).astype(np.uint8)
    is_open = chosen.copy()
    for level in levels:
        frames = buckets[level[0]].frames
        span = (frames - 1) / rules.fps
        in_time = is_open  # every clip has one frame, whatever a container says of its duration
        if frames > 1:
            # A clip's last frame must start no later than the video's last frame.
            in_time = is_open & ~is_image & (last_start >= span - _SLACK_TOLERANCE_SECONDS)
        if not in_time.any():
            continue
        np.maximum(passed, np.uint8(_TOO_SMALL), out=passed, where=in_time)
        best_kept = np.zeros(len(chosen), dtype=np.float32)  # share of the picture that is not cut off
        best = np.full(len(chosen), NO_BUCKET, dtype=np.int16)
        for place in level:
            bucket = buckets[place]
            x, y = bucket.width / width, bucket.height / height  # the larger is the scale
            is_large = in_time & (np.maximum(x, y) <= rules.max_upscale)
            np.maximum(passed, np.uint8(_TOO_LONG_A_SIDE), out=passed, where=is_large)
            kept = np.minimum(x, y) / np.maximum(x, y)
            better = is_large & (kept >= 1 - rules.max_crop) & (kept > best_kept)
            best_kept[better] = kept[better]
            best[better] = place
        fits = best != NO_BUCKET
        passed[fits] = _NOT_KEPT
        for place in level:
            if buckets[place].keep < 1:
                fits &= (best != place) | (_uniform(clips["checksum"], buckets[place]) < buckets[place].keep)
        assigned[fits] = best[fits]
        is_open &= ~fits
    faults[is_open] = passed[is_open]


def _uniform(checksums: np.ndarray, bucket: Bucket) -> np.ndarray:
    # Numbers in [0, 1) by the finaliser of splitmix64, as `keyed.Permutation` mixes.
    key = (bucket.frames << 40) ^ (bucket.height << 20) ^ bucket.width
    bits = (checksums.astype(np.uint64) << np.uint64(32)) ^ np.uint64(key)
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ bits >> np.uint64(31)) >> np.uint64(11)) / 2.0**53


def balanced_micro_batch(global_batch: int, *, world_size: int, most: int) -> int:
    """The samples of one forward, at most `most`, with which the fewest places of a step stay empty."""
    most = max(1, min(most, global_batch))
    accumulation = -(-global_batch // (world_size * most))
    return -(-global_batch // (world_size * accumulation))
