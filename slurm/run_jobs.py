"""The jobs of a run that Slurm has in its queue, and what their states mean in words."""

from collections.abc import Sequence
from pathlib import Path

from .run_files import RunFiles
from .scheduler import Job, job_facts, queued

RUNNING = ("RUNNING", "CONFIGURING", "SUSPENDED", "SIGNALING", "STOPPED", "STAGE_OUT", "RESIZING")
_REASONS = {
    "None": "it was only just queued",
    "Resources": "not enough nodes are free",
    "Priority": "jobs of higher priority are before it",
    "Dependency": "the job before it must end first",
    "DependencyNeverSatisfied": "the job it depends on can no longer end as asked; cancel it and submit again",
    "BeginTime": "its time has not come; a requeued job waits about two minutes",
    "JobHeldUser": "it is held; `scontrol release` lets it go on",
    "JobHeldAdmin": "an administrator holds it",
    "JobLaunchFailure": "its last start failed",
    "launch failed requeued held": "its last start failed and Slurm holds it; once the node is well, `scontrol release`",
    "job requeued in held state": "it was requeued and is held; `scontrol release` lets it go on",
    "JobArrayTaskLimit": "as many runs of its sweep go on as slurm.parallel allows",
    "PartitionTimeLimit": "it asks for more time than its partition allows, and will never start; set slurm.time",
    "PartitionNodeLimit": "it asks for more nodes than its partition has or allows; set slurm.nodes",
    "PartitionConfig": "its partition has not so many nodes with as many GPUs, CPUs and memory as it asks for, and it will never "
    "start; look at slurm.nodes, slurm.gpus_per_node, slurm.cpus_per_process and slurm.memory",
    "PartitionDown": "its partition takes jobs but starts none at present",
    "PartitionInactive": "its partition is closed at present",
    "BadConstraints": "no node can ever be what it asks for; look at slurm.constraint and slurm.gpus_per_node",
    "NodeDown": "a node that it needs is down",
    "Reservation": "its reservation has not begun",
    "Cleaning": "its last life is being cleaned up",
    "Licenses": "it waits for a licence",
    "InvalidAccount": "its account is not valid; set slurm.account",
    "InvalidQOS": "its QOS is not valid; set slurm.qos",
}
_STATES = {
    "RUNNING": "running",
    "CONFIGURING": "its nodes are starting up",
    "COMPLETING": "ending",
    "SUSPENDED": "suspended",
    "STOPPED": "stopped in place",
    "STAGE_OUT": "ending",
}


def queued_jobs(runs: Sequence[RunFiles]) -> list[list[Job]]:
    """Of each run the jobs that wait, run or are just ending, by the numbers that its files know; asks Slurm once.

    Raises SchedulerError.
    """
    jobs = queued(sorted(set().union(*(files.job_ids() for files in runs))))
    return [[job for job in jobs if is_known(files, job)] for files in runs]


def own_jobs(files: RunFiles) -> list[Job]:
    """Every job of the run that Slurm has, fit to be cancelled: also those whose numbers its files do not have yet.

    Such is one that submits itself again at this moment. Where the name does not prove that a job is the run's, its batch script
    does. Raises SchedulerError.
    """
    jobs = queued_jobs([files])[0]
    if files.job is None:
        return [job for job in jobs if _runs_script(job, files.run_dir)]
    known = {job.id for job in jobs}
    others = [job for job in queued(name=files.job.name) if job.id not in known and _has_index(files, job)]
    return jobs + [job for job in others if _runs_script(job, files.job.submit_dir)]


def _runs_script(job: Job, submit_dir: Path) -> bool:
    script = str(submit_dir.absolute() / "slurm" / "train.sbatch")
    return (job_facts(job.id) or {}).get("Command", "") == script


def is_known(files: RunFiles, job: Job) -> bool:
    """Whether the run's files have a job's number, and its name: in a cluster that was set up anew, numbers begin again.

    Of a sweep's array, only its own task is a run's.
    """
    has_name = files.job is None or files.job.name == job.name
    return has_name and job.number in files.job_ids() and _has_index(files, job)


def _has_index(files: RunFiles, job: Job) -> bool:
    index = files.job.array_index if files.job else None
    return job.id.partition("_")[2] == ("" if index is None else str(index))


def state_words(job: Job, *, has_run: bool) -> str:
    """What a job does, and why it waits; `has_run` where this is not its first life."""
    if job.state != "PENDING":
        return _STATES.get(job.state, job.state.lower().replace("_", " "))
    return f"{'back in the queue' if has_run else 'waiting in the queue'}: {reason_words(job.reason)}"


def reason_words(reason: str) -> str:
    """Why a job waits, from squeue's word for it; an unknown one stays as it is."""
    word = reason.partition(",")[0].strip("() ")
    if word.startswith(("QOS", "Assoc", "MaxGRES", "MaxCpu", "MaxMem")):
        return f"a limit of its QOS or account is used up ({word})"
    if word.startswith("ReqNodeNotAvail"):
        return f"a node that it asks for is down, drained or reserved ({reason.strip('()')})"
    return _REASONS.get(word, word)
