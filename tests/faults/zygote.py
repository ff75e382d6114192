"""The fork server: a process that has torch, DeepSpeed and muybridge in memory, and forks the ranks of one case after the other.

A start of torch costs seconds, a fork some milliseconds. What is forked runs `python -m MODULE` or `python FILE` as a process of
its own would, with the faults of the case put in. Driven by `fork_server.py` over stdin and stdout: a line of JSON for a case, a
line for its answer. No process outlives a case: ranks end when this one does, whatever they start becomes its child (a subreaper),
and when stdin closes it ends them all.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from muybridge.tests.faults import injections

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# What a rank has started (decoders, the writer of checkpoints, W&B's service) may take so long to notice that it is gone.
LINGER_SECONDS = 10.0


@dataclass
class Rank:
    """A forked process of a case."""

    pid: int
    file: int  # its pidfd, readable once it has ended
    began: float
    ended: float = 0.0
    code: int | None = None  # as in subprocess: minus the signal where one ended it


def main(preloaded: list[str]) -> None:
    """Answer cases until stdin closes, with these modules in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test runner's to handle; it then closes stdin
    # A fork beside jemalloc's own thread, which restarts in the child.
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    for name in preloaded:
        importlib.import_module(name)
    gc.freeze()  # what is here now is for all forks: none should copy its pages to count references
    # Answers go to a copy: what anything prints here must not mix with them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for line in iter(_line_reader(), ""):
        print(json.dumps(_run_case(json.loads(line), libc)), file=answers, flush=True)


def _line_reader() -> Any:
    # Byte by byte, so that nothing is left in a buffer where a selector could not see it.
    def read() -> str:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(0, 1)
            if not byte:
                return ""
            line += byte
        return line.decode()

    return read


def _run_case(case: dict[str, Any], libc: ctypes.CDLL) -> dict[str, Any]:
    """Fork the case's processes, wait for them, and say how each ended and what was left behind."""
    ranks = [_fork(plan, libc) for plan in case["processes"]]
    deadline = time.monotonic() + case["deadline_seconds"]
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        for rank in ranks:
            selector.register(rank.file, selectors.EVENT_READ, rank)
        alive = len(ranks)
        is_late = False
        while alive:
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events and not is_late:
                is_late = True
                deadline = time.monotonic() + LINGER_SECONDS
                for rank in ranks:
                    if rank.code is None:
                        os.kill(rank.pid, signal.SIGKILL)
            for key, _ in events:
                if key.data is None:  # nobody writes here during a case: the test runner is gone
                    _end_everything(ranks)
                selector.unregister(key.fd)
                os.close(key.fd)
                key.data.ended = time.monotonic()
                key.data.code = os.waitstatus_to_exitcode(os.waitpid(key.data.pid, 0)[1])
                alive -= 1
    return {
        "is_late": is_late,
        "ranks": [{"code": rank.code, "began": rank.began, "ended": rank.ended} for rank in ranks],
        "left_behind": _wait_for_orphans(case["linger_seconds"]),
    }


def _fork(plan: dict[str, Any], libc: ctypes.CDLL) -> Rank:
    parent, began = os.getpid(), time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(70)
            _become_rank(plan)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Rank(pid, os.pidfd_open(pid), began)


def _become_rank(plan: dict[str, Any]) -> NoReturn:
    """Turn this fork into a process that was started with the plan's program, arguments, environment, folder and output files."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    out, errors = (os.open(plan[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for name in ("stdout", "stderr"))
    for source, target in ((nothing, 0), (out, 1), (errors, 2)):
        os.dup2(source, target)
    os.closerange(3, 4096)
    # Fresh objects: those of the fork server may be another's, or have text in them.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(plan["environment"])
    os.chdir(plan["folder"])
    program = plan["program"]
    sys.argv = [program, *plan["arguments"]]
    for fault in plan["faults"]:
        injections.install(fault, Path(plan["events"]))
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        for name in (program, f"{program}.__main__"):
            if not hasattr(sys.modules.get(name), "__path__"):
                sys.modules.pop(name, None)  # or runpy warns
        runpy.run_module(program, run_name="__main__", alter_sys=False)
    sys.exit(0)


def _wait_for_orphans(seconds: float) -> list[str]:
    """What processes of the case still run after a time for them to end; they are killed then."""
    deadline = time.monotonic() + seconds
    while True:
        _reap()
        children = _children()
        if not children or time.monotonic() > deadline:
            break
        time.sleep(0.005)
    found = [_command_line(pid) for pid in children]
    _kill(children)
    return found


def _end_everything(ranks: list[Rank]) -> NoReturn:
    _kill([rank.pid for rank in ranks if rank.code is None])
    while children := _children():
        _kill(children)
    os._exit(1)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _children() -> list[int]:
    """The direct children of this process; orphans of a rank are among them."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return f"process {pid}"


if __name__ == "__main__":
    main(sys.argv[1:])
