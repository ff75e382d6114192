"""How a run stands, by its files and by Slurm's queue, as plain facts: what `muybridge status` shows and prints as JSON."""

import json
import time
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from ..scripts.sync import offline_attempts
from ..train.exit_codes import ExitCode
from ..train.json_lines import read_last_json_lines
from ..train.tracking import METRICS_NAME, URL_NAME
from .history import Stretch, read_history
from .run_files import BadNode, RunFiles, is_at_work
from .run_jobs import RUNNING, state_words
from .scheduler import Job

# Of the rows that speed and time left are taken from: all of one attempt, so that a pause between attempts counts for nothing.
RECENT_ROWS = 100
# A run that works and has written nothing for as long is worth a look: this, and so many times what is usual.
QUIET_SECONDS, QUIET_FACTOR = 600.0, 10
QUIET_SET_UP_SECONDS = 1800.0
# By which the time of a submission may be after the start of its first life.
_SUBMIT_SECONDS = 5.0
# What Slurm makes of a job without a limit.
_NO_LIMIT_SECONDS = 364 * 86400.0


@dataclass
class QueuedJob:
    """A job of the run that Slurm has, times in seconds since 1970."""

    id: str
    state: str
    words: str
    nodes: str
    start: float | None = None  # of this life; of a job that waits, when Slurm expects to start it
    limit: float | None = None  # when its time is over
    restarts: int | None = None
    excluded_nodes: str = ""


@dataclass
class Progress:
    """Where the training is, by the last rows of its metrics."""

    step: int = 0
    steps: int | None = None  # of the whole run
    loss: float | None = None
    lr: float | None = None
    seconds_per_step: float | None = None
    samples_per_second: float | None = None
    data_share: float | None = None  # of a step's time, waiting for data
    eta_seconds: float | None = None
    row_unix_seconds: float | None = None
    is_quiet: bool = False  # at work, and has written nothing for suspiciously long


@dataclass
class Checkpoint:
    name: str
    step: int
    unix_seconds: float | None
    bytes: int | None


@dataclass
class WandbState:
    run_id: str
    project: str
    url: str  # empty where W&B has nothing of it yet
    is_online: bool  # the newest attempt's
    offline: int  # attempts
    unsynced: int


@dataclass
class RunStatus:
    """Everything that is known; `state` is waiting, running, ending, done, stopped, cancelled, gave_up, failed, lost or new."""

    run: str
    state: str
    words: str  # the state for people
    now: float
    jobs: list[QueuedJob]
    slurm_fault: str  # why Slurm was not asked, or did not answer
    submitted_nodes: int | None
    processes: int | None
    progress: Progress
    checkpoint: Checkpoint | None
    history: list[Stretch]
    fruitless: int
    gave_up: str
    is_cancelled: bool
    bad_nodes: list[BadNode]
    wandb: WandbState | None
    log: str | None
    faults: list[str]
    code: int | None = None  # how the last attempt ended
    next: list[str] = field(default_factory=list)


def run_status(files: RunFiles, jobs: list[QueuedJob], *, slurm_fault: str = "", now: float | None = None) -> RunStatus:
    """What the files and these jobs of Slurm's queue say together."""
    now = time.time() if now is None else now
    faults = list(files.faults)
    rows = read_last_json_lines(files.run_dir / METRICS_NAME)
    history = read_history(files.run_dir, files.lives, rows)
    settings = _settings(files.run_dir, faults)
    state, words = _state(files, jobs, history, now=now, is_asked=not slurm_fault)
    progress = _progress(rows, history, settings)
    if state == "running":
        progress.is_quiet = _is_quiet(rows, history, now=now)
        if progress.eta_seconds is not None and progress.row_unix_seconds is not None:
            progress.eta_seconds = max(0.0, progress.eta_seconds - (now - progress.row_unix_seconds))
    else:
        progress.eta_seconds = None
    last = history[-1] if history else None
    return RunStatus(
        run=str(files.run_dir),
        state=state,
        words=words,
        now=now,
        jobs=jobs,
        slurm_fault=slurm_fault,
        submitted_nodes=files.job.nodes if files.job else None,
        processes=files.job.processes if files.job else None,
        progress=progress,
        checkpoint=_checkpoint(files.run_dir),
        history=history,
        fruitless=files.fruitless,
        gave_up=files.gave_up,
        is_cancelled=files.is_cancelled,
        bad_nodes=files.bad_nodes,
        wandb=_wandb(files.run_dir, settings),
        log=str(log) if (log := files.log()) else None,
        faults=faults,
        code=last.code if last else None,
    )


