"""Ports for processes that are told where to meet before any of them listens there."""

import random
import socket
from pathlib import Path


def unused_port() -> int:
    """A port that nobody listens on, and that nobody gets from the kernel in the time until it is used."""
    # Those that the kernel hands out go to every connection and every `bind` to port 0: of a busy machine one is soon another's.
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    others = [*range(10_000, first), *range(last + 1, 65_536)] or range(first, last + 1)
    while True:
        port = random.SystemRandom().choice(others)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
