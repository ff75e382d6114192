"""`muybridge status`: how runs stand, whether they wait in Slurm's queue, train or are over, and what there is to do."""

import json
import shlex
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from .run_files import read_run_files, run_dirs
from .run_jobs import queued_jobs
from .run_status import QueuedJob, RunStatus, queued_job, run_status
from .scheduler import SchedulerError, job_facts
from .status_view import next_steps, print_status, print_table

USAGE = """\
usage: muybridge status RUN [RUN ...] [--json]

Say how a training run stands: what Slurm does with it and why, how far it is and when it will be done, its lives so far and why
they ended, its newest checkpoint, and what to do next. Changes nothing, and works for a run without Slurm as well.

  RUN                   directory of a run; a sweep's folder or a folder of runs gives a table of its runs
  --json                print everything as one JSON object, {"runs": [...]}, times in seconds since 1970

  watch -n 30 muybridge status RUN          look again every half a minute
  muybridge report run=RUN                  where the time of a run went, with a picture"""


def main(argv: list[str]) -> int:
    """Print how the runs stand; returns the exit code. Raises ValueError for a folder that is no run's."""
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        print(USAGE)
        return 0
    if unknown := [text for text in argv if text.startswith("-") and text != "--json"]:
        raise ValueError(f"unknown option {unknown[0]} (see muybridge status --help)")
    folders = [Path(text) for text in argv if not text.startswith("-")]
    if not folders:
        raise ValueError("RUN must be given (see muybridge status --help)")
    runs = list(dict.fromkeys(run for folder in folders for run in run_dirs(folder)))
    as_json = "--json" in argv
    console = Console(highlight=False, stderr=as_json)
    with console.status("asking Slurm"):
        found = read_statuses(runs, with_limits=as_json or len(runs) == 1)
    if as_json:
        print(json.dumps({"runs": [asdict(status) for status in found]}, indent=1, allow_nan=False))
    elif len(found) == 1:
        print_status(found[0], console)
    else:
        print_table(found, console)
        states = Counter(status.state.replace("_", " ") for status in found)
        console.print(f"{len(found)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}")
        console.print(
            f"Next: muybridge status {shlex.quote(found[0].run)} says all about one", markup=False, soft_wrap=True
        )
    return 0


def read_statuses(runs: list[Path], *, with_limits: bool) -> list[RunStatus]:
    """Of each run its status; Slurm is asked once for the jobs of all, and `with_limits` once more for each job."""
    files = [read_run_files(run) for run in runs]
    fault = ""
    jobs: list[list[QueuedJob]] = [[] for _ in files]
    try:
        for number, found in enumerate(queued_jobs(files)):
            has_run = bool(files[number].lives)
            jobs[number] = [
                queued_job(job, job_facts(job.id) if with_limits else None, has_run=has_run) for job in found
            ]
    except SchedulerError as error:
        fault = str(error)
    now = time.time()
    statuses = [
        run_status(each, own, slurm_fault=fault if each.job_ids() else "", now=now) for each, own in zip(files, jobs)
    ]
    for status in statuses:
        status.next = next_steps(status)
    return statuses
