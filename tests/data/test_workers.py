"""A decoder that crashes, hangs or eats memory costs at most the request it was working on; no answer depends on another one."""

from __future__ import annotations

import gc
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from muybridge.data import worker, workers
from muybridge.data.child_process import JOB_SIGNALS, start_undisturbed
from muybridge.data.decode import DecodeError, Decoder, frame_times, has_decoder
from muybridge.data.frame_ring import FrameRing, Spot
from muybridge.data.mp4 import write_mp4
from muybridge.data.raw_clips import decode_in
from muybridge.data.workers import WorkerDied, WorkerPool

# A worker with more operations: what decoders do at their worst.
PROGRAM = """
import os, signal, sys, time
import numpy as np
from muybridge.data import worker
from muybridge.data.decode import DecodeError

def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def hang(): time.sleep(1000)
def nap(): time.sleep(0.5); return {"pid": os.getpid()}, b""
def echo(value): return {"value": value, "pid": os.getpid()}, bytes(value)
def chatter(): print("noise from a native library", flush=True); return {}, b""
def count(data): return {"bytes": len(data), "sum": sum(data[::4096])}, b""
def no_thread(): raise BlockingIOError(11, "Resource temporarily unavailable")
def unreadable(): raise DecodeError("bad stream")
def bug(): raise KeyError("oops")
def allocate(size): return {"sum": int(np.ones(size, dtype=np.uint8).sum()), "pid": os.getpid()}, b""
def hide_a_lack(size):
    frames = np.ones(100 * 2**20, dtype=np.uint8)
    try:
        return allocate(size)
    except MemoryError as error:
        raise DecodeError("invalid data") from ValueError(error)
held = []
def hold(size): held.append(np.ones(size, dtype=np.uint8)); return {"pid": os.getpid()}, b""
def crash_where_it_holds(out, value):
    out[: len(out) // 2] = 1
    if held: crash()
    out[:] = value
    return {"pid": os.getpid()}, b""
def fill(out, value, seconds):
    out[: len(out) // 2] = value
    time.sleep(seconds)
    out[len(out) // 2 :] = value
    return {"pid": os.getpid()}, b""

worker.OPERATIONS.update(crash=crash, hang=hang, echo=echo, chatter=chatter, unreadable=unreadable, bug=bug, count=count)
worker.OPERATIONS.update(allocate=allocate, no_thread=no_thread, fill=fill, nap=nap, hide_a_lack=hide_a_lack, hold=hold)
worker.OPERATIONS.update(crash_where_it_holds=crash_where_it_holds)
decode_clip = worker.decode_clip
def decode_or_crash(decoder, **request):
    return crash() if decoder == "crash" else decode_clip(decoder=decoder, **request)

worker.OPERATIONS.update(decode_clip=decode_or_crash)
worker.MEMORY_BYTES = 400 * 2**20
worker._GRACE_SECONDS = 1
worker.main()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has pools run the program above."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(workers, "_COMMAND", [sys.executable, str(path)])
    return path


@pytest.fixture
def pool(program: Path) -> Iterator[WorkerPool]:
    with WorkerPool(1, timeout_seconds=10.0) as pool:
        yield pool


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"not within a minute: {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):  # it may end while it is asked for
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


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
    with pytest.raises(WorkerDied, match=r"decoding took longer than 0\.3 s"):
        pool.submit("hang").result(timeout=60)
    # Not once more in a fresh process, which is for what others may have caused.
    assert pool.counts()["decoder_timeouts"] == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    pool._timeout_seconds = 10.0
    assert pool.submit("echo", value=1).result()[0]["value"] == 1


@pytest.mark.parametrize("number", JOB_SIGNALS)
def test_signals_to_the_whole_job_are_not_for_the_workers(pool: WorkerPool, number: signal.Signals) -> None:
    pid = pool.submit("echo", value=0).result()[0]["pid"]
    os.kill(pid, number)
    assert pool.submit("echo", value=1).result()[0]["pid"] == pid


@pytest.mark.parametrize("number", JOB_SIGNALS)
def test_a_process_is_deaf_from_its_first_moment(number: signal.Signals) -> None:
    process = start_undisturbed([sys.executable, "-c", "input(); print('lives')"], stdin=-1, stdout=-1)
    process.send_signal(number)  # the interpreter has hardly begun
    assert process.communicate(b"go\n")[0] == b"lives\n"


def test_a_killed_process_costs_no_request(pool: WorkerPool) -> None:
    pid = pool.submit("echo", value=0).result()[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    answer = pool.submit("echo", value=1).result()[0]
    assert answer["value"] == 1
    assert answer["pid"] != pid
    assert pool.counts()["decoder_crashes"] == 1


def test_what_a_process_held_costs_no_request(pool: WorkerPool) -> None:
    needed = 250 * 2**20
    pid = pool.submit("hold", size=needed).result()[0]["pid"]
    answer = pool.submit("allocate", size=needed).result()[0]
    assert answer["sum"] == needed
    assert answer["pid"] != pid
    assert pool.counts() == {"decoder_crashes": 1, "decoder_timeouts": 0, "recycled_decoders": 0}


def test_a_lack_of_memory_that_looks_like_damage_is_none(pool: WorkerPool) -> None:
    needed = 150 * 2**20
    pid = pool.submit("hold", size=needed).result()[0]["pid"]
    answer = pool.submit("hide_a_lack", size=needed).result()[0]
    assert answer["sum"] == needed
    assert answer["pid"] != pid
    assert pool.counts()["decoder_crashes"] == 1
    with pytest.raises(DecodeError, match="invalid data"):  # in a fresh process, too
        pool.submit("hide_a_lack", size=2 * needed).result()


def test_damage_is_no_lack_of_memory_where_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> tuple[dict[str, Any], bytes]:
        raise DecodeError("invalid data")

    monkeypatch.setitem(worker.OPERATIONS, "unreadable", unreadable)
    for limit, is_short in ((resource.RLIM_INFINITY, False), (2**60, False), (2**10, True)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, resource.RLIM_INFINITY))
        answer, _ = worker.answer_to("unreadable", {})
        assert answer == {"unreadable": "invalid data", "is_short_of_memory": is_short}


def test_half_a_clip_of_a_process_that_another_clip_spoilt_is_written_again(program: Path) -> None:
    with closing(FrameRing(1, 12)) as ring, WorkerPool(1, timeout_seconds=10.0, ring=ring) as pool:
        place = ring.acquire()
        assert place is not None
        spot = Spot(place, 0, (4, 1, 1, 3))
        pid = pool.submit("hold", size=1).result()[0]["pid"]
        assert pool.submit("crash_where_it_holds", out=spot, value=7).result()[0]["pid"] != pid
        assert (ring.view(spot) == 7).all()
        assert pool.counts()["decoder_crashes"] == 1


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


def test_a_process_is_renewed_in_time_without_a_change_of_answers(program: Path) -> None:
    with (
        closing(FrameRing(1, 4 * 3)) as ring,
        WorkerPool(1, timeout_seconds=10.0, ring=ring, requests_per_process=3) as pool,
    ):
        place = ring.acquire()
        assert place is not None
        spot = Spot(place, 0, (4, 1, 1, 3))
        pids = []
        for value in range(8):
            answer, _ = pool.submit("fill", out=spot, value=value, seconds=0).result()
            assert (ring.view(spot) == value).all()
            pids.append(answer["pid"])
        assert [pids.index(pid) for pid in pids] == [0, 0, 0, 3, 3, 3, 6, 6]
        assert pool.counts() == {"decoder_crashes": 0, "decoder_timeouts": 0, "recycled_decoders": 2}
        assert not any(is_running(pid) for pid in pids[:6])


@pytest.mark.parametrize("end", ["timeout", "kill"])
def test_half_a_clip_is_written_again_by_the_next_process(program: Path, end: str) -> None:
    with closing(FrameRing(1, 3 * 12)) as ring, WorkerPool(1, timeout_seconds=10.0, ring=ring) as pool:
        place = ring.acquire()
        assert place is not None
        spots = [Spot(place, 12 * n, (4, 1, 1, 3)) for n in range(3)]
        around = [ring.view(spot) for spot in (spots[0], spots[2])]
        for view in around:
            view[:] = 99
        pid = None
        if end == "timeout":
            pid = pool.submit("echo", value=0).result()[0]["pid"]
            pool._timeout_seconds = 2.0  # in which half of the clip is there on a busy machine, too
        future = pool.submit("fill", out=spots[1], value=1, seconds=1000)
        wait_until(lambda: bool((ring.view(spots[1])[:2] == 1).all()), "half of the clip")
        pid = pid or pool._processes[0].pid
        assert pid is not None
        if end == "kill":  # a fresh one: a process that answered others is replaced unseen
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            future.result()
        assert not is_running(pid)  # so that it cannot write over what comes next
        assert (ring.view(spots[1])[2:] == 0).all()
        pool._timeout_seconds = 10.0
        pool.submit("fill", out=spots[1], value=2, seconds=0).result()
        assert (ring.view(spots[1]) == 2).all()
        assert all((view == 99).all() for view in around)
        found = pool.counts()
        assert (found["decoder_crashes"], found["decoder_timeouts"]) == ((0, 1) if end == "timeout" else (1, 0))


def test_too_much_memory_costs_one_request(pool: WorkerPool) -> None:
    before = pool.submit("echo", value=0).result()[0]["pid"]
    assert pool.submit("allocate", size=100 * 2**20).result()[0] == {"sum": 100 * 2**20, "pid": before}
    with pytest.raises(WorkerDied, match=r"decoding needs more than 0\.390625 GiB of memory"):
        pool.submit("allocate", size=2**30).result()
    assert pool.submit("echo", value=0).result()[0]["pid"] != before  # its heap may be in pieces
    with pytest.raises(WorkerDied, match="decoding needs more than"):
        pool.submit("no_thread").result()
    assert pool.counts()["decoder_crashes"] == 4  # each in a process that had answered others, and in a fresh one


@pytest.fixture(scope="module")
def huge_video() -> bytes:
    pytest.importorskip("av", reason="PyAV writes the test video")
    file = io.BytesIO()
    write_mp4(file, np.broadcast_to(np.zeros(1, np.uint8), (70, 1280, 1280, 3)), fps=25)
    return file.getvalue()


@pytest.mark.parametrize("decoder", list(Decoder))
def test_a_small_file_of_huge_frames_is_unreadable(pool: WorkerPool, huge_video: bytes, decoder: Decoder) -> None:
    if not has_decoder(decoder):
        pytest.skip(f"{decoder} is not installed")
    assert len(huge_video) < 50_000  # and 344 MB of frames
    crop = {"height": 32, "width": 32, "crop_x": 0.5, "crop_y": 0.5}
    request = {"times_seconds": frame_times(70, fps=25), "seekable": True, "decoder": decoder.value, **crop}
    with pytest.raises(DecodeError):
        pool.run(decode_in, pool, {"data": huge_video, **request}).result()
    short = {"data": huge_video, **request, "times_seconds": frame_times(2, fps=25)}
    # Of decord on a busy machine, all 70 frames are in memory before it hands out the first: PyAV reads them then.
    assert len(pool.run(decode_in, pool, short).result()[1]) == 2 * 32 * 32 * 3


def test_a_clip_that_a_decoder_does_not_survive_is_read_by_pyav(pool: WorkerPool, huge_video: bytes) -> None:
    pytest.importorskip("av", reason="PyAV is the other decoder")
    crop = {"height": 32, "width": 32, "crop_x": 0.5, "crop_y": 0.5}
    request = {"data": huge_video, "times_seconds": [0.0], "seekable": True, "decoder": "decord", **crop}
    died = pool.submit("decode_clip", **{**request, "decoder": "crash"})
    with pytest.raises(WorkerDied):
        died.result()
    result, payload = pool.run(decode_in, pool, {**request, "decoder": "crash"}).result()
    assert (result, len(payload)) == ({"decoder": "pyav"}, 32 * 32 * 3)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_decoder_keeps_nothing_of_the_files_it_read(damaged: bool) -> None:
    pytest.importorskip("av", reason="PyAV writes the test video")
    file = io.BytesIO()
    write_mp4(file, np.zeros((9, 64, 96, 3), np.uint8), fps=8)
    megabytes = 4
    free_box = struct.pack(">I4s", megabytes * 2**20, b"free") + bytes(megabytes * 2**20 - 8)
    data = (bytes(100) if damaged else file.getvalue()) + free_box
    crop = {"height": 64, "width": 96, "crop_x": 0.5, "crop_y": 0.5}
    request = {"times_seconds": frame_times(9, fps=8), "seekable": True, "decoder": "decord", **crop}
    sizes = []
    with WorkerPool(1, timeout_seconds=60.0) as pool:
        for _ in range(40):
            with suppress(DecodeError) if damaged else nullcontext():
                pool.submit("decode_clip", data=data, **request).result()
            sizes.append(psutil.Process(pool._processes[0].pid).memory_info().rss)
    assert sizes[-1] - sizes[9] < 5 * megabytes * 2**20  # of 30 files


def test_a_process_that_cannot_start_is_no_fault_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    with WorkerPool(1, timeout_seconds=10.0) as pool:
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"a decoding process ended before its first request \(exit code 3\)"
            ):
                pool.submit("echo", value=0).result()
    monkeypatch.setattr(workers, "_COMMAND", [sys.executable, "-c", "import time; time.sleep(1000)"])
    monkeypatch.setattr(workers, "_START_SECONDS", 0.2)
    with (
        WorkerPool(1, timeout_seconds=10.0) as pool,
        pytest.raises(RuntimeError, match=r"a decoding process did not start within 0\.2 s"),
    ):
        pool.submit("echo", value=0).result()


def test_a_process_holds_no_pipe_of_its_neighbour(program: Path) -> None:
    stranger = os.pipe()
    with WorkerPool(2, timeout_seconds=10.0) as pool:
        answers = [pool.submit("nap") for _ in range(2)]
        pids = {future.result()[0]["pid"] for future in answers}
        held = [
            {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if "pipe:" in os.readlink(file)}
            for pid in pids
        ]
    assert len(held) == 2
    # Its own two, and perhaps the test's stderr, which all share.
    shared = {os.readlink("/proc/self/fd/2")}
    assert not (held[0] - shared) & (held[1] - shared)
    assert not any(os.readlink(f"/proc/self/fd/{file}") in pipes for file in stranger for pipes in held)
    for file in stranger:
        os.close(file)


def test_nothing_is_left_after_the_end(program: Path) -> None:
    gc.collect()  # files that earlier tests left to it
    files, children = os.listdir("/proc/self/fd"), psutil.Process().children()
    with closing(FrameRing(2, 1000)) as ring, WorkerPool(2, timeout_seconds=10.0, ring=ring) as pool:
        ring.acquire()
        pool.submit("echo", value=0).result()
        with pytest.raises(WorkerDied):
            pool.submit("crash").result()
        pool.submit("echo", value=0).result()
    assert os.listdir("/proc/self/fd") == files
    assert psutil.Process().children() == children


PARENT = """
import sys, time
from muybridge.data import workers
from muybridge.data.frame_ring import FrameRing, Spot

workers._COMMAND = [sys.executable, sys.argv[1]]
ring = FrameRing(1, 1000)
ring.acquire()
pool = workers.WorkerPool(2, timeout_seconds=3.0, ring=ring)
pids = [future.result()[0]["pid"] for future in [pool.submit("nap") for _ in range(2)]]
pool.submit("fill", out=Spot(0, 0, (4, 1, 1, 3)), value=1, seconds=1000)
while not ring.view(Spot(0, 0, (1, 1, 1, 3))).any():
    time.sleep(0.01)
print(*pids, flush=True)
time.sleep(1000)
"""


def test_processes_end_after_a_killed_parent(program: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(text) for text in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(is_running, pids))  # one waits for requests, one hangs
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(map(is_running, pids)), f"the end of {pids}")
