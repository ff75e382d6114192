"""Starts of processes that work for a run and end with it, whatever is sent to all processes of a job."""

import signal
import subprocess
from typing import Any

# A terminal's and a scheduler's: they are for the training process, which saves, and then closes the stdin of the others.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def start_undisturbed(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    """A process of `command`, as by `subprocess.Popen`, which the signals to a job do not reach; SIGKILL ends it."""
    # A child inherits what is blocked, so there is no moment in its start at which one could end it.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        return subprocess.Popen(command, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
