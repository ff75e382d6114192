"""The diary of a run, RUN_DIR/attempts.jsonl: what each attempt began with, committed and ended with. Rank 0 writes it.

    {"event": "start", "attempt": 2, "unix_seconds": .., "world_size": 8, "host": "n01", "code": "9f3c..",
     "life": "1234.0"}    (of a Slurm job: its number and how often it was started before)
    {"event": "begin", "attempt": 2, "unix_seconds": .., "step": 400, "from": "step-00000400", "resume": "auto"}
    {"event": "commit", "attempt": 2, "unix_seconds": .., "step": 600, "blocking_seconds": 0.3, "total_seconds": 9.1, "bytes": 5000}
    {"event": "save_failed", "attempt": 2, "unix_seconds": .., "step": 650, "blocking_seconds": 0.3, "cause": "No space left .."}
    {"event": "roll_back", "attempt": 2, "unix_seconds": .., "from_step": 655, "to_step": 600, "cause": "the loss .."}
    {"event": "end", "attempt": 2, "unix_seconds": .., "step": 800, "exit_code": 75, "cause": "..", "on_request": true}

An attempt without an end was killed. What happened between is in metrics.jsonl, whose rows have the attempt and the time, too.
"""

import hashlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .exit_codes import ExitCode
from .json_lines import JsonLines, read_json_lines
from .life import life_name

FILE_NAME = "attempts.jsonl"
KILLED = "it ended without a word (killed, or its machine went down)"


@dataclass
class Attempt:
    """One attempt as the diary has it."""

    number: int
    start: dict[str, Any]
    begin: dict[str, Any] | None = None  # None: it ended before it was known where it goes on
    commits: list[dict[str, Any]] = field(default_factory=list)
    failed_saves: list[dict[str, Any]] = field(default_factory=list)
    roll_backs: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None  # None: it goes on, or was killed

    @property
    def start_step(self) -> int | None:
        """The step of the checkpoint that it went on from, 0 without one."""
        return int(self.begin["step"]) if self.begin else None

    @property
    def cause(self) -> str:
        """Why it ended."""
        if self.end is None:
            return KILLED
        if cause := self.end.get("cause"):
            return str(cause)
        if self.end.get("on_request"):
            return "stopped on request"
        code = self.end.get("exit_code")
        return "all steps are done" if code == ExitCode.done else f"exit code {code}"

    @property
    def is_fruitless(self) -> bool:
        """It left no new checkpoint, and neither a person, a scheduler, a mistake in the settings nor a broken machine is why."""
        if self.commits:
            return False
        end = self.end or {}
        is_excused = end.get("on_request") or end.get("failed_probe")
        return not is_excused and end.get("exit_code") not in (ExitCode.done, ExitCode.config)


