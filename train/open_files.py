"""How many files and connections a process may have."""

import resource
from contextlib import suppress


def allow_open_files() -> None:
    """Let this process have as many files and connections as the system allows: every rank is connected with every other one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where "without a limit" is more than the system has
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
