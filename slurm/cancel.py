"""`muybridge cancel`: ends a run's jobs for good, by a checkpoint and a stop that all ranks agree on, or at once.

Two marks ask for it: RUN/slurm/cancelled, after which no life begins or comes back, and RUN/STOP, which the life that trains looks
for after every step. `muybridge submit` removes both and goes on from the newest checkpoint. A STOP that nobody is left to heed is
taken away here as well, so that `muybridge train` does not stop at its first step.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..data.captions import printable
from ..scripts.report_times import duration
from ..train.exit_codes import ExitCode
from ..train.outputs import replace_text
from .run_files import RunFiles, is_at_work, read_run_files, run_dirs
from .run_jobs import RUNNING, own_jobs
from .run_status import run_status
from .scheduler import Job, SchedulerAway, cancel

USAGE = """\
usage: muybridge cancel RUN [RUN ...] [--now] [--no-wait]

End the jobs of a run for good. A life that trains finishes its step, writes a checkpoint and ends; jobs that wait are taken out of
the queue at once, those of a chain as well. Waits until all have ended; Ctrl-C ends the waiting, not the cancelling. The same
`muybridge submit` goes on from the checkpoint later.

  RUN                   directory of a run; a sweep's folder means all of its runs
  --now                 end running jobs as well at once: Slurm sends TERM, and KILL half a minute later (KillWait); the trainer
                        still tries to save. For a run that hangs, or a node that is needed
  --no-wait             return as soon as it is asked for

Exit code: 0 they have ended (or were asked to), or there was none; 75 Slurm's controller cannot be reached, try again."""

_POLL_SECONDS = 2.0
_INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """Cancel the runs; returns the exit code. Raises ValueError for a folder that is no run's or a run that has no job."""
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        print(USAGE)
        return 0
    options = {text for text in argv if text.startswith("-")}
    if unknown := sorted(options - {"--now", "--no-wait"}):
        raise ValueError(f"unknown option {unknown[0]} (see muybridge cancel --help)")
    runs = list(dict.fromkeys(run for text in argv if text not in options for run in run_dirs(Path(text))))
    if not runs:
        raise ValueError("RUN must be given (see muybridge cancel --help)")
    files = [read_run_files(run) for run in runs]
    for each in files:
        _refuse_without_jobs(each)
    try:
        asked = [each for each in files if _ask(each, now="--now" in options)]
        if not asked or "--no-wait" in options:
            return 0
        return _wait(asked, now="--now" in options)
    except SchedulerAway as error:
        print(f"muybridge: {error}; what trains stops all the same, call this again for what waits", file=sys.stderr)
        return ExitCode.requeue


def _refuse_without_jobs(files: RunFiles) -> None:
    run = shlex.quote(str(files.run_dir))
    if files.job_ids():
        return
    if files.faults:
        raise ValueError(f"RUN={run}: which jobs it has cannot be known: {'; '.join(files.faults)}")
    hint = (
        f"; an attempt is at work there, which `touch {run}/STOP` stops"
        if is_at_work(files.run_dir, time.time())
        else ""
    )
    raise ValueError(f"RUN={run} was not submitted to Slurm: it has no slurm/job.json{hint}")


def _ask(files: RunFiles, *, now: bool) -> bool:
    """Mark a run as cancelled and take what waits out of the queue; whether there was anything. Raises SchedulerError."""
    folder = files.run_dir
    try:
        jobs = own_jobs(files)
    except SchedulerAway:
        # A life may run: its trainer can be asked without Slurm.
        _mark(folder, stops=True)
        raise
    if not jobs:
        _say(f"{folder}: Slurm has no job of it, nothing was changed.")
        return False
    # The mark first: what is taken away could otherwise be followed by a job that submits itself again.
    _mark(folder, stops=not now and any(job.state in RUNNING for job in jobs))
    ended = _cancel_at_once(jobs, now=now)
    if ended:
        _say(f"{folder}: {_names(ended)} {'was' if len(ended) == 1 else 'were'} cancelled.")
    if left := [job for job in jobs if job not in ended]:
        _say(f"{folder}: {_names(left)} saves and ends after the step it is at.")
    return True


def _mark(run_dir: Path, *, stops: bool) -> None:
    (run_dir / "slurm").mkdir(exist_ok=True)
    replace_text(run_dir / "slurm" / "cancelled", "muybridge cancel\n")
    if stops:
        replace_text(run_dir / "STOP", "")


def _cancel_at_once(jobs: Sequence[Job], *, now: bool) -> list[Job]:
    """Those that wait, or all; by their exact numbers."""
    ended = [job for job in jobs if now or job.state == "PENDING"]
    cancel([job.id for job in ended])
    return ended


def _wait(runs: Sequence[RunFiles], *, now: bool) -> int:
    """Until Slurm has no job of theirs, and cancel what comes back to the queue meanwhile."""
    began = time.monotonic()
    console = Console(highlight=False)
    waiting = list(runs)
    try:
        with console.status("") as line:
            while waiting:
                jobs = {files.run_dir: own_jobs(files) for files in waiting}
                for files in [files for files in waiting if not jobs[files.run_dir]]:
                    waiting.remove(files)
                    _tell_end(files.run_dir, console)
                if not waiting:
                    break
                for files in waiting:
                    _cancel_at_once(jobs[files.run_dir], now=False)
                text = _waiting_words(waiting, jobs, time.monotonic() - began, now=now)
                line.update(text)
                time.sleep(_POLL_SECONDS)
                waiting = [read_run_files(files.run_dir) for files in waiting]
    except KeyboardInterrupt:
        console.print(
            "muybridge: not waiting any longer; what runs saves and ends by itself (muybridge status says when)"
        )
        return _INTERRUPTED
    return 0


def _waiting_words(waiting: Sequence[RunFiles], jobs: dict[Path, list[Job]], seconds: float, *, now: bool) -> str:
    files = waiting[0]
    first = jobs[files.run_dir][0]
    text = f"job {first.id} is {first.state.lower()}, {duration(seconds)} since it was asked"
    if len(waiting) > 1:
        text += f"; {len(waiting)} runs have not ended"
    patience = files.job.lead_seconds if files.job else 0.0
    if not now and seconds > patience:
        text += "; --now ends it at once, should it hang"
    return text


def _tell_end(run_dir: Path, console: Console) -> None:
    """How it ended; and nobody is left who would heed a request to stop."""
    (run_dir / "STOP").unlink(missing_ok=True)
    status = run_status(read_run_files(run_dir), [])
    saved = (
        f"its newest checkpoint is of step {status.checkpoint.step}" if status.checkpoint else "it has no checkpoint"
    )
    _say(f"{run_dir}: ended; {saved}.")
    run = shlex.quote(str(run_dir))
    goes_on = "begins it anew" if status.checkpoint is None else "goes on from there"
    _say(f"Next: the same `muybridge submit` {goes_on}; muybridge status {run}")


def _names(jobs: Sequence[Job]) -> str:
    return f"job{'s' if len(jobs) > 1 else ''} {', '.join(job.id for job in jobs)}"


def _say(text: str) -> None:
    print(printable(text), flush=True)