def queued_job(job: Job, facts: dict[str, str] | None, *, has_run: bool) -> QueuedJob:
    """A job of squeue, with what scontrol says about it where that was asked."""
    found = QueuedJob(job.id, job.state, state_words(job, has_run=has_run), job.nodes)
    if facts:
        found.start = _slurm_time(facts.get("StartTime", ""))
        end = _slurm_time(facts.get("EndTime", ""))
        if found.start is not None and end is not None and 0 < end - found.start < _NO_LIMIT_SECONDS:
            found.limit = end
        restarts = facts.get("Restarts", "")
        found.restarts = int(restarts) if restarts.isdigit() else None
        excluded = facts.get("ExcNodeList", "")
        found.excluded_nodes = "" if excluded == "(null)" else excluded
    return found


def _slurm_time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # Unknown
        return None


def _state(
    files: RunFiles, jobs: list[QueuedJob], history: list[Stretch], *, now: float, is_asked: bool
) -> tuple[str, str]:
    """The state's name and its words."""
    last = history[-1] if history else None
    running = [job for job in jobs if job.state in RUNNING]
    if running:
        words = running[0].words
        return "running", "running, and asked to stop" if _is_asked_to_stop(files) else words
    # A life tells nothing of a job that was submitted later, such as one with more steps for a run that was done.
    is_new = (
        files.job is not None and last is not None and files.job.submitted_unix_seconds > last.begin + _SUBMIT_SECONDS
    )
    if last is not None and not is_new and last.code == ExitCode.done and last.decision in ("", "done"):
        return "done", "done: all steps are trained"
    for job in jobs:
        return ("waiting", job.words) if job.state == "PENDING" else ("ending", job.words)
    if is_at_work(files.run_dir, now):
        return "running", "running" if is_asked else "running, as far as its files say"
    if files.gave_up:
        return "gave_up", f"given up: {files.gave_up}"
    if last is None or is_new:
        return _state_before(files, is_asked=is_asked)
    if files.is_cancelled and (is_asked or last.end is not None):  # also where Slurm ended it before it could say so
        return "cancelled", "stopped on request; it can go on"
    if last.end is None:
        if not is_asked and last.life:
            return (
                "lost",
                "unknown: as far as its files say its last life goes on, and Slurm does not say whether it does",
            )
        return "lost", "gone: it ended without a word (killed, or its machine went down)"
    if last.decision in ("stopped", "cancelled"):
        return last.decision, "stopped on request; it can go on"
    if last.decision in ("requeue", "resubmit"):
        words = "its last life went back into the queue"
        if not is_asked:
            return "waiting", f"waiting, as far as its files say: {words}"
        return "lost", f"gone: {words}, where Slurm has no job of it"
    if last.decision == "slurm":
        return "stopped", f"ended by Slurm (scancel, or its time was over){': ' if last.cause else ''}{last.cause}"
    if last.code == ExitCode.requeue:
        return "stopped", f"stopped, and can go on: {last.cause}"
    return "failed", f"failed: {last.cause}"


def _state_before(files: RunFiles, *, is_asked: bool) -> tuple[str, str]:
    """Of a run of which nothing has begun."""
    if files.job is None:
        return "new", "has not begun"
    if files.is_cancelled:
        return "cancelled", "cancelled before it began"
    if is_asked:
        return "lost", "gone: Slurm has no job of it, and none has begun"
    return "waiting", "submitted; none of its jobs has begun"


def _is_asked_to_stop(files: RunFiles) -> bool:
    return files.is_cancelled or (files.run_dir / "STOP").exists()


