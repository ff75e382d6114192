"""From a dataset folder to the batches of each step: the plan says which clips, this reads them.

Nothing here has a position: `steps(n)` gives the batches of step n and after, the same ones for any number of processes, prefetch
or earlier history. The number of the consumed step is all that a checkpoint needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import numpy as np
import torch

from .batch import VideoBatch
from .config import Access, DataConfig
from .decode import DecodeError
from .index import ClipIndex
from .latent_cache import LatentCache
from .plan import GHOST_ROW, PLAN_VERSION, Plan, Slot, keyed_bits, keyed_uniform
from .raw_clips import RawClips

_log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

_CANDIDATES = 8  # rows tried for one slot
_SHOWN = 5


class UnreadableDataError(RuntimeError):
    """Too much of the dataset cannot be read."""


@dataclass(frozen=True)
class _ReadClip:
    slot: int
    row: int
    caption: str
    clip: np.ndarray | None  # None for a ghost

    @classmethod
    def ghost(cls, slot: int) -> _ReadClip:
        return cls(slot, GHOST_ROW, "", None)


class VideoLoader:
    """The batches of one rank. Raises ValueError if the dataset is missing, damaged or has no clip that fits."""

    def __init__(
        self,
        config: DataConfig,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        vae_fingerprint: str | None = None,
    ) -> None:
        """`vae_fingerprint`, where given, must be that of the autoencoder that made the latents."""
        if faults := config.faults("data"):
            raise ValueError("; ".join(faults))
        made_by = "muybridge encode" if config.access is Access.latents else "muybridge prepare SRC OUT"
        self.index = ClipIndex.open(config.path, made_by=made_by)
        self._config = config
        self._micro_batch, self._rank, self._world_size, self._seed = micro_batch, rank, world_size, seed
        if config.access is Access.latents:
            self._source: RawClips | LatentCache = LatentCache(self.index, config, vae_fingerprint=vae_fingerprint)
        elif self.index.manifest["kind"] != "raw":
            raise ValueError(f"data.path={config.path} holds {self.index.manifest['kind']}; set data.access=latents")
        else:
            self._source = RawClips(self.index, config, seed=seed)
        self._report_excluded()
        self.plan = Plan(rows=len(self._source.rows), global_batch=global_batch, seed=seed)
        self.plan.local_slots(0, rank=rank, world_size=world_size, micro_batch=micro_batch)  # checks the numbers
        self._lock = threading.Lock()
        self._unreadable = 0

    def __len__(self) -> int:
        """Clips that can be drawn: those of the filter that are long enough for the training clip."""
        return len(self._source.rows)

    @property
    def fingerprint(self) -> str:
        """Changes if and only if the sequence of samples could: checked when a run resumes."""
        content = [
            PLAN_VERSION,
            self.index.fingerprint,
            self._config.access.value,
            self._config.transform(),
            self._config.caption_dropout,
            self._seed,
            self.plan.global_batch,
        ]
        if self._config.filter is not None:  # a fingerprint from before there were filters stays as it was
            content.append(self._config.filter)
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def state(self) -> dict[str, int]:
        """Rows in use and left out, and since the start: failed reads, decodes by the other decoder, decoder crashes."""
        return {
            "rows": len(self),
            "excluded_rows": len(self.index) - len(self),
            "unreadable_clips": self._unreadable,
            **self._source.counts,
        }

    def steps(self, start_step: int) -> Iterator[list[VideoBatch]]:
        """Endless: for each step from `start_step` on, this rank's batches, one per micro-step.

        Raises UnreadableDataError when several rows in a row cannot be decoded, DatasetChangedError when bytes are not those of
        the index, and TransientReadError when the storage does not answer: what cannot be repeated is not replaced.
        """
        micro_batch = self._micro_batch
        for step, clips in zip(count(start_step), self._read_ahead(self._local_slots(start_step), self._read_slot)):
            yield [self._batch(step, clips[i : i + micro_batch]) for i in range(0, len(clips), micro_batch)]

    def each_once(self, clips: int) -> Iterator[VideoBatch]:
        """For validation: this rank's share of `clips` clips, or of all if there are fewer, the same ones every time.

        Each comes once on some rank, with its first caption, from the middle of clip and picture. All ranks get as many batches,
        filled up with ghosts; a clip that cannot be decoded becomes one as well.
        """
        plan = Plan(rows=len(self), global_batch=min(clips, len(self)), seed=self._seed)
        groups = plan.local_slots(0, rank=self._rank, world_size=self._world_size, micro_batch=self._micro_batch)
        for found in self._read_ahead(groups, self._read_once):
            yield self._batch(0, found)

    def every_row(self, batch_size: int) -> Iterator[VideoBatch]:
        """Each row that fits once, in order: its first caption, the middle of clip and picture; the last batch may be smaller.

        For encoding and validation: independent of rank and seed. A row that cannot be read is left out, counted and logged.
        """
        rows = self._source.rows.tolist()
        groups = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
        for number, clips in enumerate(self._read_ahead(groups, self._read_row)):
            if readable := [clip for clip in clips if clip is not None]:
                yield self._batch(number, readable)

    def close(self) -> None:
        """Ends the decoding processes."""
        self._source.close()

    def _local_slots(self, start_step: int) -> Iterator[list[Slot]]:
        for step in count(start_step):
            micro_steps = self.plan.local_slots(
                step, rank=self._rank, world_size=self._world_size, micro_batch=self._micro_batch
            )
            yield [slot for slots in micro_steps for slot in slots]

    def _read_ahead(self, groups: Iterable[list[Item]], read: Callable[[Item], Result]) -> Iterator[list[Result]]:
        # Reads groups in their order; with decoding processes, some groups ahead of the one that is asked for.
        if self._source.pool is None:
            for group in groups:
                yield [read(item) for item in group]
            return
        waiting: deque[list[Future[Result]]] = deque()
        try:
            for group in groups:
                waiting.append([self._source.pool.run(read, item) for item in group])
                if len(waiting) > self._config.prefetch:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()

    def _read_slot(self, slot: Slot) -> _ReadClip:
        if slot.row == GHOST_ROW:
            return _ReadClip.ghost(slot.position)
        rows = self._source.rows
        planned = int(rows[slot.row])
        reasons = []
        for attempt in range(_CANDIDATES):
            row = planned
            if attempt:  # keyed like everything else, so that every run substitutes the same clip
                row = int(rows[keyed_bits(self._seed, "substitute", planned, slot.pass_number, attempt) % len(rows)])
            try:
                clip = self._source.read(row, slot.pass_number)
            except DecodeError as error:
                reasons.append(self._note_unreadable(row, error))
                continue
            return _ReadClip(slot.position, row, self._draw_caption(row, slot.pass_number), clip)
        raise UnreadableDataError(
            f"{_CANDIDATES} clips of {self.index.folder} in a row cannot be read: {'; '.join(reasons[:_SHOWN])}"
        )

    def _draw_caption(self, row: int, pass_number: int) -> str:
        if keyed_uniform(self._seed, "caption", row, pass_number) < self._config.caption_dropout:
            return ""
        captions = self.index.captions(row)
        return captions[keyed_bits(self._seed, "caption_choice", row, pass_number) % len(captions)]

    def _read_once(self, slot: Slot) -> _ReadClip:
        found = None if slot.row == GHOST_ROW else self._read_row(int(self._source.rows[slot.row]))
        return _ReadClip.ghost(slot.position) if found is None else replace(found, slot=slot.position)

    def _read_row(self, row: int) -> _ReadClip | None:
        try:
            return _ReadClip(row, row, self.index.text("caption", row), self._source.read(row, None))
        except DecodeError as error:
            self._note_unreadable(row, error)
            return None

    def _note_unreadable(self, row: int, error: DecodeError) -> str:
        reason = f"{self.index.text('key', row)}: {error}"
        _log.warning("cannot read clip %s", reason)
        with self._lock:
            self._unreadable += 1
        return reason

    def _batch(self, step: int, clips: list[_ReadClip]) -> VideoBatch:
        return VideoBatch(
            step=step,
            slots=torch.tensor([clip.slot for clip in clips]),
            rows=torch.tensor([clip.row for clip in clips]),
            weights=torch.tensor([float(clip.clip is not None) for clip in clips]),
            keys=["" if clip.row == GHOST_ROW else self.index.text("key", clip.row) for clip in clips],
            captions=[clip.caption for clip in clips],
            **self._source.assemble([clip.clip for clip in clips]),
        )

    def _report_excluded(self) -> None:
        durations = self.index.column("duration_seconds")
        reasons = []
        for reason, rows in self._source.excluded.items():
            shown = [f"{self.index.text('key', row)} ({durations[row]:.2f} s)" for row in rows[:_SHOWN].tolist()]
            reasons.append(f"{len(rows)} {reason}: {', '.join(shown)}{', ...' if len(rows) > _SHOWN else ''}")
        if len(self) == 0:
            self._source.close()
            raise ValueError(
                f"data.path={self.index.folder}: none of its {len(self.index)} clips fits; {'; '.join(reasons)}"
            )
        if reasons:
            left_out = len(self.index) - len(self)
            _log.warning("%d of %d clips are left out; %s", left_out, len(self.index), "; ".join(reasons))
