"""The folder of a run's checkpoints: which of them are whole, which one a run resumes from, which stay, and what is swept out.

    checkpoints/
        step-00000200/                     a committed checkpoint, see checkpoint.py
        step-00000200.tmp-0123456789ab/    one that is being written, or was when its run ended; nobody reads it
        .trash-step-00000100-01234567/     one that is being deleted
        set_aside/step-00000300-01234567/  committed, but not to be resumed from: damaged, or newer than what a run went back to
        LATEST                             name of the newest, for people and scripts; nothing here reads it

Decisions go by content and by what rank 0 sees: another machine's clock or view of a shared disk may differ.
"""

import json
import logging
import math
import os
import re
import shutil
import uuid
from pathlib import Path

import torch.distributed as dist

from .ranks import from_all_ranks, on_rank_0
from .shard_file import Digest, digest_of, sync_folder, write_text

MANIFEST_NAME = "MANIFEST.json"
COMMITTED = re.compile(r"^step-(\d{8})$")
RESUME_WORDS = ("auto", "must", "never")
ROOM_FACTOR = 1.2  # free bytes that a checkpoint's bytes ask for
# All that is ever deleted: a name that does not look so is not ours.
_LEFTOVER = re.compile(r"^(step-\d{8}\.tmp-[0-9a-f]{12}|\.trash-step-\d{8}-[0-9a-f]{8})$")
_GB = 1e9

logger = logging.getLogger(__name__)


def committed_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if COMMITTED.match(path.name))


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was taken."""
    return int(checkpoint.name.removeprefix("step-"))


def choose_checkpoint(folder: Path, resume: str = "auto") -> Path | None:
    """The checkpoint to resume from, the same on every rank; None for a fresh run. Collective.

    `auto` takes the newest whose files are all complete and unchanged, if there is any checkpoint; `must` asks for one; `never`
    asks that there is none; a number takes that step's. Changes nothing on the disk: the run may yet be refused.
    Raises ValueError where that cannot be had: starting over, or from elsewhere, would silently lose a run.
    """
    if fault := resume_fault("resume", resume):
        raise ValueError(fault)
    candidates = [folder / name for name in on_rank_0(lambda: candidates_to_resume(folder, resume))]
    chosen, reasons = None, []
    for candidate in candidates:
        fault = _agreed_fault(candidate)
        if not fault:
            chosen = candidate
            break
        reasons.append(fault)
        if dist.get_rank() == 0 and candidate is not candidates[-1]:
            print(f"muybridge: {fault}; trying an older checkpoint", flush=True)
    if candidates and chosen is None:
        what = "no checkpoint" if resume in RESUME_WORDS else f"resume={resume}: no checkpoint of that step"
        raise ValueError(f"{what} under {folder} is valid: {'; '.join(reasons)}")
    return chosen


def candidates_to_resume(folder: Path, resume: str) -> list[str]:
    """Names of the checkpoints that `resume` allows, the one to try first in front. Raises ValueError where it cannot be had."""
    found = [path.name for path in reversed(committed_checkpoints(folder))]
    listed = ", ".join(found) or "none"
    if resume == "never" and found:
        raise ValueError(f"resume=never: there are checkpoints under {folder}: {listed} (choose another run_dir)")
    if resume == "must" and not found:
        raise ValueError(f"resume=must: there is no checkpoint under {folder}")
    if resume in RESUME_WORDS:
        return found
    wanted = f"step-{int(resume):08d}"
    if wanted not in found:
        raise ValueError(f"resume={resume}: there is no checkpoint of that step under {folder}; there are: {listed}")
    return [wanted]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest committed checkpoint, of a run that may go on meanwhile; None where there is none.

    Raises ValueError where it is damaged.
    """
    while found := committed_checkpoints(folder):
        fault = check_checkpoint(found[-1])
        if not fault:
            return found[-1]
        if found[-1].is_dir():  # else the run has removed it, since newer ones came
            raise ValueError(fault)
    return None


def set_aside_newer(folder: Path, chosen: Path) -> None:
    """Once a run goes on from `chosen`: what is newer, or is damaged, must not win later. Collective. Raises OSError."""

    def move() -> None:
        for newer in committed_checkpoints(folder):
            if newer.name > chosen.name:
                print(f"muybridge: {newer} was set aside as {set_aside(newer)}", flush=True)

    on_rank_0(move)


def delete_leftovers(folder: Path) -> None:
    """Delete what attempts that were killed left behind; to be called while nothing is saved. Collective. Raises OSError."""

    def delete() -> None:
        for path in folder.iterdir() if folder.is_dir() else []:
            if _LEFTOVER.match(path.name) and not path.is_symlink():
                delete_leftover(path)
            elif re.match(r"^LATEST\.tmp-[0-9a-f]{12}$", path.name):
                path.unlink()

    on_rank_0(delete)


