"""What the exit code of a run tells its scheduler, and the way out of a process."""

import os
import sys
from enum import IntEnum
from typing import NoReturn


class ExitCode(IntEnum):
    """Codes that no shell or signal uses; sysexits.h where it has a fitting one."""

    done = 0
    failed = 1  # a fault of the program, with a traceback
    config = 64  # wrong settings or data: the same again would fail the same way
    requeue = 75  # stopped on request, or a passing fault: the same command goes on from the last checkpoint
    data_budget = 76  # more clips than data.max_bad_share could not be read
    diverged = 77
    out_of_memory = 78
    no_progress = 93  # several attempts in a row ended without a new checkpoint


def exit_process(code: int, *, alone: bool = False) -> NoReturn:
    """Leave at once: gloo's worker threads can abort a process that finalises Python after its work is done.

    Ranks wait for each other only where all of them come here together, done or for an agreed stop, and not `alone`.
    """
    import torch.distributed as dist  # the codes are also for commands that start without it

    if dist.is_initialized() and code in (ExitCode.done, ExitCode.requeue) and not alone:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
