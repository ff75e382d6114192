"""What goes wrong in a rank, and when: faults that a case puts into a forked process before the run starts.

A fault is a dictionary {"at": MOMENT, "nth": 1, "do": ACTION, ...}. Moments need no help from the code under test: the call of a
function, an operation on a file (Python's audit events, and os.fsync), or the process's start. The action is one of `ACTIONS`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import functools
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Audit events that change what is on the disk, "open" only where it is for writing.
FILE_EVENTS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "shutil.rmtree",
)
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def install(fault: dict[str, Any], events: Path) -> None:
    """Put a fault into this process; when it strikes, a line with the time goes to the file `events`.

    Moments (`at`):
      "start"              now
      "call MODULE:NAME"   before a call of a function or method; "after MODULE:NAME" when it has returned
      "file OPERATION"     before an operation of FILE_EVENTS or "fsync"; "file any" for all of them
    `nth` counts the moments that fit, from 1; 0 strikes at each. `of` is a pattern that a file's path or a call's arguments hold.
    """
    strike = _Strike(fault, events)
    how, _, what = fault["at"].partition(" ")
    if how == "start":
        strike({})
    elif how in ("call", "after"):
        _wrap(what, strike, before=how == "call")
    elif how == "file":
        _watch_files(what, strike)
    else:
        raise ValueError(f"at={fault['at']!r} is no moment")


class _Strike:
    """Counts the moments that fit a fault, and does what it says at the one that is meant."""

    def __init__(self, fault: dict[str, Any], events: Path) -> None:
        self._fault, self._events = fault, events
        self._count = 0
        self._is_busy = False

    def __call__(self, found: dict[str, Any]) -> Any:
        # What the action itself does to files is no moment.
        if self._is_busy or not re.search(self._fault.get("of", ""), found.get("text", "")):
            return None
        self._count += 1
        if self._fault.get("nth", 1) not in (0, self._count):
            return None
        self._is_busy = True
        try:
            if self._fault["at"] != "start":
                with open(self._events, "a") as file:
                    shown = {name: found[name] for name in ("text", "operation") if name in found}
                    file.write(json.dumps({"time": time.monotonic(), "at": self._fault["at"], **shown}) + "\n")
            return ACTIONS[self._fault["do"]](found | {"events": str(self._events)}, **self._fault.get("with", {}))
        finally:
            self._is_busy = False


def _wrap(target: str, strike: _Strike, *, before: bool) -> None:
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found = {"text": str((args, kwargs)) if strike._fault.get("of") else "", "args": args}
        if before:
            strike(found)
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        answer = strike(found)
        return result if answer is None else answer(result)

    setattr(owner, name, wrapper)


def _watch_files(operation: str, strike: _Strike) -> None:
    if operation in ("fsync", "any"):
        fsync = os.fsync

        def watched(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            strike({"text": _path_of(number), "operation": "fsync", "file": number})
            fsync(file)

        os.fsync = watched  # type: ignore[assignment]
    if operation == "fsync":
        return

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or (operation != "any" and event != operation and event != f"os.{operation}"):
            return
        if event == "open" and not _is_for_writing(args):
            return
        folder = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else None
        paths = args[:1] if event == "open" else args
        text = " -> ".join(_shown(path, folder) for path in paths if isinstance(path, str | bytes | os.PathLike))
        strike({"text": text, "operation": event})

    sys.addaudithook(hook)


def _is_for_writing(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _shown(path: Any, folder: Any) -> str:
    text = os.fsdecode(path)
    if (
        isinstance(folder, int) and folder >= 0 and not text.startswith("/")
    ):  # shutil.rmtree names files by their folder's number
        return f"{_path_of(folder)}/{text}"
    return text


def _path_of(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


# --- what happens -----------------------------------------------------------------------------------------------------------


def kill(found: dict[str, Any]) -> None:
    """kill -9 of this very process."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def nothing(found: dict[str, Any]) -> None:
    """Only the line in the file of events, which then says what there is to strike at."""


