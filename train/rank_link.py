"""A connection of every rank to rank 0, of bare sockets: the kernel tells of the end of a process at once, whatever it was doing,
and messages pass while the ranks wait for each other in a collective or a device does not answer."""

import json
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from .ranks import from_all_ranks, from_rank_0

Message = dict[str, Any]

_JOIN_SECONDS = 60.0
_SEND_SECONDS = 2.0  # a peer that does not read must not stop us
_MOST_BYTES = 1 << 16  # of a message
# Of a machine that is gone the kernel knows after 20 + 4 x 10 seconds of silence.
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 60_000}


class RankLink:
    """Messages of rank 0 to all the others, and of each to rank 0. Only one thread may `poll`."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self._peers = peers
        self._sending = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._waker, awoken = socket.socketpair()
        self._awoken = awoken
        self._selector.register(awoken, selectors.EVENT_READ)
        self._received = dict.fromkeys(peers, b"")
        for rank, peer in peers.items():
            self._selector.register(peer, selectors.EVENT_READ, rank)

    @property
    def ranks(self) -> list[int]:
        """The ranks at the other ends that are still there."""
        return sorted(self._peers)

    def send(self, message: Message) -> None:
        """To rank 0, or from it to all the others; one that cannot get it is found to be gone by `poll`."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:  # whole lines only
            for peer in list(self._peers.values()):
                with suppress(OSError):
                    peer.sendall(line)

    def poll(self, timeout_seconds: float) -> list[tuple[int, Message | None]]:
        """What came, with the rank it is from; None from one whose connection has ended. Waits for at most so long."""
        found: list[tuple[int, Message | None]] = []
        for key, _ in self._selector.select(timeout_seconds):
            if key.data is None:
                self._awoken.recv(1)
                continue
            found += [(key.data, message) for message in self._receive(key.data)]
        return found

    def wake(self) -> None:
        """Ends the wait of `poll`."""
        with suppress(OSError):  # closed
            self._waker.send(b"x")

    def close(self) -> None:
        """Ends all connections."""
        for end in (*self._peers.values(), self._waker, self._awoken):
            end.close()
        self._selector.close()

    def _receive(self, rank: int) -> list[Message | None]:
        try:
            data = self._peers[rank].recv(4096)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        *lines, rest = (self._received[rank] + data).split(b"\n")
        self._received[rank] = rest
        messages: list[Message | None] = []
        for line in lines:
            with suppress(ValueError):  # cut short by a time limit of the sender
                messages.append(json.loads(line))
        if not data or len(rest) > _MOST_BYTES:
            self._selector.unregister(self._peers[rank])
            self._peers.pop(rank).close()
            messages.append(None)
        return messages


def link_ranks() -> tuple[RankLink, dict[int, str]]:
    """This rank's link, and on rank 0 the host names of all ranks. Collective. Raises ConnectionError, on all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    listener: socket.socket | None = None
    offer: tuple[list[str], int, str] = [], 0, ""
    if rank == 0 and (listener := _listen(world)) is not None:
        hosts = dict.fromkeys([os.environ.get("MASTER_ADDR", ""), socket.gethostname(), "127.0.0.1"])
        offer = list(filter(None, hosts)), listener.getsockname()[1], secrets.token_hex(16)
    addresses, port, token = from_rank_0(offer)
    failure = ""
    peers: dict[int, socket.socket] = {}
    if rank:
        try:
            peers = {0: _join(addresses, port)}
            hello = {"token": token, "rank": rank}
            peers[0].sendall(json.dumps(hello).encode() + b"\n")
        except OSError as error:
            failure = f"rank {rank} ({socket.gethostname()}) cannot reach rank 0 at {addresses}, port {port}: {error}"
    # The kernel completes connections that nobody has accepted yet, so all are there once all have told how it went.
    told = from_all_ranks((failure, socket.gethostname()))
    failures = [text for text, _ in told if text]
    if listener is not None:
        if not failures:
            try:
                peers = _accept(listener, world, token)
            except OSError as error:
                failures = [f"rank 0 could not accept all ranks: {error}"]
        listener.close()  # nobody else may come
    if failures := from_rank_0(failures):
        for peer in peers.values():
            peer.close()
        raise ConnectionError("; ".join(failures))
    return RankLink(peers), {number: host for number, (_, host) in enumerate(told)}


def _listen(world: int) -> socket.socket | None:
    waiting = world + 256  # and strangers, who must not keep ours out
    with suppress(OSError, ValueError):
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=waiting)
    with suppress(OSError):
        return socket.create_server(("", 0), backlog=waiting)
    return None


def _join(addresses: list[str], port: int) -> socket.socket:
    problems = []
    for address in addresses:
        try:
            return _kept_alive(socket.create_connection((address, port), timeout=_JOIN_SECONDS / len(addresses)))
        except OSError as error:
            problems.append(f"{address}: {error}")
    raise OSError("; ".join(problems) or "it could not listen")


def _accept(listener: socket.socket, world: int, token: str) -> dict[int, socket.socket]:
    deadline = time.monotonic() + _JOIN_SECONDS
    peers: dict[int, socket.socket] = {}
    while len(peers) < world - 1:
        listener.settimeout(max(0.1, deadline - time.monotonic()))
        peer, _ = listener.accept()
        try:
            peer.settimeout(_SEND_SECONDS)
            hello = json.loads(_line(peer))
            if hello["token"] != token:
                raise ValueError("not one of ours")
            peers[int(hello["rank"])] = _kept_alive(peer)
        except (OSError, ValueError, KeyError, TypeError):
            peer.close()  # a stranger
    return peers


def _line(peer: socket.socket) -> bytes:
    # Byte by byte: what comes behind the line belongs to the link.
    line = b""
    while not line.endswith(b"\n") and len(line) < 1000:
        byte = peer.recv(1)
        if not byte:
            break
        line += byte
    return line


def _kept_alive(peer: socket.socket) -> socket.socket:
    peer.settimeout(_SEND_SECONDS)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
