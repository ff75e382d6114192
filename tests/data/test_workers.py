"""A decoder that crashes or hangs costs the request it was working on, and nothing else."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from muybridge.data import workers
from muybridge.data.decode import DecodeError
from muybridge.data.workers import WorkerDied, WorkerPool

# A worker with more operations: what decoders do at their worst.
PROGRAM = """
import os, signal, sys, time
from muybridge.data import worker
from muybridge.data.decode import DecodeError

def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def hang(): time.sleep(1000)
def echo(value): return {"value": value, "pid": os.getpid()}, bytes(value)
def chatter(): print("noise from a native library", flush=True); return {}, b""
def count(data): return {"bytes": len(data), "sum": sum(data[::4096])}, b""
def unreadable(): raise DecodeError("bad stream")
def bug(): raise KeyError("oops")

worker.OPERATIONS.update(crash=crash, hang=hang, echo=echo, chatter=chatter, unreadable=unreadable, bug=bug, count=count)
worker.main()
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(workers, "_COMMAND", [sys.executable, str(program)])
    with WorkerPool(1, timeout_seconds=10.0) as pool:
        yield pool


def test_answers_come_back_with_their_payload(pool: WorkerPool) -> None:
    futures = [pool.submit("echo", value=n) for n in (0, 7, 300_000)]
    for n, future in zip((0, 7, 300_000), futures):
        result, payload = future.result()
        assert result["value"] == n
        assert payload == bytes(n)


def test_data_arrive_whole(pool: WorkerPool) -> None:
    for data in (b"", b"\x01", b"\x01" * 5_000_000):
        answer, _ = pool.submit("count", data=data).result()
        assert answer == {"bytes": len(data), "sum": len(data[::4096])}


def test_a_process_that_takes_no_data_costs_its_time(pool: WorkerPool) -> None:
    os.kill(pool.submit("echo", value=0).result()[0]["pid"], signal.SIGSTOP)
    pool._timeout_seconds = 0.3
    with pytest.raises(WorkerDied, match=r"decoding took longer than 0\.3 s"):
        pool.submit("count", data=bytes(5_000_000)).result()
    pool._timeout_seconds = 10.0
    assert pool.submit("echo", value=1).result()[0]["value"] == 1


def test_a_crash_costs_one_request(pool: WorkerPool) -> None:
    before, crash, after = pool.submit("echo", value=1), pool.submit("crash"), pool.submit("echo", value=2)
    assert before.result()[0]["value"] == 1
    with pytest.raises(WorkerDied, match=r"the decoder crashed \(SIGSEGV\)"):
        crash.result()
    assert after.result()[0]["value"] == 2
    assert after.result()[0]["pid"] != before.result()[0]["pid"]


def test_a_hang_costs_its_time_and_one_request(pool: WorkerPool) -> None:
    pid = pool.submit("echo", value=0).result()[0]["pid"]
    pool._timeout_seconds = 0.3
    start = time.monotonic()
    with pytest.raises(WorkerDied, match=r"decoding took longer than 0\.3 s"):
        pool.submit("hang").result()
    assert time.monotonic() - start < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    pool._timeout_seconds = 10.0
    assert pool.submit("echo", value=1).result()[0]["value"] == 1


def test_a_killed_process_is_replaced(pool: WorkerPool) -> None:
    pid = pool.submit("echo", value=0).result()[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        pool.submit("echo", value=1).result()
    assert pool.submit("echo", value=2).result()[0]["pid"] != pid


def test_errors_keep_the_process(pool: WorkerPool) -> None:
    pid = pool.submit("echo", value=0).result()[0]["pid"]
    with pytest.raises(DecodeError, match="bad stream"):
        pool.submit("unreadable").result()
    with pytest.raises(RuntimeError, match="decoding process, bug: KeyError: 'oops'"):
        pool.submit("bug").result()
    assert pool.submit("chatter").result() == ({}, bytearray())  # what it prints does not reach the answers
    assert pool.submit("echo", value=0).result()[0]["pid"] == pid


def test_processes_end_with_the_pool(pool: WorkerPool) -> None:
    pid = pool.submit("echo", value=0).result()[0]["pid"]
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
