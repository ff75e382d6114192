"""A thread that reads samples ahead of the steps, has each one looked at, and keeps it in the queue of its bucket.

The queues hold encoded clips. They are bounded: a clip whose queue is full is dropped, so that a bucket of which other ranks have
few clips never stops the others.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from .buckets import NO_BUCKET, Bucket, FitRules, assign_buckets
from .decode import DecodeError
from .indexing import CONTAINERS
from .stream_samples import BadSample, EndOfPass, StreamItem, StreamSample
from .workers import WorkerPool

STEPS_KEPT = 2  # reading stops while a bucket has clips for so many steps
MOST_STEPS = 4  # and a bucket keeps no more than for so many, and a few more where steps are small
QUEUED_BYTES = 1 << 30  # of all queues of a rank; what the next step needs may exceed it
HOPELESS_SAMPLES = 1000  # in a row of which none can be used
HOPELESS_PASSES = 10

_log = logging.getLogger(__name__)
_SMALL_STEP = 16
_SHOWN = 5


@dataclass(frozen=True)
class StreamClip:
    """A sample of which is known what it is."""

    sample: StreamSample
    last_start_seconds: float  # when its last frame starts
    seekable: bool


class _OneClip:
    """The columns of an index of one row."""

    def __init__(self, facts: dict[str, int | float]) -> None:
        self._facts = facts

    def __len__(self) -> int:
        return 1

    def column(self, name: str) -> np.ndarray:
        return np.array([self._facts[name]])


class StreamReader:
    """Clips by bucket. It owns the thread, not the pool; close it before that."""

    def __init__(
        self,
        stream: Iterable[StreamItem],
        *,
        buckets: Sequence[Bucket],
        needed: Sequence[int],
        rules: FitRules,
        pool: WorkerPool,
        workers: int,
    ) -> None:
        """A step takes at most the `needed` clips of its bucket; `workers` is the number of the pool's processes."""
        self.left_out: Counter[str] = Counter()  # by reason: clips that fit no bucket
        self.dropped = self.samples = 0
        self._stream, self._buckets, self._needed, self._rules = stream, list(buckets), list(needed), rules
        self._pool, self._workers = pool, workers
        self._queues: list[deque[StreamClip]] = [deque() for _ in buckets]
        self._queued_bytes = [0] * len(buckets)
        self._outcomes: list[BadSample | None] = []
        self._useless_samples = self._useless_passes = 0  # since a clip that fits
        self._reads_on = self._is_closed = self._has_reported = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def ready(self) -> list[int]:
        """The clips of each bucket. Raises what ended the thread."""
        with self._changed:
            if self._error is not None:
                raise self._error
            return [len(queue) for queue in self._queues]

    @property
    def is_hopeless(self) -> bool:
        """Whether for long nothing came that can be used."""
        return self._useless_samples >= HOPELESS_SAMPLES or self._useless_passes >= HOPELESS_PASSES

    def take(self, bucket: int, clips: int) -> list[StreamClip]:
        """So many clips for a step, fewer if there are fewer."""
        with self._changed:
            found = [self._pop(bucket) for _ in range(min(clips, len(self._queues[bucket])))]
            self._reads_on = False
            self._changed.notify_all()
            return found

    def take_spare(self, bucket: int) -> StreamClip | None:
        """A clip that no step counts on, for one that could not be decoded."""
        with self._changed:
            return self._pop(bucket) if len(self._queues[bucket]) > self._needed[bucket] else None

    def take_outcomes(self) -> list[BadSample | None]:
        """What could not be used since the last call, in the order of the samples; None for all that could in between."""
        with self._changed:
            found, self._outcomes = self._outcomes, []
            return found

    def wait(self, seconds: float, *, reads_on: bool) -> None:
        """Waits for something new; `reads_on` until the next step even if a bucket has enough."""
        with self._changed:
            self._reads_on = reads_on
            self._changed.notify_all()
            self._changed.wait(seconds)

    def close(self) -> None:
        """Ends the thread as soon as it comes back from the storage."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read(self) -> None:
        # Results come in the order of the samples, as many at a time as keep the decoding processes busy.
        waiting: deque[tuple[StreamSample, Future[tuple[StreamClip, int] | str]]] = deque()
        for item in self._stream:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._reads_on or not self._has_enough())
                if self._is_closed:
                    return
            if isinstance(item, EndOfPass):
                while waiting:
                    self._keep(*waiting.popleft())
                self._end_pass()
                continue
            if isinstance(item, BadSample):
                self._refuse(item)
                continue
            waiting.append((item, self._pool.run(self._inspect, item)))
            if len(waiting) > self._workers:
                self._keep(*waiting.popleft())

    def _inspect(self, sample: StreamSample) -> tuple[StreamClip, int] | str:
        # The clip and its bucket, or why it has none.
        facts, _ = self._pool.call("inspect_clip", data=sample.data, containers=CONTAINERS, decode=False)
        fit = assign_buckets(_OneClip(facts), self._buckets, self._rules, np.ones(1, dtype=bool))
        bucket = int(fit.buckets[0])
        if bucket == NO_BUCKET:
            return next(iter(fit.excluded))
        last_start = facts["duration_seconds"] - facts["fps_denominator"] / facts["fps_numerator"]
        return StreamClip(sample, last_start, facts["seekable"]), bucket

    def _keep(self, sample: StreamSample, future: Future[tuple[StreamClip, int] | str]) -> None:
        try:
            found = future.result()
        except DecodeError as error:
            self._refuse(BadSample(sample.shard, sample.key, str(error)))
            return
        with self._changed:
            self.samples += 1
            if not self._outcomes or self._outcomes[-1] is not None:
                self._outcomes.append(None)
            if isinstance(found, str):
                self.left_out[found] += 1
                self._useless_samples += 1
            else:
                self._useless_samples = self._useless_passes = 0
                clip, bucket = found
                if self._is_full(bucket):
                    self.dropped += 1
                else:
                    self._queues[bucket].append(clip)
                    self._queued_bytes[bucket] += len(sample.data)
            self._changed.notify_all()

    def _refuse(self, bad: BadSample) -> None:
        with self._changed:
            self.samples += 1
            self._useless_samples += 1
            self._outcomes.append(bad)
            self._changed.notify_all()

    def _end_pass(self) -> None:
        with self._changed:
            self._useless_passes += 1
            self._changed.notify_all()
        if self.left_out and not self._has_reported:
            self._has_reported = True
            reasons = [f"{number} {reason}" for reason, number in self.left_out.most_common(_SHOWN)]
            _log.warning("left out of the first %d samples: %s", self.samples, "; ".join(reasons))

    def _has_enough(self) -> bool:
        return any(len(queue) >= STEPS_KEPT * needed for queue, needed in zip(self._queues, self._needed, strict=True))

    def _is_full(self, bucket: int) -> bool:
        clips, needed = len(self._queues[bucket]), self._needed[bucket]
        is_large = self._queued_bytes[bucket] > QUEUED_BYTES / len(self._buckets)
        return clips >= MOST_STEPS * needed + _SMALL_STEP or (is_large and clips >= needed)

    def _pop(self, bucket: int) -> StreamClip:
        clip = self._queues[bucket].popleft()
        self._queued_bytes[bucket] -= len(clip.sample.data)
        return clip