class Attempts:
    """Writes the diary of one attempt. A disk that is full does not stop it; the event then goes with the next one."""

    def __init__(self, run_dir: Path) -> None:
        before = read_attempts(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = JsonLines(run_dir / FILE_NAME)
        self.number = before[-1].number + 1 if before else 1

    def start(self, *, world_size: int, code: str) -> None:
        """The first event, before anything that can fail; `code` as of `code_fingerprint`."""
        job = {"life": life} if (life := life_name()) else {}
        self._write("start", world_size=world_size, host=socket.gethostname(), code=code, **job)

    def begin(self, step: int, checkpoint: Path | None, *, resume: str = "auto") -> None:
        """Once it is known where this attempt goes on: at `step`, from a checkpoint or from nothing; `resume` is what was asked."""
        self._write("begin", step=step, **{"from": checkpoint.name if checkpoint else None}, resume=resume)

    def commit(self, step: int, *, blocking_seconds: float, total_seconds: float, nbytes: int) -> None:
        """A checkpoint of `step` is there: what it kept training from, what it took in all, and its size over all ranks."""
        self._write(
            "commit",
            step=step,
            blocking_seconds=round(blocking_seconds, 4),
            total_seconds=round(total_seconds, 4),
            bytes=nbytes,
        )

    def save_failed(self, step: int, *, blocking_seconds: float, cause: str) -> None:
        """The checkpoint of `step` could not be written; training goes on."""
        self._write("save_failed", step=step, blocking_seconds=round(blocking_seconds, 4), cause=cause)

    def roll_back(self, *, from_step: int, to_step: int, cause: str) -> None:
        """Steps that were done are done again, within this attempt."""
        self._write("roll_back", from_step=from_step, to_step=to_step, cause=cause)

    def end(
        self, *, step: int, exit_code: int, cause: str, on_request: bool = False, failed_probe: bool = False
    ) -> None:
        """The last event; `on_request` where somebody asked for the stop, `failed_probe` where a machine is broken."""
        excuses = {"on_request": on_request, **({"failed_probe": True} if failed_probe else {})}
        self._write("end", step=step, exit_code=int(exit_code), cause=cause, **excuses)

    def _write(self, event: str, **facts: Any) -> None:
        row = {"event": event, "attempt": self.number, "unix_seconds": round(time.time(), 3), **facts}
        self._file.append(row, sync=True)


def read_attempts(run_dir: Path) -> list[Attempt]:
    """The attempts of a run in their order; [] where there is no diary. What no start belongs to is left out."""
    found: dict[Any, Attempt] = {}
    for row in read_json_lines(run_dir / FILE_NAME):
        event, number = row.get("event"), row.get("attempt")
        if event == "start" and isinstance(number, int):
            found[number] = Attempt(number, row)
        elif (attempt := found.get(number)) is None:
            continue
        elif event == "begin":
            attempt.begin = row
        elif event == "commit":
            attempt.commits.append(row)
        elif event == "save_failed":
            attempt.failed_saves.append(row)
        elif event == "roll_back":
            attempt.roll_backs.append(row)
        elif event == "end":
            attempt.end = row
    return list(found.values())


def resume_in_force(run_dir: Path, resume: str) -> str:
    """`resume` or, where an attempt has done as it says, auto: a scheduler repeats a command as it was, and means to go on.

    Asked before an attempt writes its begin. To go back to a step is done once a checkpoint followed it, to start anew at once.
    """
    for attempt in read_attempts(run_dir):
        is_same = attempt.begin is not None and attempt.begin.get("resume") == resume
        if is_same and (resume == "never" or (resume.isdigit() and attempt.commits)):
            print(
                f"muybridge: resume={resume} was done by attempt {attempt.number}; this one goes on from the newest checkpoint "
                f"(another run_dir starts anew; to go back again, move what is newer out of {run_dir / 'checkpoints'})",
                flush=True,
            )
            return "auto"
    return resume


def fruitless_attempts(run_dir: Path, code: str) -> list[Attempt]:
    """The last attempts in a row, oldest first, that went on from one step with this code and left no new checkpoint.

    Asked before an attempt writes its own start. One that ended too early to know its step goes with the others.
    """
    found: list[Attempt] = []
    step: int | None = None
    for attempt in reversed(read_attempts(run_dir)):
        is_elsewhere = None not in (step, attempt.start_step) and attempt.start_step != step
        if is_elsewhere or attempt.start.get("code") != code or not attempt.is_fruitless:
            break
        step = attempt.start_step if step is None else step
        found.insert(0, attempt)
    return found


def no_progress_message(run_dir: Path, code: str, restart_limit: int) -> str:
    """Why the run is not tried again, or an empty string; a `restart_limit` of 0 always tries again.

    In a Slurm job its batch script counts: also lives that end before there is an attempt, and anew after each submission.
    """
    found = fruitless_attempts(run_dir, code)
    if not restart_limit or len(found) < restart_limit or life_name():
        return ""
    causes = "; ".join(f"attempt {attempt.number}: {attempt.cause}" for attempt in found)
    return (
        f"{run_dir} made no progress: {len(found)} attempts in a row left no new checkpoint ({causes}). Another attempt is made "
        "once the settings, data, number of processes or code have changed, or with restart_limit=0"
    )


def code_fingerprint(settings: Mapping[str, Any], *, world_size: int, manifests: Iterable[Path]) -> str:
    """Changes with what decides how an attempt goes: settings, processes, datasets (by the `manifests` that are there), and the
    package's source files, committed or not."""
    facts = json.dumps([settings, world_size], sort_keys=True, default=str)
    digest = hashlib.blake2b(facts.encode(), digest_size=8)
    for path in [*_sources(), *(path for path in manifests if path.is_file())]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources() -> list[Path]:
    root = Path(__file__).parents[1]
    folders = ("data", "kernels", "models", "train")
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
