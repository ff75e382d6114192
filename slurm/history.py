"""The stretches of a run, one a line of `muybridge status`: what Slurm calls a life and the trainer calls an attempt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..train.attempts import Attempt, read_attempts
from .run_files import Life

DECISIONS = {
    "done": "done",
    "requeue": "back into the queue",
    "resubmit": "submitted itself again",
    "give_up": "gave up",
    "stopped": "stopped on request",
    "cancelled": "cancelled",
    "slurm": "ended by Slurm",
}


@dataclass
class Stretch:
    """A life with its attempt; only a life where the trainer did not begin, only an attempt where Slurm had no part in it."""

    begin: float  # seconds since 1970
    end: float | None = None  # None: it goes on, or was killed
    seen: float | None = None  # the last sign of its attempt
    life: str | None = None
    attempt: int | None = None
    nodes: str = ""
    start_step: int | None = None
    step: int | None = None  # as far as is known
    checkpoints: int = 0
    code: int | None = None
    decision: str = ""
    cause: str = ""

    @property
    def words(self) -> str:
        """How it ended; "" for one without an end."""
        if self.end is None:
            return ""
        decision = DECISIONS.get(self.decision, self.decision)
        return ": ".join(filter(None, [decision, self.cause]))


def read_history(run_dir: Path, lives: Sequence[Life], rows: Iterable[dict[str, Any]]) -> list[Stretch]:
    """In the order of time; `rows` are the last ones of the metrics."""
    homes = {life.name: _of_life(life) for life in lives}
    found = list(homes.values())
    for attempt in read_attempts(run_dir):
        stretch = homes.pop(str(attempt.start.get("life")), None)
        if stretch is None:  # begun by hand
            stretch = Stretch(_seconds(attempt.start))
            found.append(stretch)
        _take_attempt(stretch, attempt, rows)
    return sorted(found, key=lambda stretch: stretch.begin)


def _of_life(life: Life) -> Stretch:
    found = Stretch(life.begin, end=life.end, life=life.name, nodes=life.nodes, code=life.code, decision=life.decision)
    # The trainer says what happened, the script what follows from it.
    found.cause = (life.ended.cause if life.ended else "") or life.why
    return found


def _take_attempt(stretch: Stretch, attempt: Attempt, rows: Iterable[dict[str, Any]]) -> None:
    stretch.attempt = attempt.number
    stretch.nodes = stretch.nodes or str(attempt.start.get("host", ""))
    stretch.checkpoints = len(attempt.commits)
    events = [*attempt.commits, *([attempt.end] if attempt.end else []), *([attempt.begin] if attempt.begin else [])]
    mine = [row for row in rows if row.get("attempt") == attempt.number]
    signs = [_seconds(row) for row in [attempt.start, *events, *attempt.failed_saves, *mine]]
    stretch.seen = max(signs)
    begin = (attempt.begin or {}).get("step")
    stretch.start_step = begin if isinstance(begin, int) else None
    steps = [row["step"] for row in [*events, *mine] if isinstance(row.get("step"), int)]
    stretch.step = max(steps, default=None)
    if attempt.end is not None:
        stretch.end = stretch.end or _seconds(attempt.end)
        code = attempt.end.get("exit_code")
        stretch.code = code if stretch.code is None and isinstance(code, int) else stretch.code
        stretch.cause = stretch.cause or attempt.cause


def _seconds(row: dict[str, Any]) -> float:
    value = row.get("unix_seconds")
    return float(value) if isinstance(value, (int, float)) else 0.0
