"""Training clips from shards that no index knows: what comes next is what arrives next.

Not exact. Which clips a step has depends on the number of processes and on what is read first; a run that resumes begins a new
order, and what was waiting in queues at the end of the run before is not seen in that pass. `data.access=raw` has none of this.

All ranks still have one shape a step: they tell each other how many clips of each bucket they have ready, and take the bucket of
which the poorest rank has most. A clip that cannot be read costs itself and is entered in the ledger; a hang costs one time limit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from .batch import VideoBatch
from .buckets import Bucket
from .config import Access, DataConfig
from .decode import DecodeError
from .draws import MIDDLE, Draws, draw
from .frame_ring import FrameRing, Spot
from .keyed import keyed_bits
from .ledger import BadClip, DataBudgetError, Ledger
from .plan import GHOST, SUBSTITUTES, ghost_share, split_places, state_without_streams
from .raw_clips import decode_arguments, decode_in
from .read_ahead import ReadAhead
from .run_state import STATE_VERSION, changed_settings, setting_texts
from .staged import StagedStreams
from .stream_agreement import Gather, agree, alone, common_bucket
from .stream_reader import HOPELESS_PASSES, HOPELESS_SAMPLES, StreamClip, StreamReader
from .stream_samples import BadSample, SampleStream, find_streams
from .workers import WorkerPool

NOT_EXACT = (
    "data.access=stream: the order of samples depends on the number of processes and is not continued after a restart"
)

_log = logging.getLogger(__name__)
_WAIT_SECONDS = 0.05  # between two questions whether all ranks have a bucket ready
_LOGGED = 20  # bad samples, and after them every so many


@dataclass(frozen=True)
class _Place:
    """One place of a step."""

    step: int
    position: int  # in the global batch
    bucket: int
    clip: StreamClip | None  # None for a ghost


@dataclass(frozen=True)
class _ReadClip:
    place: _Place
    clip: StreamClip | None = None  # after any substitution; None for a ghost
    caption: str = ""
    frames: np.ndarray | None = None
    bad: list[BadClip] = field(default_factory=list)  # what was tried before


class StreamLoader:
    """The batches of one rank; it has what the trainer needs of `loader.VideoLoader`."""

    def __init__(
        self,
        config: DataConfig,
        *,
        buckets: Sequence[Bucket],
        rank: int,
        world_size: int,
        seed: int,
        gather: Gather = alone,
    ) -> None:
        """Raises ValueError where no shard can be read."""
        if faults := config.faults("data"):
            raise ValueError("; ".join(faults))
        assert config.access is Access.stream, config.access
        self.buckets = list(buckets)
        self.ledger = Ledger()
        self._config = config
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._gather = gather
        self._shards = find_streams(config.path, field="data.path")
        # Rank 0 has the most clips of a step that does not divide.
        self._needed = [sum(map(len, self._real_places(bucket, 0))) for bucket in self.buckets]
        places = [sum(map(len, self._places(bucket, rank))) for bucket in self.buckets]
        most_bytes = max(bucket.clip_bytes * number for bucket, number in zip(self.buckets, places, strict=True))
        self._ring = FrameRing(config.prefetch + 1, most_bytes)
        self._pool = WorkerPool(config.workers, timeout_seconds=config.timeout_seconds, ring=self._ring)
        self._read_ahead = ReadAhead(self._frames_shape, pool=self._pool, ring=self._ring, prefetch=config.prefetch)
        self._reader: StreamReader | None = None
        self._copies = StagedStreams()
        self._bad_samples = 0
        self._before = {0: 0}  # samples before the step that comes next, and before the last one

    @property
    def fingerprint(self) -> str:
        """Changes with what is read, and how."""
        return hashlib.blake2b(json.dumps(self.settings()).encode(), digest_size=16).hexdigest()

    def settings(self) -> dict[str, str]:
        """What the samples depend on, by the name of the setting; of the shards only the names are known."""
        config = self._config
        names = [PurePosixPath(shard).name for shard in self._shards]
        return setting_texts(
            {
                "seed": self._seed,
                "data.access": config.access.value,
                "data.transform": config.transform(),
                "global batches": [bucket.global_batch for bucket in self.buckets],
                "data.caption_dropout": config.caption_dropout,
                "data (shards)": hashlib.blake2b(json.dumps(names).encode(), digest_size=8).hexdigest(),
            }
        )

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint before a step keeps: enough to count on, in a new order; a run with an index may go on from it too."""
        plan = state_without_streams(step, self.samples_before(step))
        return {"version": STATE_VERSION, "settings": self.settings(), "plan": plan, "order_is_continued": False}

    def resume(self, state: dict[str, Any] | None) -> bool:
        """Go on counting from a checkpoint's `state`; whether the data changed since.

        Raises ValueError, naming each setting that differs, unless `data.accept_changes`.
        """
        changed = changed_settings(state, self.settings(), accept_changes=self._config.accept_changes)
        assert state is not None
        self._before = {state["plan"]["step"]: state["plan"]["sample"]}
        return bool(changed)

    def samples_before(self, step: int) -> int:
        """Samples of all steps before the one that comes next, or the one before it, which another thread may just have made."""
        before = self._before
        assert step in before, f"of {step} nothing is known, the next step is {max(before)}"
        return before[step]

    def ghost_share(self) -> float:
        """The share of all places that hold no sample, if all buckets came equally often; weighted by their pixels."""
        return ghost_share(self.buckets, [1.0] * len(self.buckets), self._world_size)

    def counts(self) -> dict[str, int]:
        """Shards, bad clips so far, and since the start samples that were read, fitted no bucket, or found its queue full."""
        reader = self._reader
        return {
            "shards": len(self._shards),
            "samples": reader.samples if reader else 0,
            "left_out_samples": reader.left_out.total() if reader else 0,
            "dropped_samples": reader.dropped if reader else 0,
            "bad_clips": len(self.ledger),
            **self._pool.counts(),
            **self._copies.counts,
        }

    def steps(self, start_step: int) -> Iterator[list[VideoBatch]]:
        """Endless: for each step from `start_step` on, this rank's batches, one per micro-step, all of one bucket.

        Collective. The order is drawn from the seed and `start_step`. Raises DataBudgetError and ValueError, on all ranks, where
        nothing comes that a step could be made of, and TransientReadError where a storage does not answer.
        """
        seed = keyed_bits(self._seed, "stream", start_step)
        self._reader = reader = self._open_reader(rank=self._rank, world_size=self._world_size, seed=seed)
        try:
            steps = self._agreed_steps(reader, start_step)
            yield from self._read_ahead(steps, partial(self._read, reader, seed), self._finish_step)
        finally:
            reader.close()

    def every_row(self, batch_size: int) -> Iterator[VideoBatch]:
        """For measuring, without the other ranks: clips in any order, pass after pass, their middle and first caption."""
        reader = self._open_reader(rank=0, world_size=1, seed=self._seed)
        try:
            steps = self._steps_of_one(reader, batch_size)
            yield from chain.from_iterable(self._read_ahead(steps, self._read_middle, self._finish_readable))
        finally:
            reader.close()

    def close(self) -> None:
        """Ends the reading thread and the decoding processes."""
        if self._reader is not None:
            self._reader.close()
        self._pool.close()
        self._ring.close()

    def _open_reader(self, *, rank: int, world_size: int, seed: int) -> StreamReader:
        return StreamReader(
            SampleStream(self._shards, rank=rank, world_size=world_size, seed=seed, copies=self._copies),
            buckets=self.buckets,
            needed=self._needed,
            rules=self._config.fit_rules(),
            pool=self._pool,
            workers=self._config.workers,
        )

    def _agreed_steps(self, reader: StreamReader, start_step: int) -> Iterator[list[list[_Place]]]:
        for step in count(start_step):
            number = self._agreed_bucket(reader, step)
            bucket = self.buckets[number]
            clips = iter(reader.take(number, sum(map(len, self._real_places(bucket, self._rank)))))
            yield [
                [_Place(step, position, number, next(clips, None)) for position in places]
                for places in self._places(bucket, self._rank)
            ]

    def _agreed_bucket(self, reader: StreamReader, step: int) -> int:
        while True:
            ready = reader.ready()
            for bad in reader.take_outcomes():
                self._enter(bad, step)
            found = agree(
                ready,
                needed=self._needed,
                is_hopeless=reader.is_hopeless,
                is_unreadable=self.ledger.has_long_run,
                gather=self._gather,
            )
            if found.bucket is not None:
                return found.bucket
            if found.unreadable is not None:
                raise DataBudgetError(
                    f"no step can be made: process {found.unreadable} met nothing but bad samples for long; {self._told()}"
                )
            if found.hopeless is not None:
                raise ValueError(
                    f"data.path={self._config.path}: process {found.hopeless} found no clip that it can use in "
                    f"{HOPELESS_SAMPLES} samples or {HOPELESS_PASSES} passes; {self._told()}"
                )
            # A rank that has a step's clips of some bucket waits for the poorer ones, until these have some too, but of others.
            reader.wait(_WAIT_SECONDS, reads_on=found.all_have_some)

    def _steps_of_one(self, reader: StreamReader, batch_size: int) -> Iterator[list[list[_Place]]]:
        while not reader.is_hopeless:
            bucket = common_bucket([reader.ready()], self._needed)
            if bucket is not None:
                yield [[_Place(0, i, bucket, clip) for i, clip in enumerate(reader.take(bucket, batch_size))]]
            else:
                reader.wait(_WAIT_SECONDS, reads_on=False)

    def _read(self, reader: StreamReader, seed: int, place: _Place, spot: Spot | None) -> _ReadClip:
        tried: list[tuple[StreamClip, str]] = []
        clip = place.clip
        while clip is not None:
            sample = clip.sample
            draws = draw(
                seed,
                "",
                sample.row,
                sample.pass_number,
                captions=len(sample.captions),
                caption_dropout=self._config.caption_dropout,
            )
            try:
                frames = self._decoded(clip, self.buckets[place.bucket], draws, spot)
            except DecodeError as error:
                tried.append((clip, str(error)))
                clip = reader.take_spare(place.bucket) if len(tried) <= SUBSTITUTES else None
                continue
            caption = "" if draws.caption is None else sample.captions[draws.caption]
            return _ReadClip(place, clip, caption, frames, _bad_clips(place, tried, sample.row))
        return _ReadClip(place, bad=_bad_clips(place, tried, None))

    def _read_middle(self, place: _Place, spot: Spot | None) -> _ReadClip:
        assert place.clip is not None
        try:
            frames = self._decoded(place.clip, self.buckets[place.bucket], MIDDLE, spot)
        except DecodeError as error:
            _log.warning("cannot read clip %s: %s", place.clip.sample.key, error)
            return _ReadClip(place)
        return _ReadClip(place, place.clip, place.clip.sample.captions[0], frames)

    def _decoded(self, clip: StreamClip, bucket: Bucket, draws: Draws, spot: Spot | None) -> np.ndarray:
        arguments = decode_arguments(
            self._config,
            bucket,
            draws,
            last_start_seconds=clip.last_start_seconds,
            seekable=clip.seekable,
        )
        _, payload = decode_in(self._pool, {"data": clip.sample.data, "out": spot, **arguments})
        if spot is not None:
            return self._ring.view(spot)
        return np.frombuffer(payload, dtype=np.uint8).reshape(bucket.frames, bucket.height, bucket.width, 3)

    def _finish_step(self, groups: list[list[_ReadClip]]) -> list[VideoBatch]:
        for clip in (clip for group in groups for clip in group if clip.place.clip is not None):
            for bad in clip.bad:
                self._log_bad(bad)
            self.ledger.add(clip.bad)
        first = groups[0][0].place
        samples = max(self._before.values())
        self._before = {first.step: samples, first.step + 1: samples + self.buckets[first.bucket].global_batch}
        return [self._batch(group) for group in groups]

    def _finish_readable(self, groups: list[list[_ReadClip]]) -> list[VideoBatch]:
        readable = [clip for clip in groups[0] if clip.clip is not None]
        return [self._batch(readable)] if readable else []

    def _batch(self, clips: list[_ReadClip]) -> VideoBatch:
        place = clips[0].place
        bucket = self.buckets[place.bucket]
        frames = np.zeros((len(clips), bucket.frames, bucket.height, bucket.width, 3), dtype=np.uint8)
        for out, clip in zip(frames, clips, strict=True):
            if clip.frames is not None:
                out[:] = clip.frames
        return VideoBatch(
            step=place.step,
            step_samples=bucket.global_batch,
            slots=torch.tensor([clip.place.position for clip in clips]),
            datasets=torch.tensor([0 if clip.clip else GHOST for clip in clips]),
            rows=torch.tensor([clip.clip.sample.row if clip.clip else GHOST for clip in clips]),
            weights=torch.tensor([float(clip.clip is not None) for clip in clips]),
            keys=[clip.clip.sample.key if clip.clip else "" for clip in clips],
            captions=[clip.caption for clip in clips],
            frames=torch.from_numpy(frames),
        )

    def _frames_shape(self, place: _Place) -> tuple[int, int, int, int]:
        bucket = self.buckets[place.bucket]
        return bucket.frames, bucket.height, bucket.width, 3

    def _places(self, bucket: Bucket, rank: int) -> list[range]:
        return split_places(bucket.global_batch, rank=rank, world_size=self._world_size, micro_batch=bucket.micro_batch)

    def _real_places(self, bucket: Bucket, rank: int) -> list[list[int]]:
        return [[p for p in places if p < bucket.global_batch] for places in self._places(bucket, rank)]

    def _enter(self, bad: BadSample | None, step: int) -> None:
        if bad is None:
            self.ledger.add([])
            return
        found = BadClip("", bad.row, _name(bad.shard, bad.key), bad.reason, step, GHOST, None, passes=())
        self._log_bad(found)
        self.ledger.add([found])

    def _log_bad(self, bad: BadClip) -> None:
        self._bad_samples += 1
        if self._bad_samples <= _LOGGED or self._bad_samples % _LOGGED == 0:
            _log.warning("cannot use %s: %s (bad samples so far: %d)", bad.key, bad.reason, self._bad_samples)

    def _told(self) -> str:
        assert self._reader is not None
        left_out = "; ".join(f"{number} {reason}" for reason, number in self._reader.left_out.most_common(3))
        return (
            f"process {self._rank} left out: {left_out or 'none'}; {len(self.ledger)} bad: "
            f"{self.ledger.summary() or 'none'}"
        )


def _bad_clips(place: _Place, tried: list[tuple[StreamClip, str]], substitute: int | None) -> list[BadClip]:
    return [
        BadClip(
            "",
            clip.sample.row,
            _name(clip.sample.shard, clip.sample.key),
            reason,
            place.step,
            place.position,
            substitute,
            passes=(),
        )
        for clip, reason in tried
    ]


def _name(shard: str, key: str) -> str:
    return f"{shard}: {key}" if key else shard
