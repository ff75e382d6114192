"""What a run's folder says about its Slurm jobs: job.json, the lives of the run, and the marks that stop it.

Submit, the batch script and the trainer write these files, possibly at this moment: what is missing or damaged is left out and
named in `faults`, and nothing raises. A life is one start of a job, "123.2" being the third one of job 123.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..train.attempts import FILE_NAME as DIARY_NAME
from ..train.json_lines import read_json_lines
from ..train.tracking import METRICS_NAME

# In which whoever holds a run's lock has touched it: that happens every five seconds, and is seen through a file server.
_LOCK_SECONDS = 60.0
_MARKS = ("config.yaml", DIARY_NAME, METRICS_NAME, "slurm/command", "slurm/job.json")


@dataclass(frozen=True)
class Job:
    """What was submitted."""

    ids: list[int]  # several: a chain
    array_index: int | None
    name: str
    submit_dir: Path  # of the batch script, slurm/train.sbatch below it
    submitted_unix_seconds: float
    nodes: int
    processes: int
    lead_seconds: int  # from Slurm's warning to the end of a life


@dataclass(frozen=True)
class Ended:
    """What the trainer wrote at its end."""

    code: int
    who: str  # asked for it: user, scheduler or nobody
    cause: str


@dataclass
class Life:
    """One start of a job, as the batch script and the trainer have it."""

    name: str
    job: int
    nodes: str
    begin: float  # seconds since 1970
    end: float | None = None  # None: it goes on, or was killed
    code: int | None = None
    decision: str = ""  # done, requeue, resubmit, give_up, stopped, cancelled or slurm
    why: str = ""
    successor: int | None = None  # the job that was submitted to go on
    ended: Ended | None = None
    log: Path | None = None


@dataclass(frozen=True)
class BadNode:
    """A node that the run does without."""

    name: str
    reason: str


@dataclass
class RunFiles:
    """Everything of RUN_DIR/slurm that is there."""

    run_dir: Path
    job: Job | None = None
    lives: list[Life] = field(default_factory=list)
    is_cancelled: bool = False
    gave_up: str = ""
    fruitless: int = 0
    bad_nodes: list[BadNode] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def job_ids(self) -> set[int]:
        """Of all jobs of this run that its files know of; of an array's task, also the array's."""
        found = set(self.job.ids) if self.job else set()
        return found | {life.job for life in self.lives} | {life.successor for life in self.lives if life.successor}

    def log(self) -> Path | None:
        """The log of the newest life that has one; where none has begun, of the first job."""
        logs = [life.log for life in self.lives if life.log is not None]
        return logs[-1] if logs else None


def is_run_dir(path: Path) -> bool:
    """Whether a folder is a run's: one that was submitted or that trained."""
    return any((path / name).is_file() for name in _MARKS)


def run_dirs(path: Path) -> list[Path]:
    """The run that a folder is of, or those of a sweep or of a folder with runs. Raises ValueError for another folder."""
    if is_run_dir(path):
        return [path]
    tasks = [Path(name) for name in _text(path / "slurm" / "tasks").split("\0") if name]
    below = sorted(child for child in path.iterdir() if is_run_dir(child)) if path.is_dir() else []
    if found := tasks or below:
        return found
    raise ValueError(f"RUN={path} must be the directory of a run, or a folder that holds such directories")


def is_at_work(run_dir: Path, now: float) -> bool:
    """Whether an attempt keeps its lock up; of one that was killed this is true for a minute longer."""
    try:
        return now - (run_dir / "lock.json").stat().st_mtime < _LOCK_SECONDS
    except OSError:
        return False


