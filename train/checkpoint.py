"""Checkpoints as safetensors fragments: every rank writes what it owns, and a checkpoint exists only once it is complete.

    checkpoints/step-00000200/
        shard-00000-of-00002.safetensors   fp32 pieces of rank 0: master/NAME, exp_avg/NAME, exp_avg_sq/NAME, ema-0.9999/NAME
                                           (of a matrix that Muon updates, momentum_buffer/NAME instead of the second and third)
        shard-00000-of-00002.json          where each piece lies in its parameter
        run.json                           step, shapes, names of the averages, optimizer step, state of the loader, versions;
                                           settings of a LoRA
        bad_clips.jsonl                    clips that could not be read, see data/ledger.py
        MANIFEST.json                      size and CRC-32 of every file; written last

Only what is trained is in it: of a LoRA run the factors, with a fingerprint of the weights under them in run.json.
All files go to a staging folder; its rename is the commit. No pickle is read or written. `checkpoint_folder.py` chooses the one to
resume from, `fragments.py` reads it.
"""

import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .checkpoint_folder import (
    MANIFEST_NAME,
    commit_staging,
    committed_checkpoints,
    delete_leftover,
    move_to_trash,
    retained,
    space_fault,
    step_of,
    write_latest,
)
from .checkpoint_writer import WriterProcess
from .ema import EMA
from .engine import Engine
from .fragments import FORMAT_VERSION
from .ranks import from_all_ranks, from_rank_0
from .shard_file import Digest, write_part, write_text
from .snapshot import Part, SharedImage

LEDGER_NAME = "bad_clips.jsonl"

logger = logging.getLogger(__name__)


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    # At most one of these three says how far checkpoints lie apart. All null: as far as the time they cost suggests.
    # In steps; 0 writes only the last one.
    every_steps: int | None = None
    # In samples.
    every_samples: int | None = None
    # In minutes.
    every_minutes: float | None = None
    # Newest checkpoints kept; at least 2, so that a damaged newest one leaves another.
    keep_last: int = 2
    # Those at multiples of so many steps stay, too; 0 is off.
    keep_every: int = 0
    # So many of the lowest validation loss stay, too; 0 is off. Takes every_steps, in step with validation.every_steps.
    keep_best: int = 0
    # Write from a copy in memory while training goes on. Off, or with every_steps=0: training waits for the disk, and the copy's
    # memory is saved.
    in_background: bool = True

    def faults(self, field: str) -> list[str]:
        found = []
        intervals = {name: getattr(self, name) for name in ("every_steps", "every_samples", "every_minutes")}
        given = [f"{field}.{name}={value}" for name, value in intervals.items() if value is not None]
        if len(given) > 1:
            found.append(f"{' and '.join(given)} must not be given together: all but one must be null")
        if self.every_steps is not None and self.every_steps < 0:
            found.append(f"{field}.every_steps={self.every_steps} must be 0 (only at the end) or more, or null")
        for name in ("every_samples", "every_minutes"):
            if intervals[name] is not None and not intervals[name] > 0:
                found.append(f"{field}.{name}={intervals[name]} must be positive, or null")
        if self.keep_last < 2:
            found.append(f"{field}.keep_last={self.keep_last} must be at least 2")
        for name in ("keep_every", "keep_best"):
            if getattr(self, name) < 0:
                found.append(f"{field}.{name}={getattr(self, name)} must be 0 (off) or more")
        return found


@dataclass(frozen=True)
class Saved:
    """What became of a save, the same on every rank."""

    step: int
    # Where the checkpoint is; where it failed, would have been.
    folder: Path
    # Why there is no checkpoint; empty where there is one.
    failure: str
    # How long the slowest rank did nothing else.
    blocking_seconds: float
    # From its beginning to its commit.
    total_seconds: float
    # On the disk, of all ranks together.
    nbytes: int


@dataclass
class _Flight:
    """A save that was begun and is not committed."""

    step: int
    staging: Path
    began: float
    validation_loss: dict[int, float]
    nbytes: int = 0
    blocking_seconds: float = 0.0
    failure: str = ""
    # Digests of this rank's files by name; None while the writer process is at them.
    files: dict[str, Digest] | None = None


