"""A pool of decoding processes that survives what a decoder may do: crash, hang, or eat all memory.

Each process runs `worker.py` and is driven by one thread. A process that dies or exceeds its time is replaced, and costs the
one request it was working on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .decode import DecodeError
from .worker import LENGTHS, packed_header

T = TypeVar("T")

_COMMAND = [sys.executable, "-m", "muybridge.data.worker"]
_START_SECONDS = 120.0  # on top of a request's time: a cold file system can take long to load the libraries


class WorkerDied(DecodeError):
    """The decoding process crashed or was stopped for taking too long."""


class WorkerProcess:
    """One decoding process. Started at the first call, and again after a death."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def call(
        self, operation: str, arguments: dict[str, Any], *, timeout_seconds: float, data: bytes | None = None
    ) -> tuple[dict[str, Any], bytearray]:
        """Runs one of `worker.OPERATIONS`, with `data` as its argument of this name; returns its result and payload.

        Raises DecodeError if the data are at fault (WorkerDied where the process did not survive them), else RuntimeError.
        """
        deadline = time.monotonic() + timeout_seconds
        if self._process is None:
            self._process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)  # a process that does not read must not stop us
            deadline += _START_SECONDS
        request = {
            "operation": operation,
            "arguments": arguments,
            "timeout_seconds": timeout_seconds,
            "has_data": data is not None,
        }
        try:
            self._write(packed_header(request, len(data or b"")), deadline)
            self._write(data or b"", deadline)
            header_bytes, payload_bytes = LENGTHS.unpack(self._read(LENGTHS.size, deadline))
            answer = json.loads(self._read(header_bytes, deadline))
            payload = self._read(payload_bytes, deadline)
        except TimeoutError:
            self.kill()
            raise WorkerDied(f"decoding took longer than {timeout_seconds:g} s") from None
        except (EOFError, BrokenPipeError):
            raise WorkerDied(f"the decoder crashed ({self.kill()})") from None
        if "unreadable" in answer:
            raise DecodeError(answer["unreadable"])
        if "error" in answer:
            raise RuntimeError(f"decoding process, {operation}: {answer['error']}")
        return answer["result"], payload

    def kill(self) -> str:
        """Ends the process at once; says how it ended."""
        if self._process is None:
            return "not started"
        self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process = None
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _write(self, data: bytes, deadline: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pipe = self._process.stdin
        poll = select.poll()
        poll.register(pipe, select.POLLOUT)
        left = memoryview(data)
        while left:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            left = left[pipe.write(left) or 0 :]

    def _read(self, size: int, deadline: float) -> bytearray:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout
        buffer = bytearray(size)
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        filled = 0
        while filled < size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            count = pipe.readinto(memoryview(buffer)[filled:])  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            filled += count
        return buffer


class WorkerPool:
    """`count` decoding processes that take requests in the order they come."""

    def __init__(self, count: int, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._local = threading.local()
        self._lock = threading.Lock()
        self._processes: list[WorkerProcess] = []
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="decode")

    def submit(self, operation: str, **arguments: Any) -> Future[tuple[dict[str, Any], bytearray]]:
        """The future result of `WorkerProcess.call`."""
        return self._executor.submit(self.call, operation, **arguments)

    def run(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Runs a function of ours in a thread of the pool, where it may use `call` repeatedly."""
        return self._executor.submit(function, *arguments)

    def call(self, operation: str, *, data: bytes | None = None, **arguments: Any) -> tuple[dict[str, Any], bytearray]:
        """Runs a request in the process of the calling thread, which must be one of the pool's."""
        process = getattr(self._local, "process", None)
        if process is None:
            process = self._local.process = WorkerProcess()
            with self._lock:
                self._processes.append(process)
        return process.call(operation, arguments, timeout_seconds=self._timeout_seconds, data=data)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what is waiting, lets each process finish its request, and ends them."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.kill()
