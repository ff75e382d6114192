"""`muybridge submit`: check a run's settings, keep what it is made of in its directory, and queue it as a job of Slurm."""

import json
import os
import re
import shlex
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..redaction import redact_output
from ..scripts.dataset_commands import console, say
from ..train.exit_codes import ExitCode
from . import scheduler
from .config import SlurmConfig
from .placing import Placement
from .plan import Plan, build_plan
from .run_checks import refuse_busy
from .run_jobs import reason_words
from .snapshot import copies_of_code, place_submission

USAGE = """\
usage: muybridge submit +experiment=NAME [KEY=VALUE ...] [slurm.KEY=VALUE ...] [--dry-run]
       muybridge submit --multirun +experiment=NAME KEY=VALUE,VALUE ... [slurm.KEY=VALUE ...]

Queue a training run as a job of Slurm, on as many nodes as it takes. Settings, inputs and the run directory are checked before
anything is written or queued; a job that Slurm would never start is taken back.
The job saves and goes on by itself after a time limit, a preemption or a fault of a node, until the run is done. Submit a run again
with the same run_dir to go on with it.

  muybridge submit +experiment=wan_14b_480p slurm.nodes=8 slurm.time=24:00:00 slurm.partition=gpu
  muybridge submit +experiment=wan_1_3b_lora slurm.gpus_per_node=4 --dry-run    print the sbatch command and the script, do nothing
  muybridge submit --multirun +experiment=wan_1_3b_lora optimizer.lr=1e-4,2e-4 seed=range(3) slurm.parallel=2
                                                      every combination, as one job array, in folders below run_dir

  slurm.nodes, slurm.gpus_per_node, slurm.processes_per_node     how large (1 node, 8 GPUs, a process for each GPU)
  slurm.cpus_per_process, slurm.memory, slurm.exclusive          the rest of a node
  slurm.time, slurm.lead_seconds                                 time limit of a life of the job, and how long before it saves
  slurm.partition, account, qos, constraint, reservation         where
  slurm.exclude, slurm.after, slurm.chain, slurm.requeue         nodes to do without; a job that must end well first;
                                                              several jobs in a row
  slurm.options=['--gres=nvme:1']                                any other option of sbatch
  slurm.template=FILE                                            your own copy of the batch script
  slurm.name, python, snapshot_code, health, stage_to            see slurm/config.py

A site's settings stand in ~/.config/muybridge/slurm.yaml, or in the file that MUYBRIDGE_SLURM_SITE names, without `slurm.`:
partition: gpu and so on, a line each. The command line goes before them.

RUN_DIR/slurm keeps the settings, the code as it is now, `git diff`, versions and the log. The job has the environment that submit
has, as always with sbatch: a WANDB_API_KEY there, or `wandb login`, is how it gets a key. Nothing secret is written to a file of
ours, but Slurm's controller keeps a job's environment as long as the job.

Exit code: 0 queued; 64 a mistake, or Slurm refused, and nothing is queued; 75 Slurm's controller cannot be reached, try again."""

# Why a job waits that no other job's end will let start; Slurm takes such a job unless the site has set EnforcePartLimits.
_NEVER = (
    "PartitionConfig",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "BadConstraints",
    "InvalidAccount",
    "InvalidQOS",
    "DependencyNeverSatisfied",
)
_ENDED_BADLY = ("CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE", "REVOKED")
_SIZES = (
    "nodes",
    "gpus_per_node",
    "processes_per_node",
    "cpus_per_process",
    "memory",
    "constraint",
    "partition",
    "exclude",
)
# Which settings Slurm's words may be about; the first that fits counts.
_FIELDS_OF_WORDS: dict[str, tuple[str, ...]] = {
    "PartitionTimeLimit": ("time", "partition"),
    "PartitionConfig|PartitionNodeLimit|BadConstraints": _SIZES,
    "partition": ("partition", "nodes", "time"),
    "account": ("account", "partition", "qos"),
    "qos": ("qos", "account"),
    "time limit": ("time", "partition"),
    "reservation": ("reservation",),
    "feature|constraint": ("constraint",),
    "node count": ("nodes", "partition"),
    "memory": ("memory",),
    "node configuration|cpu count|gres|exceed": (*_SIZES, "options"),
    "node name": ("exclude", "options"),
    "dependency": ("after",),
    "array": ("parallel",),
    "option": ("options",),
}
# What an earlier job left, or `muybridge cancel` of one that ended before it heeded that, and would stop this one.
_STALE = ("slurm/cancelled", "slurm/gave_up", "slurm/fruitless", "slurm/bad_lives", "STOP")