def _settings(run_dir: Path, faults: list[str]) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}  # it has not begun
    except (OSError, ValueError, yaml.YAMLError) as error:
        faults.append(f"{path} cannot be read ({str(error).splitlines()[0]})")
        return {}
    return settings if isinstance(settings, dict) else {}


def _progress(rows: list[dict[str, Any]], history: list[Stretch], settings: dict[str, Any]) -> Progress:
    steps = settings.get("steps")
    found = Progress(steps=steps if isinstance(steps, int) else None)
    known = [stretch.step for stretch in history[-1:] if stretch.step is not None]
    found.step = max([row["step"] for row in rows[-1:] if isinstance(row.get("step"), int)] + known, default=0)
    if rows:
        found.row_unix_seconds = _number(rows[-1], "unix_seconds")
    trained = [row for row in rows if "loss" in row and isinstance(row.get("step"), int)]
    if not trained:
        return found
    last = trained[-1]
    found.loss, found.lr = _number(last, "loss"), _number(last, "lr")
    found.seconds_per_step, found.samples_per_second = (
        _number(last, "seconds_per_step"),
        _number(last, "samples_per_second"),
    )
    waiting = _number(last, "data_seconds_per_step")
    if waiting is not None and found.seconds_per_step:
        found.data_share = waiting / found.seconds_per_step
    recent = _recent(rows)
    if recent and found.steps is not None and (rate := _seconds_per_step(recent)) is not None:
        found.eta_seconds = rate * max(0, found.steps - found.step)
    return found


def _recent(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last rows about steps of the newest attempt that has any."""
    trained = [row for row in rows if "loss" in row and isinstance(row.get("step"), int)]
    return [row for row in trained[-RECENT_ROWS:] if row.get("attempt") == trained[-1].get("attempt")]


def _seconds_per_step(rows: list[dict[str, Any]]) -> float | None:
    """By the clock, with what checkpoints and validations take; of a single row, what it says itself."""
    first, last = rows[0], rows[-1]
    begin, end = _number(first, "unix_seconds"), _number(last, "unix_seconds")
    if begin is not None and end is not None and last["step"] > first["step"] and end > begin:
        return (end - begin) / float(last["step"] - first["step"])
    return _number(last, "seconds_per_step")


def _is_quiet(rows: list[dict[str, Any]], history: list[Stretch], *, now: float) -> bool:
    begin = history[-1].begin if history else now
    times = [seconds for row in rows if (seconds := _number(row, "unix_seconds")) is not None and seconds >= begin]
    if not times:
        return now - begin > QUIET_SET_UP_SECONDS
    usual = median(later - earlier for earlier, later in pairwise(times)) if len(times) > 1 else 0.0
    return now - times[-1] > max(QUIET_SECONDS, QUIET_FACTOR * usual)


def _number(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else None


def _checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest; its size is what its manifest lists."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.glob("step-*") if path.name[5:].isdigit()]
    if not names:
        return None
    manifest = folder / max(names) / "MANIFEST.json"
    try:
        nbytes = sum(int(entry["bytes"]) for entry in json.loads(manifest.read_text(encoding="utf-8")).values())
        seconds = manifest.stat().st_mtime
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Checkpoint(max(names), int(max(names)[5:]), None, None)
    return Checkpoint(max(names), int(max(names)[5:]), seconds, nbytes)


def _wandb(run_dir: Path, settings: dict[str, Any]) -> WandbState | None:
    try:
        run_id = (run_dir / "wandb_run_id.txt").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    tracking = settings.get("tracking")
    project = str(tracking.get("project", "")) if isinstance(tracking, dict) else ""
    offline = offline_attempts(run_dir)
    online = [path.name for path in (run_dir / "wandb").glob("run-*") if path.is_dir()]
    if not offline and not online:
        return None  # it is off
    newest = max((attempt.folder.name.removeprefix("offline-") for attempt in offline), default="")
    unsynced = sum(not attempt.is_synced for attempt in offline)
    try:
        url = (run_dir / URL_NAME).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        url = ""
    return WandbState(run_id, project, url, bool(online) and max(online) > newest, len(offline), unsynced)
