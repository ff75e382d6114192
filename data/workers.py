"""A pool of decoding processes that survives what a decoder may do: crash, hang, or eat all memory.

Each process runs `worker.py` and is driven by one thread. A process that dies or exceeds its time or memory is replaced, and costs
at most the one request it was working on: none that a fresh process can answer, unless time ran out.
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

from ..redaction import environment_without_secrets
from .child_process import start_undisturbed
from .decode import DecodeError
from .frame_ring import FrameRing, Spot
from .worker import LENGTHS, packed_header

T = TypeVar("T")

# Decoders leak, PyAV 0.3 kB a clip and decord 0.2 (benchmarks/results/loader_memory_cpu.json): in so many requests a process grows
# by less than 2 %, and its start costs as much as a few dozen small clips.
REQUESTS_PER_PROCESS = 2500
_COMMAND = [sys.executable, "-m", "muybridge.data.worker"]
_START_SECONDS = 120.0  # a cold file system can take long to load the libraries
_KEPT_HEAP_BYTES = 64 * 2**20
_ENVIRONMENT = {
    # The processes are what runs at the same time; threads of theirs would only be in each other's way.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # A decoded clip's frames lie where the last one's lay, instead of in fresh pages that the kernel must zero: 4 % of the time.
    "MALLOC_MMAP_THRESHOLD_": str(_KEPT_HEAP_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_HEAP_BYTES),
}


class WorkerDied(DecodeError):
    """The decoding process took too long, or a fresh one crashed or needed too much memory."""


class WorkerProcess:
    """One decoding process. Started at the first call, and again after a death or `requests_per_process` requests."""

    def __init__(self, *, ring: FrameRing | None = None, requests_per_process: int = REQUESTS_PER_PROCESS) -> None:
        self.crashes = self.timeouts = self.recycled = 0
        self._ring = ring
        self._requests_per_process = requests_per_process
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._requests = 0

    @property
    def pid(self) -> int | None:
        """The process's number, None where it does not run."""
        return self._process.pid if self._process is not None else None

    def call(
        self,
        operation: str,
        arguments: dict[str, Any],
        *,
        timeout_seconds: float,
        data: bytes | None = None,
        out: Spot | None = None,
    ) -> tuple[dict[str, Any], bytearray]:
        """Runs one of `worker.OPERATIONS`, with `data` as its argument of this name; returns its result and payload.

        What comes of a request must not depend on what the process did before: a heap in pieces, memory that another file damaged,
        or a machine that was short of memory is no fault of these data. So where a process that answered others crashes or runs out
        of memory, a fresh one does the request again. Too little time is no such case: the request would take it twice.

        An operation with an argument `out` writes its frames to that spot of the ring. After an error there is anything, but nobody
        writes there any more. Raises DecodeError if the data are at fault (WorkerDied where the process did not survive them),
        else RuntimeError.
        """
        request = {
            "operation": operation,
            "arguments": arguments,
            "timeout_seconds": timeout_seconds,
            "has_data": data is not None,
            "out": self._located(out),
        }
        while True:
            self._make_ready()
            is_fresh = self._requests == 0
            answer, payload = self._exchange(request, data or b"", timeout_seconds)
            if answer.get("is_short_of_memory") and not is_fresh:
                self.crashes += 1
                self.kill()
            elif is_fresh or "died" not in answer:
                break
        if "died" in answer:
            raise WorkerDied(answer["died"])
        self._requests += 1
        if self._requests >= self._requests_per_process:
            self.recycled += 1
            self.kill()
            self._start()  # it loads while nobody waits for it
        if "unreadable" in answer:
            raise DecodeError(answer["unreadable"])
        if "error" in answer:
            raise RuntimeError(f"decoding process, {operation}: {answer['error']}")
        return answer["result"], payload

    def _exchange(
        self, request: dict[str, Any], data: bytes, timeout_seconds: float
    ) -> tuple[dict[str, Any], bytearray]:
        # The answer and payload of the process, {"died": why} where there is none; counts what went wrong.
        deadline = time.monotonic() + timeout_seconds
        try:
            self._write(packed_header(request, len(data)), deadline)
            self._write(data, deadline)
            answer, payload = self._read_message(deadline)
        except TimeoutError:
            self.timeouts += 1
            self.kill()
            raise WorkerDied(f"decoding took longer than {timeout_seconds:g} s") from None
        except (EOFError, BrokenPipeError):
            self.crashes += 1
            return {"died": f"the decoder crashed ({self.kill()})"}, bytearray()
        if "exhausted" in answer:
            self.crashes += 1
            self.kill()
            return {"died": answer["exhausted"]}, bytearray()
        return answer, payload

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

    def _start(self) -> None:
        ring_file = () if self._ring is None else (self._ring.file,)
        self._process = start_undisturbed(
            [*_COMMAND, *map(str, ring_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=ring_file,  # and no other file of ours: a pipe that a neighbour holds open would never end
            # What a damaged or malicious file makes of a decoder must find no keys there.
            env={**environment_without_secrets(), **_ENVIRONMENT},
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # a process that does not read must not stop us
        self._is_ready = False
        self._requests = 0

    def _make_ready(self) -> None:
        if self._process is None:
            self._start()
        if self._is_ready:
            return
        try:
            self._read_message(time.monotonic() + _START_SECONDS)
        except TimeoutError:
            self.kill()
            raise RuntimeError(f"a decoding process did not start within {_START_SECONDS:g} s") from None
        except EOFError:  # no fault of any clip, which must not be taken for unreadable
            raise RuntimeError(f"a decoding process ended before its first request ({self.kill()})") from None
        self._is_ready = True

    def _located(self, out: Spot | None) -> tuple[int, tuple[int, ...]] | None:
        if out is None:
            return None
        assert self._ring is not None, "a spot is one of a ring"
        return self._ring.start(out), out.shape

    def _read_message(self, deadline: float) -> tuple[dict[str, Any], bytearray]:
        header_bytes, payload_bytes = LENGTHS.unpack(self._read(LENGTHS.size, deadline))
        header = json.loads(self._read(header_bytes, deadline))
        return header, self._read(payload_bytes, deadline)

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

    def __init__(
        self,
        count: int,
        *,
        timeout_seconds: float,
        ring: FrameRing | None = None,
        requests_per_process: int = REQUESTS_PER_PROCESS,
    ) -> None:
        """With a ring, requests may name a spot of it as `out`; it is closed by its owner, after the pool."""
        self._timeout_seconds = timeout_seconds
        self._ring = ring
        self._requests_per_process = requests_per_process
        self._local = threading.local()
        self._lock = threading.Lock()
        self._processes: list[WorkerProcess] = []
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="decode")

    def counts(self) -> dict[str, int]:
        """What happened so far: processes that crashed or ate all memory, that took too long, and that were renewed in time."""
        with self._lock:
            return {
                "decoder_crashes": sum(process.crashes for process in self._processes),
                "decoder_timeouts": sum(process.timeouts for process in self._processes),
                "recycled_decoders": sum(process.recycled for process in self._processes),
            }

    def submit(self, operation: str, **arguments: Any) -> Future[tuple[dict[str, Any], bytearray]]:
        """The future result of `WorkerProcess.call`."""
        return self._executor.submit(self.call, operation, **arguments)

    def run(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Runs a function of ours in a thread of the pool, where it may use `call` repeatedly."""
        return self._executor.submit(function, *arguments)

    def call(
        self, operation: str, *, data: bytes | None = None, out: Spot | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], bytearray]:
        """Runs a request in the process of the calling thread, which must be one of the pool's."""
        process = getattr(self._local, "process", None)
        if process is None:
            process = WorkerProcess(ring=self._ring, requests_per_process=self._requests_per_process)
            self._local.process = process
            with self._lock:
                self._processes.append(process)
        return process.call(operation, arguments, timeout_seconds=self._timeout_seconds, data=data, out=out)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what is waiting, lets each process finish its request, and ends them."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.kill()