def main(argv: list[str]) -> int:
    """Queue a run or a sweep; returns the exit code. Raises ValueError for mistakes and for what Slurm refuses."""
    redact_output()
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        print(USAGE)
        return 0
    flags = [argument for argument in argv if argument.startswith("-")]
    if unknown := [flag for flag in flags if flag not in ("--dry-run", "--multirun", "-m")]:
        raise ValueError(f"unknown option {unknown[0]} (see muybridge submit --help)")
    overrides = [argument for argument in argv if not argument.startswith("-")]
    is_sweep = "--multirun" in flags or "-m" in flags
    plan = build_plan(overrides, multirun=is_sweep, dry_run="--dry-run" in flags)
    for warning in plan.warnings:
        print(f"muybridge: {warning}", file=sys.stderr)
    if "--dry-run" in flags or plan.runs[0].config.dry_run:
        return _show(plan)
    if shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch is not on PATH: run this on a login node of the cluster, or add --dry-run to see what would be submitted"
        )
    advice = "nothing was queued, try again later"
    try:
        if plan.slurm.after is not None:
            _refuse_dead_end(plan.slurm.after)
        # Before it is asked whether jobs use them: what another submission puts there at this moment must stay.
        copies = copies_of_code(plan.submit_dir)
        refuse_busy(plan.submit_dir, [run.run_dir for run in plan.runs])
        advice = f"`squeue --name={plan.job_name}` says whether Slurm took the job nevertheless; where it did not, submit again"
        jobs = submit(plan)
        _remove_unused(copies, plan)
    except scheduler.SchedulerAway as error:
        print(f"muybridge: {error}; {advice}", file=sys.stderr)
        return ExitCode.requeue
    _report(plan, jobs)
    return 0


def _refuse_dead_end(job: str) -> None:
    """Raises ValueError where a job that has to end well first can no longer do so."""
    facts = scheduler.job_facts(job)
    if facts is None:
        raise ValueError(
            f"slurm.after={job} must be a job that Slurm knows; it forgets jobs some minutes after their end"
        )
    if (state := facts.get("JobState", "")) in _ENDED_BADLY:
        raise ValueError(f"slurm.after={job} must be a job that can still end well, and it ended: {state}")


def submit(plan: Plan) -> list[int]:
    """Put the files in place and queue the job, or the jobs of a chain; returns their numbers.

    Raises ValueError where a file cannot be written and SchedulerError where Slurm refuses; all is as it was then.
    """
    placement = Placement()
    jobs: list[int] = []
    try:
        records = place_submission(plan, placement)
        for run in plan.runs:
            for name in _STALE:
                placement.remove(run.run_dir / name)
        while len(jobs) < plan.slurm.chain:
            jobs.append(scheduler.sbatch(plan.sbatch_arguments(previous=jobs[-1] if jobs else None)))
        _refuse_to_wait_for_ever(jobs[0])
        _place_job_facts(plan, jobs, records, placement)
    except BaseException as error:
        placement.undo()
        after = _take_back(jobs)
        if isinstance(error, OSError):
            raise ValueError(
                f"run_dir={plan.submit_dir} cannot be written ({error.strerror or error}): nothing is queued{after}"
            ) from error
        if isinstance(error, KeyboardInterrupt):
            print(
                f"muybridge: interrupted, and the files are as they were{after}; `squeue --name={plan.job_name}` says whether "
                "Slurm took a job nevertheless, which is one for scancel",
                file=sys.stderr,
            )
        if isinstance(error, scheduler.SchedulerAway):
            raise scheduler.SchedulerAway(f"{error}{after}") from error
        if isinstance(error, scheduler.SchedulerError):
            raise scheduler.SchedulerError(
                f"Slurm does not take the job: {error}{_about(str(error), plan.slurm)}{after}"
            ) from error
        raise
    placement.keep()
    return jobs


def _remove_unused(copies: list[Path], plan: Plan) -> None:
    """Remove copies of the code that were there before and that no job can use: those queued here now read `command` first."""
    fields = (plan.runs[0].run_dir / "slurm" / "command").read_bytes().split(b"\0")
    for copy in copies:
        if os.fsencode(copy) != fields[2]:
            shutil.rmtree(copy, ignore_errors=True)