def resume_fault(field: str, resume: str) -> str:
    """What is wrong with a setting for `choose_checkpoint`, or an empty string."""
    if resume in RESUME_WORDS or (resume.isascii() and resume.isdigit()):
        return ""
    return f"{field}={resume} must be {', '.join(RESUME_WORDS)} or the step of a checkpoint"


def check_checkpoint(folder: Path) -> str:
    """What is wrong with a committed checkpoint, or an empty string."""
    try:
        manifest = _read_manifest(folder)
    except ValueError as error:
        return str(error)
    return _first_fault(folder, manifest, list(manifest))


def refuse_damaged(folder: Path) -> None:
    """Raise ValueError, on every rank, where a committed checkpoint is damaged; collective where there are ranks."""
    if fault := _agreed_fault(folder) if dist.is_initialized() else check_checkpoint(folder):
        raise ValueError(fault)


def space_fault(folder: Path, nbytes: int) -> str:
    """What is wrong with the room for `nbytes` in a folder that may not exist yet, or an empty string."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, int(ROOM_FACTOR * nbytes)
    if free >= needed:
        return ""
    return (
        f"{folder} has {free / _GB:.3g} GB free, and a checkpoint needs {needed / _GB:.3g} GB "
        f"({ROOM_FACTOR} times its {nbytes / _GB:.3g} GB)"
    )


def commit_staging(staging: Path, final: Path) -> None:
    """Make a complete staging folder the committed checkpoint `final`; after this it survives a power cut."""
    sync_folder(staging)
    if final.exists():  # of an earlier attempt that got as far
        set_aside(final)
    staging.rename(final)
    sync_folder(final.parent)


def write_latest(folder: Path, name: str) -> None:
    """Leave the name of the newest checkpoint for people and scripts."""
    scratch = folder / f"LATEST.tmp-{uuid.uuid4().hex[:12]}"
    write_text(scratch, name + "\n")
    scratch.rename(folder / "LATEST")


def set_aside(checkpoint: Path) -> Path:
    """Move a committed checkpoint to where no run resumes from it; returns its new place."""
    place = checkpoint.parent / "set_aside" / f"{checkpoint.name}-{uuid.uuid4().hex[:8]}"
    place.parent.mkdir(exist_ok=True)
    checkpoint.rename(place)
    sync_folder(place.parent)
    sync_folder(checkpoint.parent)
    return place


def retained(
    steps: list[int], *, keep_last: int, keep_every: int, keep_best: int, validation_loss: dict[int, float]
) -> set[int]:
    """Which of the steps' checkpoints stay: the newest, those at multiples of `keep_every`, and those of the lowest losses."""
    kept = set(sorted(steps)[-keep_last:])
    if keep_every:
        kept |= {step for step in steps if step % keep_every == 0}
    # NaN compares as neither more nor less, and would stand anywhere in the order.
    judged = [step for step in steps if math.isfinite(validation_loss.get(step, math.nan))]
    judged.sort(key=lambda step: (validation_loss[step], step))
    return kept | set(judged[:keep_best])


def move_to_trash(checkpoint: Path) -> Path:
    """Give a checkpoint a name that no reader accepts, so that no half-deleted one looks whole; returns its new place."""
    trash = checkpoint.with_name(f".trash-{checkpoint.name}-{uuid.uuid4().hex[:8]}")
    checkpoint.rename(trash)
    return trash


def delete_leftover(path: Path) -> None:
    """Delete a staging or trash folder; one that cannot be deleted is reported, and tried again at the next start."""
    assert _LEFTOVER.match(path.name), f"{path} is no leftover"
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("muybridge: %s could not be deleted: %s", path, error)


def _agreed_fault(folder: Path) -> str:
    # Every rank reads its share of the files, since one alone would take minutes for a large model.
    try:
        manifest = on_rank_0(lambda: _read_manifest(folder))
    except ValueError as error:
        return str(error)
    own = sorted(manifest)[dist.get_rank() :: dist.get_world_size()]
    return next(filter(None, from_all_ranks(_first_fault(folder, manifest, own))), "")


def _first_fault(folder: Path, manifest: dict[str, Digest], names: list[str]) -> str:
    for name in names:
        path = folder / name
        try:
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != manifest[name]["bytes"] or digest_of(path) != manifest[name]:
                return f"{path} does not match its size and checksum in {MANIFEST_NAME}"
        except OSError as error:
            return f"{path} cannot be read ({error})"
    return ""


def _read_manifest(folder: Path) -> dict[str, Digest]:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/{MANIFEST_NAME} cannot be read ({error})") from error
    is_complete = isinstance(manifest, dict) and "run.json" in manifest
    if not is_complete or not all(_is_entry(name, digest) for name, digest in manifest.items()):
        raise ValueError(f"{folder}/{MANIFEST_NAME} does not list the files of a checkpoint")
    return manifest


def _is_entry(name: str, digest: object) -> bool:
    return os.path.basename(name) == name and isinstance(digest, dict) and set(digest) == {"bytes", "crc32"}