def read_run_files(run_dir: Path) -> RunFiles:
    """What is there; of a run that never went through Slurm, nothing."""
    folder = run_dir / "slurm"
    found = RunFiles(run_dir)
    found.job = _job(folder / "job.json", found.faults)
    found.lives = _lives(folder, found.job)
    found.is_cancelled = (folder / "cancelled").exists()
    if (folder / "gave_up").exists():
        found.gave_up = _text(folder / "gave_up").strip() or "the batch script did not say why"
    # Its second line is the checkpoint since which is counted; a life counts from its beginning.
    fruitless = _text(folder / "fruitless").partition("\n")[0].strip()
    found.fruitless = int(fruitless) if fruitless.isascii() and fruitless.isdigit() else 0
    if fruitless and str(found.fruitless) != fruitless:
        found.faults.append(f"{folder / 'fruitless'} does not hold a number")
    if found.lives and found.lives[-1].decision in ("", "done"):  # it goes on, or all is well
        found.fruitless = max(0, found.fruitless - 1)
    # Of the life that goes on, they are not among the lines of all lives yet.
    newest = [folder / "lives" / life.name / "bad_nodes" for life in found.lives[-1:]]
    found.bad_nodes = _bad_nodes([folder / "bad_nodes", *newest])
    return found


def _job(path: Path, faults: list[str]) -> Job | None:
    if not path.is_file():
        return None
    try:
        facts = json.loads(_text(path))
        index = facts["array_index"]
        return Job(
            ids=[int(number) for number in facts["jobs"]],
            array_index=None if index is None else int(index),
            name=str(facts["name"]),
            submit_dir=Path(facts["submit_dir"]),
            submitted_unix_seconds=_seconds(facts["submitted_unix_seconds"]),
            nodes=int(facts["nodes"]),
            processes=int(facts["processes"]),
            lead_seconds=int(facts["lead_seconds"]),
        )
    except (ValueError, TypeError, KeyError, IndexError) as error:
        faults.append(f"{path} cannot be read ({type(error).__name__}: {error})")
        return None


def _lives(folder: Path, job: Job | None) -> list[Life]:
    """In the order of their starts; what no start belongs to is left out."""
    found: dict[str, Life] = {}
    for row in read_json_lines(folder / "lives.jsonl"):
        try:
            _take_event(found, row)
        except (ValueError, TypeError, KeyError):
            continue  # a line that is not one of ours, or not all of one
    for life in found.values():
        life.ended = _ended(folder / "lives" / life.name / "ended")
        life.log = _log(job.submit_dir if job else folder.parent, life.job, job)
    return list(found.values())


def _take_event(found: dict[str, Life], row: dict[str, Any]) -> None:
    name, event = str(row["life"]), row["event"]
    if event == "start":
        found[name] = Life(name, int(row["job"]), str(row["nodes"]), _seconds(row["unix_seconds"]))
    elif event == "end" and name in found:
        life = found[name]
        life.end, life.code = _seconds(row["unix_seconds"]), int(row["code"])
        life.decision, life.why = str(row["decision"]), str(row["why"])
    elif event == "resubmit" and name in found:
        found[name].successor = int(row["job"])


def _ended(path: Path) -> Ended | None:
    lines = _text(path).splitlines()
    try:
        return Ended(int(lines[0]), lines[1], lines[2] if len(lines) > 2 else "")
    except (ValueError, IndexError):
        return None


def _log(submit_dir: Path, job_id: int, job: Job | None) -> Path | None:
    """The log of a job; of an array's task it is called after the array, whose first number only job.json knows."""
    names = [f"log-{job_id}.txt"]
    if job and job.array_index is not None:
        names = [f"log-{number}_{job.array_index}.txt" for number in [job_id, *reversed(job.ids)]]
    return next((path for name in names if (path := submit_dir / "slurm" / name).is_file()), None)


def _bad_nodes(paths: Iterable[Path]) -> list[BadNode]:
    found: dict[str, BadNode] = {}
    for path in paths:
        for line in _text(path).splitlines():
            name, _, reason = line.partition("\t")
            if name:
                found[name] = BadNode(name, reason)
    return list(found.values())


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"{value} is no time")
    return seconds


def _text(path: Path) -> str:
    """What a file holds, as far as it is text; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