class Checkpointer:
    """Saves a run's checkpoints, at most one at a time, and deletes old ones. One on every rank."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        engine: Engine,
        ema: EMA,
        *,
        still_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        """Collective. `still_ours` is asked on rank 0 right before a commit: whether the run belongs to this attempt still."""
        self._folder = folder
        self._config = config
        self._engine = engine
        self._ema = ema
        self._still_ours = still_ours
        # Stage 0 holds the same full weights on every rank: one copy is enough.
        self._has_part = engine.config.zero > 0 or dist.get_rank() == 0
        self._flight: _Flight | None = None
        self._image: SharedImage | None = None
        self._writer: WriterProcess | None = None
        self._deletion: threading.Thread | None = None
        # The same on every rank. A checkpoint of the end has no training to keep out of the way of.
        self._in_background = config.in_background and config.every_steps != 0
        if self._in_background:
            self._image = SharedImage() if self._has_part else None
            nbytes = Part.expected_bytes(engine, ema) if self._has_part else 0
            self._look_for_room(nbytes)
            if self._image is not None:
                # Now, so that it is loaded and has its memory when the first checkpoint is due.
                self._image.prepare(nbytes)
                self._writer = WriterProcess(self._image.file)

    @property
    def in_flight(self) -> bool:
        """Whether a save was begun and is not committed."""
        return self._flight is not None

    @property
    def in_background(self) -> bool:
        """Whether saves are written beside training; the same on every rank, and may end where memory gets short."""
        return self._in_background

    def expected_bytes(self) -> int:
        """Bytes of a checkpoint of all ranks, before the first step, too. Collective."""
        return sum(from_all_ranks(Part.expected_bytes(self._engine, self._ema) if self._has_part else 0))

    def begin(
        self, step: int, run_state: dict[str, Any], bad_clips: str, validation_loss: dict[int, float]
    ) -> Saved | None:
        """Save what the engine holds after `step` steps; in the background, this returns once it is copied. Collective.

        `run_state` goes into run.json, `bad_clips` is the ledger of all ranks, and `validation_loss` has the losses known so far by
        their step. A save that was in flight is finished first, and what became of it returned. A failure is told by `commit`.
        """
        before = self.finish()
        began = time.monotonic()
        part = Part.of(self._engine, self._ema) if self._has_part else None
        header = part.header() if part is not None else b""
        nbytes = len(header) + part.data_bytes() if part is not None else 0
        if self._in_background:
            self._look_for_room(nbytes)
        staging, failure = self._stage(step, sum(from_all_ranks(nbytes)))
        flight = self._flight = _Flight(
            step,
            staging,
            began,
            validation_loss=dict(validation_loss),
            nbytes=nbytes,
            failure=failure if dist.get_rank() == 0 else "",
        )
        if failure or part is None:
            flight.files = {}
        else:
            texts = {f"{_shard_name()}.json": json.dumps(part.addresses, indent=1)}
            if dist.get_rank() == 0:
                texts |= {"run.json": self._run_state(step, run_state), LEDGER_NAME: bad_clips}
            self._write(flight, part, header, texts)
        flight.blocking_seconds = time.monotonic() - began
        return before

    def is_written(self) -> bool:
        """Whether this rank's part is on the disk or has failed; does not wait."""
        assert self._flight is not None, "nothing is in flight"
        return self._flight.files is not None or (self._writer is not None and self._writer.is_done())

    def commit(self) -> Saved:
        """Make what all ranks write a checkpoint, and delete those that need not stay. Collective; waits for the slowest."""
        flight, began = self._flight, time.monotonic()
        assert flight is not None, "nothing is in flight"
        if flight.files is None:
            assert self._writer is not None, "who else would write?"
            answer = self._writer.answer()
            flight.failure, flight.files = answer.get("failure", ""), answer.get("files", {})
        failure = f"rank {dist.get_rank()}: {flight.failure}" if flight.failure else ""
        parts = from_all_ranks((failure, flight.files, flight.blocking_seconds, flight.nbytes))
        failures = sorted({failure for failure, *_ in parts if failure})
        final = self._folder / flight.staging.name.partition(".")[0]
        if dist.get_rank() == 0 and not failures:
            try:
                self._commit(flight, final, {name: digest for _, files, *_ in parts for name, digest in files.items()})
            except OSError as error:
                failures = [f"rank 0: {error}"]
        now = time.monotonic()
        saved = from_rank_0(
            Saved(
                flight.step,
                final,
                failure=f"checkpoint {final} was not written: {'; '.join(failures)}" if failures else "",
                blocking_seconds=max(seconds for _, _, seconds, _ in parts) + now - began,
                total_seconds=now - flight.began,
                nbytes=sum(nbytes for *_, nbytes in parts),
            )
        )
        self._flight = None
        if dist.get_rank() == 0:
            self._tidy_up(flight, saved)
        return saved

    def finish(self) -> Saved | None:
        """Wait for the save in flight and commit it; None where there is none. Collective."""
        return self.commit() if self._flight is not None else None

    def close(self) -> None:
        """End the writer process and give its memory back; a save in flight is lost, and a deletion is waited for."""
        self._leave_background()
        self._flight = None
        if self._deletion is not None:
            self._deletion.join()

    def _stage(self, step: int, nbytes: int) -> tuple[Path, str]:
        # The staging folder that rank 0 made, and why it could not.
        staging, failure = self._folder / f"step-{step:08d}.tmp-{uuid.uuid4().hex[:12]}", ""
        if dist.get_rank() == 0:
            try:
                failure = space_fault(self._folder, nbytes)
                if failure and self._deletion is not None:
                    self._deletion.join()  # which makes room
                    failure = space_fault(self._folder, nbytes)
                if not failure:
                    staging.mkdir(parents=True)
            except OSError as error:
                failure = str(error)
        name, failure = from_rank_0((staging.name, failure))
        return self._folder / name, failure

    def _write(self, flight: _Flight, part: Part, header: bytes, texts: dict[str, str]) -> None:
        shard = flight.staging / f"{_shard_name()}.safetensors"
        try:
            if self._image is not None and self._writer is not None:
                nbytes = self._image.take(part, header)
                self._writer.submit(shard=str(shard), header_bytes=len(header), image_bytes=nbytes, texts=texts)
            else:
                flight.files = write_part(shard, header, part.blocks(), texts)
        except OSError as error:
            flight.failure, flight.files = str(error), {}

    def _look_for_room(self, nbytes: int) -> None:
        # Before any rank takes memory: what one took is no longer free for the next to count. One that waits for the disk keeps
        # the others waiting, so all do, or none. Collective.
        faults = from_all_ranks(self._image.fault(nbytes) if self._image is not None else "")
        if found := [f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault]:
            if dist.get_rank() == 0:
                logger.warning("muybridge: training waits for its checkpoints to be written: %s", found[0])
            self._leave_background()

    def _leave_background(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._image is not None:
            self._image.close()
        self._writer = self._image = None
        self._in_background = False

    def _run_state(self, step: int, run_state: dict[str, Any]) -> str:
        facts = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "optimizer_step": self._engine.optimizer_step_count(),
            "world_size": dist.get_world_size(),
            "zero": self._engine.config.zero,
            "shapes": {name: list(shape) for name, shape in self._engine.parameter_shapes.items()},
            "averages": list(self._ema.averages),
            **run_state,
        }
        return json.dumps(facts, indent=1)

    def _commit(self, flight: _Flight, final: Path, files: dict[str, Digest]) -> None:
        write_text(flight.staging / MANIFEST_NAME, json.dumps(dict(sorted(files.items())), indent=1))
        if not self._still_ours():
            raise OSError("another attempt at this run has taken over")
        commit_staging(flight.staging, final)

    def _tidy_up(self, flight: _Flight, saved: Saved) -> None:
        # Nothing here undoes a commit: what fails is reported.
        if saved.failure:
            shutil.rmtree(flight.staging, ignore_errors=True)
            return
        try:
            write_latest(self._folder, saved.folder.name)
            checkpoints = {step_of(path): path for path in committed_checkpoints(self._folder)}
            kept = retained(
                list(checkpoints),
                keep_last=self._config.keep_last,
                keep_every=self._config.keep_every,
                keep_best=self._config.keep_best,
                validation_loss=flight.validation_loss,
            )
            trash = [move_to_trash(old) for step, old in checkpoints.items() if step not in kept]
        except OSError as error:
            logger.warning("muybridge: %s is written, but not what comes after it: %s", saved.folder, error)
            return
        if self._deletion is not None:
            self._deletion.join()
        # In a thread, since all ranks would wait for rank 0, which for a large model takes seconds.
        self._deletion = threading.Thread(target=lambda: list(map(delete_leftover, trash)), daemon=True)
        self._deletion.start()


def _shard_name() -> str:
    return f"shard-{dist.get_rank():05d}-of-{dist.get_world_size():05d}"