def _refuse_to_wait_for_ever(job: int) -> None:
    """Raises SchedulerError where the job that was queued can never start."""
    reasons: set[str] = set()
    with suppress(scheduler.SchedulerError):  # it is queued, and `muybridge status` will say so
        reasons = {task.reason for task in scheduler.queued([job])}
    if never := reasons.intersection(_NEVER):
        reason = never.pop()
        raise scheduler.SchedulerError(f"it would wait for ever, for {reason}: {reason_words(reason)}")


def _about(words: str, slurm: SlurmConfig) -> str:
    """The settings that Slurm's words are about."""
    found = next((names for part, names in _FIELDS_OF_WORDS.items() if re.search(part, words, re.IGNORECASE)), ())
    values = [f"slurm.{name}={value}" for name in found if (value := getattr(slurm, name)) not in (None, [])]
    return f" ({', '.join(values)})" if values else ""


def _take_back(jobs: list[int]) -> str:
    """Cancel what was queued before something failed; returns what to say of it."""
    numbers = ", ".join(map(str, jobs))
    if not jobs:
        return ""
    try:
        scheduler.cancel(jobs)
    except scheduler.SchedulerError as failure:
        return f"; job {numbers} was queued before and could not be cancelled ({failure}): scancel {' '.join(map(str, jobs))}"
    return f"; job {numbers}, which was queued before, was cancelled"


def _place_job_facts(plan: Plan, jobs: list[int], records: list[Path], placement: Placement) -> None:
    """Write which jobs the runs are to RUN_DIR/slurm/job.json, and beside each run's record of this submission."""
    for index, (run, record) in enumerate(zip(plan.runs, records)):
        facts = {
            "jobs": jobs,
            "array_index": index if plan.is_sweep else None,
            "name": plan.job_name,
            "submit_dir": str(plan.submit_dir),
            "submitted_unix_seconds": round(time.time(), 3),
            "nodes": plan.slurm.nodes,
            "processes": plan.slurm.processes,
            "lead_seconds": plan.slurm.lead_seconds,
        }
        content = (json.dumps(facts, indent=1) + "\n").encode()
        placement.write(record / "job.json", content)
        placement.write(run.run_dir / "slurm" / "job.json", content)


def _show(plan: Plan) -> int:
    """What would be queued, as a command line and a script."""
    print(shlex.join(["sbatch", "--parsable", *plan.sbatch_arguments()]))
    print(plan.script, end="")
    for missing in plan.still_needed:
        print(f"muybridge: still needed: {missing}", file=sys.stderr)
    for index, run in enumerate(plan.runs if plan.is_sweep else []):
        print(f"muybridge: task {index} is {' '.join(run.chosen)} in {run.run_dir}", file=sys.stderr)
    if plan.slurm.chain > 1:
        print(f"muybridge: {plan.slurm.chain} such jobs, each after the one before", file=sys.stderr)
    print("muybridge: the settings are valid; nothing was written or queued", file=sys.stderr)
    return 0


def _report(plan: Plan, jobs: list[int]) -> None:
    if plan.is_sweep:
        table = Table("task")
        table.add_column("run directory", overflow="fold")
        table.add_column("settings", overflow="fold")
        for index, run in enumerate(plan.runs):
            table.add_row(str(index), Text(run.run_dir.name), Text(" ".join(run.chosen)))
        console.print(table)
    what = f"{plan.slurm.nodes} x {plan.slurm.tasks_per_node} processes"
    which = f"jobs {', '.join(map(str, jobs))}, one after the other," if len(jobs) > 1 else f"job {jobs[0]}"
    runs = f"{len(plan.runs)} runs of {what}" if plan.is_sweep else what
    say(f"Queued {which} as {plan.job_name}: {runs}.")
    say(f"{'Folder of the runs' if plan.is_sweep else 'Run directory'}: {plan.submit_dir}")
    shown = shlex.quote(str(plan.submit_dir))
    log = shlex.quote(str(plan.submit_dir / "slurm" / f"log-{jobs[0]}{'_0' if plan.is_sweep else ''}.txt"))
    say(f"Next: muybridge status {shown}\n      tail -F {log}\n      muybridge cancel {shown}")
