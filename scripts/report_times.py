"""Where the time of a run went, by its diary and its rows of metrics: spans of time that do not overlap, and their sums."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..train.attempts import Attempt, read_attempts
from ..train.json_lines import read_json_lines
from ..train.tracking import DROPPED_NAME, METRICS_NAME, VALIDATION_SECONDS

Row = dict[str, Any]


class Spent(Enum):
    """On what; the values are for people."""

    training = "training"
    data = "waiting for data"
    saving = "held up by checkpoints"
    validation = "validation and samples"
    set_up = "set-up"
    lost = "steps done again later"
    down = "down between attempts"
    other = "anything else"


# Of the time in training: the columns of metrics that are parts of it, and what they are called. What is left is the rest.
TRAINING_PARTS = {
    "vae": "frozen autoencoder",
    "text": "text encoder",
    "model": "forward and backward",
    "communication": "reducing gradients",
    "optimizer": "optimizer",
}


@dataclass(frozen=True)
class Span:
    """A span of time, in seconds since 1970."""

    begin: float
    end: float
    spent: Spent  # training: it may have waited for data, too


@dataclass
class AttemptTimes:
    """When an attempt did what."""

    attempt: Attempt
    begin: float
    end: float  # its last sign of life
    rows: list[Row]  # those with a time, in its order, also those that were dropped
    # Where it went on; of one that ended before it knew, where the next one did.
    start_step: int
    furthest_step: int
    begin_of_steps: float = 0.0
    lost: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class RunTimes:
    """The whole run up to now."""

    attempts: list[AttemptTimes]
    spans: list[Span]  # in the order of time
    seconds: dict[Spent, float]
    training_parts: dict[
        str, float
    ]  # seconds of rank 0 of the training that is part of the run, by the keys of TRAINING_PARTS
    lost_steps: int
    rows: list[Row]  # of metrics.jsonl
    dropped: list[Row]  # of steps that were done once more

    @property
    def wall_seconds(self) -> float:
        return self.attempts[-1].end - self.attempts[0].begin

    @property
    def effective_share(self) -> float:
        """The share of the wall time that went into steps which are part of the run."""
        return self.seconds[Spent.training] / self.wall_seconds if self.wall_seconds else 0.0


def read_run_times(run_dir: Path) -> RunTimes:
    """Of a run that is over or that goes on. Raises ValueError for a folder that is no run's."""
    attempts = read_attempts(run_dir)
    if not attempts:
        raise ValueError(f"run={run_dir} must be the directory of a training run (it has no attempts.jsonl)")
    rows = read_json_lines(run_dir / METRICS_NAME)
    kept = {_identity(row) for row in rows}
    dropped = [row for row in read_json_lines(run_dir / DROPPED_NAME) if _identity(row) not in kept]
    everything = [*rows, *dropped]
    times: list[AttemptTimes] = []
    for attempt, step in zip(attempts, _start_steps(attempts), strict=True):
        found = _times_of(attempt, everything, step)
        if times and found.begin < times[-1].end:  # another machine's clock, or one that was set back
            late = times[-1].end - found.begin
            found = _times_of(_later(attempt, late), [_row_later(row, late) for row in found.rows], step)
        times.append(found)
    lost_steps = _mark_lost(times)
    spans = _spans(times)
    return RunTimes(times, spans, _sums(times, spans), _training_parts(times), lost_steps, rows, dropped)


