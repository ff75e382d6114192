"""What a run says to people: at its start, of its checkpoints, and at its end."""

import math
from pathlib import Path

import torch.distributed as dist

from ..data.config import Access
from ..data.loader import VideoLoader
from ..data.stream import NOT_EXACT, StreamLoader
from .attempts import Attempts
from .checkpoint import Saved
from .config import TaskKind, TrainConfig
from .fragments import read_run_state
from .life import lead_seconds
from .provenance import changed_settings_note, changed_versions_note
from .save_schedule import SaveSchedule
from .tasks import next_command
from .tracking import Tracker

GHOST_SHARE_WORTH_A_NOTE = 0.03


def first_notes(
    config: TrainConfig,
    loader: VideoLoader | StreamLoader,
    schedule: SaveSchedule,
    resume_from: Path | None,
    *,
    data_changed: bool,
) -> list[str]:
    """Before the first step of an attempt, and before it writes its own settings."""
    notes = []
    if resume_from is not None:
        notes.append(f"resumed from {resume_from}")
        facts = read_run_state(resume_from)
        changes = changed_settings_note(config), changed_versions_note(facts["versions"])
        notes += [f"muybridge: {change}" for change in changes if change]
        if data_changed:
            notes.append(f"muybridge: the data changed: a new order of samples begins at step {facts['step']}")
    if config.data.access is Access.stream:
        notes.append(f"muybridge: {NOT_EXACT}")
    world = dist.get_world_size()
    if (share := loader.ghost_share()) > GHOST_SHARE_WORTH_A_NOTE:
        uneven = ", ".join(
            f"{bucket.name}: {bucket.global_batch} of {bucket.micro_batch} x {world}"
            for bucket in loader.buckets
            if bucket.global_batch % (bucket.micro_batch * world)
        )
        notes.append(
            f"muybridge: {share:.0%} of the computation is for nothing: global batches that are no multiples of "
            f"micro_batch x processes: {uneven}"
        )
    return [*notes, f"muybridge: {schedule.explanation()}"]


def tell_of_save(saved: Saved, tracker: Tracker, diary: Attempts) -> None:
    """What became of a save, for the people who watch and in the run's diary."""
    if saved.failure:
        tracker.note(f"muybridge: {saved.failure}")
        diary.save_failed(saved.step, blocking_seconds=saved.blocking_seconds, cause=saved.failure)
        return
    tracker.log(
        saved.step,
        {
            "checkpoint_blocking_seconds": saved.blocking_seconds,
            "checkpoint_seconds": saved.total_seconds,
            "checkpoint_bytes": float(saved.nbytes),
        },
    )
    diary.commit(
        saved.step,
        blocking_seconds=saved.blocking_seconds,
        total_seconds=saved.total_seconds,
        nbytes=saved.nbytes,
    )
    # At a stop, one may be in flight and another follow it.
    if (lead := lead_seconds()) is not None and 2 * saved.total_seconds > lead:
        tracker.note(
            f"muybridge: a checkpoint takes {saved.total_seconds:.0f} s and Slurm warns {lead:.0f} s before the end: set "
            f"slurm.lead_seconds to {math.ceil(saved.total_seconds / 60) * 180} or more, or work since the last checkpoint is lost"
        )


def last_notes(config: TrainConfig, *, step: int, exported: Path | None) -> list[str]:
    """After the last step, with what was exported, or after an agreed stop."""
    if exported is None:
        return [f"muybridge: stopped on request at step {step}; the same command goes on from there"]
    notes = [f"muybridge: {step} steps done; wrote {config.run_dir}/metrics.jsonl, checkpoints/ and {exported}"]
    if config.task is TaskKind.text_to_video:
        notes.append(f"next: {next_command(config)}")
    return notes
