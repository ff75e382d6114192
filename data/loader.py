"""From dataset folders to the batches of each step: the plan says which clips, this reads them.

Nothing here has a position: `steps(n)` gives the batches of step n and after, the same ones for any number of processes, prefetch
or earlier history. A checkpoint needs the number of the consumed step, where the data last changed, and the clips known to be bad.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import numpy as np
import torch

from .batch import VideoBatch
from .buckets import Bucket
from .config import Access, DataConfig
from .decode import DecodeError
from .draws import MIDDLE, draw
from .frame_ring import FrameRing, Spot
from .latent_cache import CachedClip, CacheOrigin, LatentCache
from .ledger import BadClip, Ledger
from .open_dataset import open_datasets
from .plan import GHOST, PLAN_VERSION, Plan, Segment, Slot, micro_steps
from .raw_clips import RawClips, stack_frames
from .read_ahead import ReadAhead, ReadThreads
from .run_state import STATE_VERSION, changed_settings, setting_texts, shortened
from .workers import WorkerPool

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _ReadClip:
    slot: Slot
    row: int = GHOST  # after any substitution
    caption: str = ""
    clip: np.ndarray | CachedClip | None = None  # None for a ghost
    bad: list[BadClip] = field(default_factory=list)  # what was tried before


class VideoLoader:
    """The batches of one rank. Raises ValueError if a dataset is missing, damaged or has no clip that fits."""

    def __init__(
        self,
        config: DataConfig,
        *,
        buckets: Sequence[Bucket],
        rank: int,
        world_size: int,
        seed: int,
        vae_fingerprint: str | None = None,
        text_fingerprint: str | None = None,
        videos: dict[str, str] | None = None,
    ) -> None:
        """The last three are what a latent cache must have been made with, see `latent_cache.CacheOrigin`."""
        if faults := config.faults("data"):
            raise ValueError("; ".join(faults))
        if config.access is Access.stream:
            raise ValueError(
                "data.access=stream must be raw or latents here: this needs an index (make it with: muybridge index)"
            )
        self.buckets = list(buckets)
        self.ledger = Ledger()
        self._config = config
        self._rank, self._world_size, self._seed = rank, world_size, seed
        origin = CacheOrigin(vae_fingerprint, text_fingerprint, videos or {})
        opened = open_datasets(config, self.buckets, origin)
        self.indexes = [dataset.index for dataset in opened]
        self._datasets = [dataset.rows for dataset in opened]
        self._names = [dataset.name for dataset in self._datasets]
        self._pool: WorkerPool | ReadThreads | None = None
        self._ring: FrameRing | None = None
        self._caches: list[LatentCache] = []
        self._sources: Sequence[RawClips | LatentCache]
        if config.access is Access.latents:
            reads_text = text_fingerprint is not None
            self._sources = self._caches = [LatentCache(index, reads_text=reads_text) for index in self.indexes]
            if any(cache.is_remote for cache in self._caches):
                self._pool = ReadThreads()
        else:
            pool = None
            if config.workers:
                self._ring = FrameRing(config.prefetch + 1, max(self._step_bytes(bucket) for bucket in self.buckets))
                pool = WorkerPool(config.workers, timeout_seconds=config.timeout_seconds, ring=self._ring)
            self._sources = [RawClips(index, config, pool=pool, ring=self._ring) for index in self.indexes]
            self._pool = pool
        self._read_ahead = ReadAhead(self._frames_shape, pool=self._pool, ring=self._ring, prefetch=config.prefetch)
        self.plan = self._build_plan(Segment())

    def __len__(self) -> int:
        """Clips that can be drawn: those of the filters that fit a bucket."""
        return sum(map(len, self._datasets))

    def refuse_empty_buckets(self) -> None:
        """Raises ValueError for buckets that could never come in training, as no dataset with a weight has a clip for them."""
        drawn = [dataset for dataset in self._datasets if dataset.weight > 0]
        names = [bucket.name for b, bucket in enumerate(self.buckets) if not any(len(data.rows[b]) for data in drawn)]
        if names:
            raise ValueError(
                f"data.buckets: no clip belongs to {', '.join(names)}; take {'it' if len(names) == 1 else 'them'} out, or see "
                "muybridge doctor for where the clips go"
            )

    @property
    def fingerprint(self) -> str:
        """Changes if and only if the sequence of samples could: checked when a run resumes."""
        content = [self.settings(), self.plan.state(self.plan.segment.start_step)]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def settings(self) -> dict[str, str]:
        """All that the sequence of samples depends on, by the name of the setting."""
        config = self._config
        values: dict[str, Any] = {
            "plan version": PLAN_VERSION,
            "seed": self._seed,
            "data.access": config.access.value,
            "data.transform": config.transform(),
            "global batches": [bucket.global_batch for bucket in self.buckets],
            "data.caption_dropout": config.caption_dropout,
            "data.image_share": config.image_share,
        }
        for (name, dataset), index in zip(config.sources().items(), self.indexes, strict=True):
            where = f"data.datasets.{name}" if name else "data"
            values[f"{where} (content)"] = index.fingerprint[:16]
            values[f"{where}.filter"] = dataset.filter
            if name:
                values[f"{where}.weight"] = dataset.weight
        return setting_texts(values)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint before a step keeps, besides the step and the ledger: about `MAX_STATE_BYTES` of JSON at most."""
        return shortened({"version": STATE_VERSION, "settings": self.settings(), "plan": self.plan.state(step)})

    def resume(self, state: dict[str, Any] | None) -> bool:
        """Continue from a checkpoint's `state`; whether the data changed since, so that a new segment of the plan begins here.

        Raises ValueError, naming each setting that differs, unless `data.accept_changes`.
        """
        changed = changed_settings(state, self.settings(), accept_changes=self._config.accept_changes)
        assert state is not None
        self.plan = self._build_plan(Segment.after(state["plan"]) if changed else Segment.of(state["plan"]))
        return bool(changed)

    def samples_before(self, step: int) -> int:
        """Samples of all steps before a step."""
        return self.plan.samples_before(step)

    def ghost_share(self) -> float:
        """The share of all places that hold no sample, see `Plan.ghost_share`."""
        return self.plan.ghost_share(self._world_size)

    def counts(self) -> dict[str, int]:
        """Rows in use and left out, bad clips so far, and since the start decodes by the other decoder and crashes."""
        found = {
            "rows": len(self),
            "excluded_rows": sum(map(len, self.indexes)) - len(self),
            "bad_clips": len(self.ledger),
            **(self._pool.counts() if self._pool is not None else {}),
        }
        for source in self._sources:
            for name, number in source.counts.items():
                found[name] = found.get(name, 0) + number
        return found

    def steps(self, start_step: int) -> Iterator[list[VideoBatch]]:
        """Endless: for each step from `start_step` on, this rank's batches, one per micro-step, all of one bucket.

        A clip that cannot be decoded is replaced and entered in the ledger. Raises DatasetChangedError when bytes are not those
        of the index, and TransientReadError when the storage does not answer: what cannot be repeated is not replaced.
        """
        return self._read_ahead(self._local_groups(start_step), self._read_slot, self._finish_step)

    def each_once(self, clips: int) -> Iterator[VideoBatch]:
        """For validation: this rank's share of `clips` clips, or of all if there are fewer, the same ones every time.

        Each comes once on some rank, with its first caption, from the middle of clip and picture. All ranks get as many batches,
        filled up with ghosts; a clip that cannot be decoded becomes one as well.
        """
        groups = self.plan.each_once(clips, rank=self._rank, world_size=self._world_size)
        steps = ([group] for group in groups)
        yield from chain.from_iterable(self._read_ahead(steps, self._read_middle, self._finish_step))

    def every_row(self, batch_size: int) -> Iterator[VideoBatch]:
        """Each row that fits once, bucket by bucket: its first caption, the middle of clip and picture; batches may be smaller.

        For encoding and measuring: independent of rank and seed. A row that cannot be read is left out and logged.
        """
        steps = ([group] for group in self._every_group(batch_size))
        yield from chain.from_iterable(self._read_ahead(steps, self._read_middle, self._finish_readable))

    def close(self) -> None:
        """Ends the decoding processes."""
        if self._pool is not None:
            self._pool.close()
        if self._ring is not None:
            self._ring.close()

    def _build_plan(self, segment: Segment) -> Plan:
        return Plan(
            self.buckets, self._datasets, seed=self._seed, image_share=self._config.image_share, segment=segment
        )

    def _local_groups(self, start_step: int) -> Iterator[list[list[Slot]]]:
        for step in count(start_step):
            yield self.plan.local_slots(step, rank=self._rank, world_size=self._world_size)

    def _every_group(self, batch_size: int) -> Iterator[list[Slot]]:
        for d, dataset in enumerate(self._datasets):
            for b, rows in enumerate(dataset.rows):
                for start in range(0, len(rows), batch_size):
                    part = rows[start : start + batch_size].tolist()
                    yield [Slot(0, row, b, d, row, 0) for row in part]

    def _step_bytes(self, bucket: Bucket) -> int:
        # Of the frames that this rank needs for one step.
        steps = micro_steps(bucket.global_batch, world_size=self._world_size, micro_batch=bucket.micro_batch)
        return steps * bucket.micro_batch * bucket.clip_bytes

    def _frames_shape(self, slot: Slot) -> tuple[int, int, int, int]:
        bucket = self.buckets[slot.bucket]
        return bucket.frames, bucket.height, bucket.width, 3

    def _finish_step(self, groups: list[list[_ReadClip]]) -> list[VideoBatch]:
        for clip in (clip for group in groups for clip in group if not clip.slot.is_ghost):
            self.ledger.add(clip.bad)
        return [self._batch(group) for group in groups]

    def _finish_readable(self, groups: list[list[_ReadClip]]) -> list[VideoBatch]:
        readable = ([clip for clip in group if clip.clip is not None] for group in groups)
        return [self._batch(group) for group in readable if group]

    def _read_slot(self, slot: Slot, spot: Spot | None) -> _ReadClip:
        if slot.is_ghost:
            return _ReadClip(slot)
        name, index = self._names[slot.dataset], self.indexes[slot.dataset]
        tried: list[tuple[int, str]] = []
        row: int | None = slot.row
        attempt = 0
        while row is not None:
            try:
                if reason := self.ledger.reason(name, row, slot.pass_number):
                    raise DecodeError(reason)
                captions = index.captions(row)
                draws = draw(
                    self._seed,
                    name,
                    row,
                    slot.pass_number,
                    captions=len(captions),
                    caption_dropout=self._config.caption_dropout,
                    only_caption=bool(self._caches),
                )
                clip = self._sources[slot.dataset].read(row, self.buckets[slot.bucket], draws, spot)
            except DecodeError as error:
                tried.append((row, str(error)))
                row, attempt = self._next_candidate(slot, attempt, [row for row, _ in tried])
                continue
            caption = "" if draws.caption is None else captions[draws.caption]
            return _ReadClip(slot, row, caption, clip, self._bad_clips(slot, tried, row))
        return _ReadClip(slot, bad=self._bad_clips(slot, tried, None))

    def _next_candidate(self, slot: Slot, attempt: int, tried: list[int]) -> tuple[int | None, int]:
        while (row := self.plan.substitute(slot, attempt)) in tried:
            attempt += 1
        return row, attempt + 1

    def _bad_clips(self, slot: Slot, tried: list[tuple[int, str]], substitute: int | None) -> list[BadClip]:
        found = []
        for row, reason in tried:
            key = self.indexes[slot.dataset].text("key", row)
            if self.ledger.reason(self._names[slot.dataset], row, slot.pass_number) is None:
                _log.warning("cannot read clip %s: %s", key, reason)
            place = slot.step, slot.position, substitute, (slot.pass_number,)
            found.append(BadClip(self._names[slot.dataset], row, key, reason, *place))
        return found

    def _read_middle(self, slot: Slot, spot: Spot | None) -> _ReadClip:
        if slot.is_ghost:
            return _ReadClip(slot)
        index = self.indexes[slot.dataset]
        try:
            clip = self._sources[slot.dataset].read(slot.row, self.buckets[slot.bucket], MIDDLE, spot)
        except DecodeError as error:
            _log.warning("cannot read clip %s: %s", index.text("key", slot.row), error)
            return _ReadClip(slot)
        return _ReadClip(slot, slot.row, index.text("caption", slot.row), clip)

    def _batch(self, clips: list[_ReadClip]) -> VideoBatch:
        bucket = self.buckets[clips[0].slot.bucket]
        is_real = [clip.clip is not None for clip in clips]
        media: list[Any] = [clip.clip for clip in clips]
        datasets = [clip.slot.dataset if real else GHOST for clip, real in zip(clips, is_real, strict=True)]
        return VideoBatch(
            step=clips[0].slot.step,
            step_samples=bucket.global_batch,
            # By way of numpy: torch takes five times as long over a list, which shows in batches of small latents.
            slots=torch.from_numpy(np.array([clip.slot.position for clip in clips], dtype=np.int64)),
            datasets=torch.from_numpy(np.array(datasets, dtype=np.int64)),
            rows=torch.from_numpy(np.array([clip.row for clip in clips], dtype=np.int64)),
            weights=torch.from_numpy(np.array(is_real, dtype=np.float32)),
            keys=[self.indexes[c.slot.dataset].text("key", c.row) if real else "" for c, real in zip(clips, is_real)],
            captions=[clip.caption for clip in clips],
            **(self._caches[0].assemble(bucket, media) if self._caches else stack_frames(bucket, media)),
        )
