"""One life of a Slurm job: the folder through which its batch script and the trainer talk.

Exit codes do not get through every launcher, and a signal to a job step hits all its processes. So the script asks by a file, and
rank 0 answers by one. Without the variable that names the folder there is no scheduler to talk to, and nothing here does anything.

    stop        the script asks for a checkpoint and the end, and starts the job again afterwards
    ended       how the attempt ended, a line each: exit code, who asked for the end, cause
    bad_nodes   machines that failed a test: name, tab, reason
"""

import logging
import os
import socket
from enum import StrEnum
from pathlib import Path

FOLDER_VARIABLE = "MUYBRIDGE_LIFE_DIR"
# Between the warning of an end and the end.
LEAD_VARIABLE = "MUYBRIDGE_STOP_LEAD_SECONDS"
# What a node is called by Slurm, which need not be its host name.
NODE_VARIABLE = "SLURMD_NODENAME"

_log = logging.getLogger(__name__)


class Asked(StrEnum):
    """Who wanted an attempt to end."""

    user = "user"  # who does not want it back
    scheduler = "scheduler"  # which gives it another life
    nobody = "nobody"


def life_name() -> str:
    """Job and restart count, such as 123.0; "" outside of a Slurm job."""
    folder = _folder()
    return folder.name if folder else ""


def is_later_life_of_the_same_job(life: str, before: str) -> bool:
    """Whether Slurm has ended `before`, or given up on its nodes, to begin `life`."""
    job, _, count = life.rpartition(".")
    job_before, _, count_before = before.rpartition(".")
    are_numbers = count.isdecimal() and count_before.isdecimal()
    return bool(job) and job == job_before and are_numbers and int(count) > int(count_before)


def stop_file() -> Path | None:
    """The file by which the batch script asks for the end; None outside of a Slurm job."""
    folder = _folder()
    return folder / "stop" if folder else None


def lead_seconds() -> float | None:
    """What Slurm leaves a run between its warning and the end; None where nobody says."""
    text = os.environ.get(LEAD_VARIABLE, "")
    return float(text) if text.isdecimal() and int(text) > 0 else None


def tell_end(code: int, asked: Asked, cause: str) -> None:
    """Let the batch script know how the attempt ended.

    For rank 0 or, of what all ranks find before they can talk, for each. When one ends, a launcher asks the others to end: that is
    not why, and does not take the place of a cause.
    """
    folder = _folder()
    if folder is None:
        return
    path = folder / "ended"
    staging = path.with_name(f"ended.{socket.gethostname()}-{os.getpid()}")
    try:
        if asked is not Asked.nobody and path.exists():
            return
        staging.write_text(f"{int(code)}\n{asked}\n{' '.join(cause.split())}\n", encoding="utf-8")
        staging.replace(path)
    except OSError as error:  # the script then takes it for a crash, and starts the run again
        _log.warning("muybridge: %s cannot be told how the run ended: %s", folder, error)


def tell_bad_node(reason: str) -> None:
    """Name the machine that this process runs on as one that the next life should not have. For any rank."""
    folder = _folder()
    if folder is None:
        return
    node = os.environ.get(NODE_VARIABLE) or socket.gethostname()
    try:
        with (folder / "bad_nodes").open("a", encoding="utf-8") as file:
            file.write(f"{node}\t{' '.join(reason.split())}\n")
    except OSError as error:
        _log.warning("muybridge: %s cannot be told of a bad node: %s", folder, error)


def _folder() -> Path | None:
    text = os.environ.get(FOLDER_VARIABLE, "")
    return Path(text) if text else None
