"""Keeps an encoder's wish for real-time priority from all that a test process does and starts afterwards."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def usual_priority() -> Iterator[None]:
    """Puts the thread's scheduling back: SVT-AV1, run as root, makes it SCHED_FIFO 99, and children inherit that.

    Ranks that wait for each other in busy loops then leave no processor to anybody else, and the machine seems to hang.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)
