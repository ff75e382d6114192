"""`muybridge report`: what became of a run, over all of its attempts: what was lost, what the time went into, and a picture."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data.ledger import from_lines
from ..train.checkpoint import LEDGER_NAME
from ..train.checkpoint_folder import committed_checkpoints
from ..train.compose import compose_config
from .dataset_commands import console, say
from .report_plot import report_picture
from .report_times import TRAINING_PARTS, AttemptTimes, RunTimes, Spent, duration, read_run_times

REPORT_NAME, PICTURE_NAME = "report.json", "report.png"
SHOWN_ATTEMPTS = 20
SHOWN_SHARE = 0.0005  # of a part of the training; a smaller one is 0.0 %

USAGE = """\
usage: muybridge report run=RUN_DIR [out=FOLDER]

Say what became of a training run, whether it is over or goes on: its attempts and why they ended, steps that had to be done
again, skipped steps, bad clips, and what its time went into. Writes report.json and report.png.

  run=RUN_DIR           directory of a training run
  out=FOLDER            where the files go (default RUN_DIR/report)

Effective time is the share of the wall time, from the first start to the last sign of life, that went into computing steps
which are part of the run. What counts against it: waiting for data, being held up by checkpoints, validation and samples,
set-up (up to the first step), steps that were done again after a restart or a roll-back, and the time between attempts,
which includes the start of the processes. What a killed attempt did after its last sign of life, a row of metrics.jsonl or
a checkpoint, is known to nobody and counts as time between attempts."""


@dataclass
class ReportConfig:
    """Of which run, and where the report goes."""

    run: str = ""
    # Null is RUN_DIR/report.
    out: str | None = None


def main(argv: list[str]) -> int:
    """Print and write the report; returns the exit code. Raises ValueError for a folder that is no run's or cannot be written."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    config: ReportConfig = compose_config(
        argv, config_class=ReportConfig, config_name="report", schema_name="report_schema"
    )
    if not config.run:
        raise ValueError("run=RUN_DIR must be given (see muybridge report --help)")
    run_dir = Path(config.run)
    out = Path(config.out) if config.out else run_dir / "report"
    times = read_run_times(run_dir)
    facts = report_facts(run_dir, times)
    text = json.dumps(_without_nan(facts), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
        report_picture(run_dir.resolve().name, times, out / PICTURE_NAME)
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error.strerror or error}); give another out=FOLDER") from error
    print_report(times, facts, console)
    say(f"Wrote {out / REPORT_NAME} and {PICTURE_NAME} beside it.")
    say(f"Next: look at {out / PICTURE_NAME}")
    return 0


def report_facts(run_dir: Path, times: RunTimes) -> dict[str, Any]:
    """Everything that the report says, as plain numbers; times in seconds."""
    last = times.attempts[-1].attempt
    losses = [row["loss"] for row in times.rows if "loss" in row]
    return {
        "run": str(run_dir),
        "step": max((row.get("step", 0) for row in times.rows), default=0),
        "last_loss": losses[-1] if losses else None,
        "has_ended": last.end is not None,
        "attempts": [_attempt_facts(current) for current in times.attempts],
        "restarts": len(times.attempts) - 1,
        "roll_backs": sum(len(current.attempt.roll_backs) for current in times.attempts),
        "lost_steps": times.lost_steps,
        "skipped_steps": int(sum(row.get("skipped_steps", 0) for row in times.rows)),
        "checkpoints": sum(len(current.attempt.commits) for current in times.attempts),
        "failed_checkpoints": sum(len(current.attempt.failed_saves) for current in times.attempts),
        "bad_clips": _bad_clips(run_dir),
        "wall_seconds": times.wall_seconds,
        "seconds": {spent.name: round(seconds, 3) for spent, seconds in times.seconds.items()},
        "training_seconds": {name: round(seconds, 3) for name, seconds in times.training_parts.items()},
        "effective_share": times.effective_share,
    }


def _without_nan(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _attempt_facts(current: AttemptTimes) -> dict[str, Any]:
    attempt = current.attempt
    return {
        "attempt": attempt.number,
        "begin_unix_seconds": current.begin,
        "seconds": current.end - current.begin,
        "host": attempt.start.get("host"),
        "processes": attempt.start.get("world_size"),
        "start_step": attempt.start_step,
        "furthest_step": current.furthest_step,
        "checkpoints": [commit["step"] for commit in attempt.commits],
        "roll_backs": [
            {name: event[name] for name in ("from_step", "to_step", "cause")} for event in attempt.roll_backs
        ],
        "exit_code": attempt.end["exit_code"] if attempt.end else None,
        "cause": attempt.cause,
    }


def _bad_clips(run_dir: Path) -> int:
    """Different clips that could not be read, as of the newest checkpoint."""
    ledgers = [folder / LEDGER_NAME for folder in committed_checkpoints(run_dir / "checkpoints")]
    try:
        return len(from_lines(ledgers[-1])) if ledgers else 0
    except FileNotFoundError:  # none in it, or the run has removed it since
        return 0


def print_report(times: RunTimes, facts: dict[str, Any], to: Console) -> None:
    """The tables of attempts, times and counts."""
    shown = times.attempts[-SHOWN_ATTEMPTS:]
    to.print(_attempt_table(shown))
    for current in shown:
        name = f"Attempt {current.attempt.number}"
        for event in current.attempt.roll_backs:
            turn = f"went back from step {event['from_step']} to {event['to_step']}"
            to.print(f"{name} {turn}: {event['cause']}", markup=False)
        goes_on = current is shown[-1] and not facts["has_ended"]
        to.print(f"{name}: {'it goes on, or was killed' if goes_on else current.attempt.cause}", markup=False)
    if len(shown) < len(times.attempts):
        to.print(f"The first {len(times.attempts) - len(shown)} attempts are in {REPORT_NAME}.")
    table = Table(title="What the time went into")
    for name in ("", "time", "share"):
        table.add_column(name, justify="right" if name else "left")
    for spent, seconds in times.seconds.items():
        if seconds:
            table.add_row(spent.value, duration(seconds), f"{seconds / times.wall_seconds:.1%}")
        if spent is Spent.training:
            for name, part in times.training_parts.items():
                if part >= SHOWN_SHARE * times.wall_seconds:
                    share = f"{part / times.wall_seconds:.1%}"
                    table.add_row(f"  {TRAINING_PARTS[name]}", duration(part), share, style="dim")
    table.add_section()
    table.add_row("from start to end" if facts["has_ended"] else "so far", duration(times.wall_seconds), "100 %")
    to.print(table)
    to.print(
        f"Step {facts['step']}, effective time {times.effective_share:.1%} (muybridge report --help says what that is)."
    )
    counts = {
        "restarts": facts["restarts"],
        "steps done again": facts["lost_steps"],
        "roll-backs": facts["roll_backs"],
        "skipped steps": facts["skipped_steps"],
        "checkpoints": facts["checkpoints"],
        "failed checkpoints": facts["failed_checkpoints"],
        "bad clips": facts["bad_clips"],
    }
    to.print(", ".join(f"{name}: {count}" for name, count in counts.items()), soft_wrap=True)


def _attempt_table(attempts: Sequence[AttemptTimes]) -> Table:
    table = Table(title="Attempts")
    for name in ("", "began", "lasted", "steps", "checkpoints"):
        table.add_column(name, justify="right", no_wrap=True)
    for current in attempts:
        table.add_row(
            str(current.attempt.number),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(current.begin)),
            duration(current.end - current.begin),
            f"{current.start_step} to {current.furthest_step}" if current.attempt.begin else "none",
            str(len(current.attempt.commits)),
        )
    return table
