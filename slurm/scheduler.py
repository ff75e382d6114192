"""The one place that calls Slurm's programs: sbatch, squeue, scontrol and scancel, by argument lists, never through a shell."""

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# More than the minute in which Slurm's programs give up on a controller themselves.
TIMEOUT_SECONDS = 90.0
# Inside a job or with a user's presets these variables would change what a program does or prints.
_PRESETS = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SRUN_", "SALLOC_")
_AWAY = re.compile(
    r"unable to contact|connection refused|connection timed out|socket timed out|unexpected message|zero bytes were|"
    r"communication (connection|shutdown) failure|no route to host|configuration source|fetch_config|unable to establish|"
    r"temporarily unable|backup controller in standby|munged?\b|protocol authentication error",
    re.IGNORECASE,
)
_UNKNOWN_JOB = re.compile(r"invalid job id|already completing or completed", re.IGNORECASE)
_BEFORE_WORDS = re.compile(r"^\w+: (error|fatal): ")
_JOB_FORMAT = "%i|%T|%r|%M|%N|%j"


class SchedulerError(ValueError):
    """Slurm refused what was asked of it, in its own words, or is not there."""


class SchedulerAway(SchedulerError):
    """Slurm's controller did not answer: the same may work later."""


@dataclass(frozen=True)
class Job:
    """One job, or one task of a job array, as squeue has it."""

    id: str  # 123, or 123_4 for a task of an array
    state: str  # in squeue's long form: PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits; None where it does not
    elapsed: str  # since the start of this life, as squeue prints it
    nodes: str  # n[1-2]; empty while it waits
    name: str

    @property
    def number(self) -> int:
        """The job's number without that of the task."""
        return int(self.id.partition("_")[0])


def clean_environment() -> dict[str, str]:
    """This process's environment without what a job around it or a user's presets would tell Slurm's programs."""
    return {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(_PRESETS)}


def sbatch(arguments: Sequence[str]) -> int:
    """Queue a job with these arguments of sbatch; returns its number. Raises SchedulerError with Slurm's words."""
    answer = _run(["sbatch", "--parsable", *arguments])
    first = answer.strip().partition(";")[0]  # NUMBER;CLUSTER where there are several clusters
    if not first.isdigit():
        raise SchedulerError(f"sbatch must answer with the job's number, and said: {answer.strip()!r}")
    return int(first)


def queued(ids: Iterable[int | str] = (), *, name: str | None = None) -> list[Job]:
    """Jobs of these numbers, or of this name, that wait, run or are just ending; one entry for each task of an array.

    Requeued jobs are among them, finished ones and unknown numbers are not. Raises SchedulerError.
    """
    wanted = [str(job) for job in ids]
    if name is None and not wanted:
        return []
    which = [f"--name={name}"] if name is not None else [f"--jobs={','.join(wanted)}"]
    try:
        answer = _run(["squeue", "--noheader", "--array", f"--format={_JOB_FORMAT}", *which])
    except SchedulerError as error:
        if _UNKNOWN_JOB.search(str(error)):  # which squeue says of one number, and not of several
            return []
        raise
    rows = [line.split("|", 5) for line in answer.splitlines() if line.count("|") >= 5]
    return [Job(*(field.strip() for field in row)) for row in rows]


def job_facts(job_id: int | str) -> dict[str, str] | None:
    """What `scontrol show job` says of a job (of an array its first task): {"JobState": "RUNNING", ...}; None where it is unknown.

    Slurm forgets a job some minutes after its end. Raises SchedulerError.
    """
    try:
        answer = _run(["scontrol", "show", "job", "--oneliner", str(job_id)])
    except SchedulerError as error:
        if _UNKNOWN_JOB.search(str(error)):
            return None
        raise
    lines = answer.splitlines()
    return parse_facts(lines[0]) if lines else None


def parse_facts(line: str) -> dict[str, str]:
    """A line KEY=VALUE KEY=VALUE ... of scontrol, whose values may hold blanks; of a repeated key the first counts."""
    facts: dict[str, str] = {}
    for part in re.split(r"\s+(?=[A-Za-z][\w:/.]*=)", line.strip()):
        key, _, value = part.partition("=")
        facts.setdefault(key, value)
    return facts


def cancel(ids: Iterable[int | str]) -> None:
    """Cancel jobs, or tasks of arrays. Ended jobs stay as they are. Raises SchedulerError."""
    wanted = [str(job) for job in ids]
    if not wanted:
        return
    try:
        _run(["scancel", *wanted])
    except SchedulerError as error:
        if not _UNKNOWN_JOB.search(str(error)):
            raise


def _run(command: list[str]) -> str:
    """What a program prints; raises SchedulerError with what it complains about."""
    program = command[0]
    try:
        done = subprocess.run(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise SchedulerError(
            f"{program} is not on PATH: run this on a machine where Slurm's commands are, such as a login node of the cluster"
        ) from error
    except OSError as error:
        raise SchedulerError(f"{program} cannot be started: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerAway(
            f"{program} did not answer within {TIMEOUT_SECONDS:.0f} s: is Slurm's controller up?"
        ) from error
    if done.returncode == 0:
        return done.stdout
    lines = [_BEFORE_WORDS.sub("", line.strip()) for line in f"{done.stderr}\n{done.stdout}".splitlines()]
    words = "; ".join(filter(None, lines))
    if _AWAY.search(words):
        raise SchedulerAway(f"Slurm's controller cannot be reached: {words}")
    raise SchedulerError(words or f"{program} ended with {done.returncode} and without a word")