def cut_and_kill(found: dict[str, Any]) -> None:
    """At an fsync: what was written reached the disk only by half, then the machine stopped."""
    size = os.fstat(found["file"]).st_size
    os.ftruncate(found["file"], size // 2)
    kill(found)


def send(found: dict[str, Any], name: str, times: int = 1, pause_seconds: float = 0.1) -> None:
    """A signal to this process, once or several times."""
    for number in range(times):
        if number:
            time.sleep(pause_seconds)
        os.kill(os.getpid(), getattr(signal, name))


def send_to_session(found: dict[str, Any], name: str) -> None:
    """A signal to this process and all that it started, as a terminal or a scheduler sends it."""
    os.killpg(0, getattr(signal, name))


def send_and_sleep(found: dict[str, Any], name: str, seconds: float) -> None:
    """A signal to this process, and this thread goes no further."""
    send(found, name)
    time.sleep(seconds)


def kill_child(found: dict[str, Any], command: str) -> None:
    """kill -9 of a process that this one started, known by a part of its command line."""
    children = Path(f"/proc/{os.getpid()}/task")
    for task in children.iterdir():
        for pid in (task / "children").read_text().split():
            if command in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                os.kill(int(pid), signal.SIGKILL)


def fault_the_writer(found: dict[str, Any], faults: list[dict[str, Any]]) -> None:
    """Put faults into every process that this one starts to write checkpoints in the background."""
    real = subprocess.Popen

    class Faulty(real):  # type: ignore[misc, valid-type]
        def __init__(self, command: list[str], **options: Any) -> None:
            if "muybridge.train.checkpoint_writer" in command:
                program = [sys.executable, "-m", "muybridge.tests.faults.writer_program"]
                command = [*program, json.dumps(faults), found["events"], *command[3:]]
            super().__init__(command, **options)

    subprocess.Popen = Faulty  # type: ignore[misc, assignment]


def sleep(found: dict[str, Any], seconds: float) -> None:
    """Nothing at all, for long."""
    time.sleep(seconds)


def fail(found: dict[str, Any], number: str = "EIO", kind: str = "") -> None:
    """An OSError with this errno, or another exception `MODULE:NAME`."""
    if kind:
        module, _, name = kind.partition(":")
        raise getattr(importlib.import_module(module), name)("injected by a test")
    code = getattr(errno, number)
    raise OSError(code, os.strerror(code), str(found.get("text", "")))


def limit_file_size(found: dict[str, Any], nbytes: int, kills: bool = False) -> None:
    """The kernel refuses to write a file beyond this size (EFBIG), or kills the process in the middle of its write; -1 lifts it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def limit_memory(found: dict[str, Any], more_bytes: int) -> None:
    """The kernel gives the process no more memory than so much on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def mount_small_disk(found: dict[str, Any], folder: str, nbytes: int) -> None:
    """A disk of this size on a folder, seen by this process and its children alone and gone with them."""
    libc = ctypes.CDLL(None, use_errno=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        _give_up_mounting()
    # Files get an owner only where that one is known in the new namespace.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    if libc.mount(b"small", os.fsencode(folder), b"tmpfs", 0, f"size={nbytes}".encode()):
        _give_up_mounting()


def _give_up_mounting() -> None:
    print("NO RIGHT TO MOUNT", os.strerror(ctypes.get_errno()), flush=True)
    os._exit(79)


def start_a_process(found: dict[str, Any], command: list[str]) -> None:
    """A process that nobody waits for."""
    subprocess.Popen(command, start_new_session=True)


def touch(found: dict[str, Any], path: str) -> None:
    """Make a file, such as a stop file or a sign for another process of the case."""
    Path(path).touch()


def wait_for(found: dict[str, Any], path: str) -> None:
    """Stand still until a file is there."""
    while not Path(path).exists():
        time.sleep(0.01)


def take(found: dict[str, Any], path: str) -> None:
    """Remove a file."""
    Path(path).unlink()


def fill_disk(found: dict[str, Any], path: str) -> None:
    """Leave no free byte on the disk that a file lies on."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def fill_log_disk(found: dict[str, Any]) -> None:
    """From here on, what is printed meets a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def write(found: dict[str, Any], path: str, text: str) -> None:
    """Put this into a file."""
    Path(path).write_text(text)


def show(found: dict[str, Any], path: str) -> None:
    """Print a file, which may lie where only this process sees it."""
    print(Path(path).read_text(), flush=True)


def scale_loss(found: dict[str, Any], factor: float | str) -> Callable[[Any], Any]:
    """After the task's losses were computed: each is that many times as large, and so are its gradients."""

    def scale(losses: Any) -> Any:
        return dataclasses.replace(losses, total=losses.total * float(factor))

    return scale


def answer(found: dict[str, Any], value: Any) -> Callable[[Any], Any]:
    """The function gives this value instead of its own."""
    return lambda _: value


def poison_weights(found: dict[str, Any]) -> None:
    """One of the master weights is NaN, though no gradient was."""
    found["args"][0].shards[0].master[0] = float("nan")


def flip_weight(found: dict[str, Any]) -> None:
    """The lowest bit of one weight that the forward uses is another, as after a memory fault."""
    import torch

    with torch.no_grad():
        weight = next(found["args"][0].module.parameters())
        weight.view(-1)[:1].view(torch.int16)[0] ^= 1


ACTIONS: dict[str, Callable[..., Any]] = {
    "kill": kill,
    "nothing": nothing,
    "cut and kill": cut_and_kill,
    "send": send,
    "send to session": send_to_session,
    "send and sleep": send_and_sleep,
    "kill child": kill_child,
    "fault the writer": fault_the_writer,
    "sleep": sleep,
    "fail": fail,
    "limit file size": limit_file_size,
    "limit memory": limit_memory,
    "mount small disk": mount_small_disk,
    "start a process": start_a_process,
    "touch": touch,
    "wait for": wait_for,
    "take": take,
    "fill disk": fill_disk,
    "fill log disk": fill_log_disk,
    "write": write,
    "show": show,
    "scale loss": scale_loss,
    "answer": answer,
    "poison weights": poison_weights,
    "flip weight": flip_weight,
}