def duration(seconds: float) -> str:
    """Time in the two largest units that fit."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (unit, size), (next_unit, next_size) in pairwise(units):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            return f"{whole:.0f} {unit} {rest // next_size:.0f} {next_unit}"
    return f"{seconds:.3g} s"


def _identity(row: Row) -> tuple[Any, ...]:
    return row.get("attempt"), row.get("step"), row.get("unix_seconds")


def _later(attempt: Attempt, seconds: float) -> Attempt:
    return replace(
        attempt,
        start=_row_later(attempt.start, seconds),
        begin=attempt.begin and _row_later(attempt.begin, seconds),
        commits=[_row_later(row, seconds) for row in attempt.commits],
        failed_saves=[_row_later(row, seconds) for row in attempt.failed_saves],
        roll_backs=[_row_later(row, seconds) for row in attempt.roll_backs],
        end=attempt.end and _row_later(attempt.end, seconds),
    )


def _row_later(row: Row, seconds: float) -> Row:
    return {**row, "unix_seconds": row["unix_seconds"] + seconds}


def _start_steps(attempts: Sequence[Attempt]) -> list[int]:
    found: list[int] = []
    # After the last attempt, a further one would go on at the newest checkpoint.
    following = max((commit["step"] for attempt in attempts for commit in attempt.commits), default=0)
    for attempt in reversed(attempts):
        following = following if attempt.start_step is None else attempt.start_step
        found.insert(0, following)
    return found


def _times_of(attempt: Attempt, rows: Iterable[Row], start_step: int) -> AttemptTimes:
    events = [attempt.start, *attempt.commits, *attempt.failed_saves, *attempt.roll_backs]
    events += [event for event in (attempt.begin, attempt.end) if event]
    mine = [row for row in rows if row.get("attempt") == attempt.number and "unix_seconds" in row]
    mine.sort(key=lambda row: row["unix_seconds"])
    begin = attempt.start["unix_seconds"]
    steps = [row.get("step", row.get("from_step", 0)) for row in [*mine, *events]]
    found = AttemptTimes(
        attempt,
        begin,
        max(begin, *(row["unix_seconds"] for row in [*mine, *events])),
        mine,
        start_step=start_step,
        furthest_step=max(start_step, *steps),
    )
    found.begin_of_steps = _begin_of_steps(found)
    return found


def _begin_of_steps(times: AttemptTimes) -> float:
    """When the first step began: from the first row back over its steps; the end where there is no row."""
    for row, steps in _training_rows(times):
        spans = [span for span in _pauses(times) if span.end <= row["unix_seconds"]]
        paused = sum(span.end - span.begin for span in spans)
        return min(max(row["unix_seconds"] - steps * row["seconds_per_step"] - paused, times.begin), times.end)
    return min((span.begin for span in _pauses(times)), default=times.end)


def _training_rows(times: AttemptTimes) -> list[tuple[Row, int]]:
    """The rows about steps, each with the number of its steps that this attempt did."""
    found = []
    turns = [(event["unix_seconds"], event["to_step"]) for event in times.attempt.roll_backs]
    step = times.start_step
    for row in times.rows:
        if "seconds_per_step" not in row:
            continue
        while turns and turns[0][0] < row["unix_seconds"]:
            step = turns.pop(0)[1]
        found.append((row, max(0, row["step"] - step)))
        step = row["step"]
    return found


def _pauses(times: AttemptTimes) -> list[Span]:
    """When the steps of an attempt stood still for a checkpoint or a validation."""
    found = []
    for event in times.attempt.commits:
        begin = _begin_of_save(event)
        found.append(Span(begin, begin + event.get("blocking_seconds", 0.0), Spent.saving))
    for event in times.attempt.failed_saves:
        end = event["unix_seconds"]
        found.append(Span(end - event.get("blocking_seconds", 0.0), end, Spent.saving))
    for row in times.rows:
        if seconds := row.get(VALIDATION_SECONDS):
            found.append(Span(row["unix_seconds"] - seconds, row["unix_seconds"], Spent.validation))
    return sorted(found, key=lambda span: span.begin)


def _begin_of_save(commit: Row) -> float:
    return float(commit["unix_seconds"] - commit.get("total_seconds", commit.get("blocking_seconds", 0.0)))


def _mark_lost(times: Sequence[AttemptTimes]) -> int:
    """Marks the time of steps that were done again, after a restart or a roll-back; returns how many steps, as far as is known.

    Steps since the last row of an attempt that was killed are not known.
    """
    steps = 0
    for index, current in enumerate(times):
        for event in current.attempt.roll_backs:
            steps += max(0, event["from_step"] - event["to_step"])
            _mark_lost_since(event["to_step"], times[: index + 1], event["unix_seconds"])
        if index + 1 < len(times):
            following = times[index + 1]
            goes_on_at = following.start_step
            turn = max((event["unix_seconds"] for event in current.attempt.roll_backs), default=current.begin)
            seen = [row["step"] for row in [*current.rows, *current.attempt.commits] if row["unix_seconds"] > turn]
            end = current.attempt.end or {}
            furthest = max([*seen, int(end.get("step", 0))], default=0)
            if furthest > goes_on_at:
                steps += furthest - goes_on_at
                _mark_lost_since(goes_on_at, times[: index + 1], following.begin)
    return steps


def _mark_lost_since(step: int, times: Sequence[AttemptTimes], until: float) -> None:
    """Everything done after `step`, up to a moment in the last of these attempts or after it."""
    for current in reversed(times):
        end = min(current.end, until)
        commits = [c for c in current.attempt.commits if c["step"] == step and c["unix_seconds"] <= until]
        if commits:
            current.lost.append((_begin_of_save(commits[-1]) + commits[-1].get("blocking_seconds", 0.0), end))
            return
        if current.start_step < step:  # its commit was not written down
            before = [row["unix_seconds"] for row in current.rows if row["step"] <= step]
            current.lost.append((max(before, default=current.begin_of_steps), end))
            return
        current.lost.append((current.begin_of_steps, end))


def _spans(times: Sequence[AttemptTimes]) -> list[Span]:
    found: list[Span] = []
    for index, current in enumerate(times):
        found.append(Span(current.begin, current.begin_of_steps, Spent.set_up))
        inner = [Span(*part, Spent.lost) for part in _union(current.lost)]
        inner += [
            pause for pause in _pauses(current) if not any(lost.begin <= pause.begin < lost.end for lost in inner)
        ]
        position = current.begin_of_steps
        for span in sorted(inner, key=lambda span: span.begin):
            begin, end = max(span.begin, position), min(span.end, current.end)
            if begin < end:
                found += [Span(position, begin, Spent.training), Span(begin, end, span.spent)]
                position = end
        # After its last row or checkpoint an attempt exports, closes what is open, and ends.
        last = max(_last_work(current), position)
        found += [Span(position, last, Spent.training), Span(last, current.end, Spent.other)]
        if index + 1 < len(times):
            found.append(Span(current.end, times[index + 1].begin, Spent.down))
    return [span for span in found if span.begin < span.end]


def _last_work(times: AttemptTimes) -> float:
    attempt = times.attempt
    events = [*times.rows, *attempt.commits, *attempt.failed_saves, *attempt.roll_backs]
    return max((event["unix_seconds"] for event in events), default=times.begin)


def _union(parts: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for begin, end in sorted(parts):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _sums(times: Sequence[AttemptTimes], spans: Iterable[Span]) -> dict[Spent, float]:
    """Seconds of each kind. Of the spans of training, what the rows know of is training or waiting for data, the rest is other."""
    seconds = dict.fromkeys(Spent, 0.0)
    for span in spans:
        seconds[span.spent] += span.end - span.begin
    open_seconds, seconds[Spent.training] = seconds[Spent.training], 0.0
    for current in times:
        for row, steps in _kept_rows(current):
            waiting = row.get("data_seconds_per_step", 0.0)
            seconds[Spent.data] += steps * waiting
            seconds[Spent.training] += steps * (row["seconds_per_step"] - waiting)
    seconds[Spent.other] += max(0.0, open_seconds - seconds[Spent.training] - seconds[Spent.data])
    return seconds


def _training_parts(times: Sequence[AttemptTimes]) -> dict[str, float]:
    """Each part's seconds over the steps that are part of the run; without those of which no row tells."""
    seconds: dict[str, float] = {}
    for current in times:
        for row, steps in _kept_rows(current):
            for name in TRAINING_PARTS:
                if (of_step := row.get(f"{name}_seconds_per_step")) is not None:
                    seconds[name] = seconds.get(name, 0.0) + steps * of_step
    return seconds


def _kept_rows(times: AttemptTimes) -> list[tuple[Row, int]]:
    """The rows about steps that are part of the run, each with the number of its steps."""
    return [
        (row, steps)
        for row, steps in _training_rows(times)
        if not any(begin < row["unix_seconds"] <= end for begin, end in times.lost)
    ]
