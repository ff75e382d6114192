"""What can happen to a rank: the actions of faults, each called with what is known of the moment (see injections.py)."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
# What is known of a moment: "text", such as a path; "file", an open one's number; "args" of a call; "events", a file for notes.
Moment = dict[str, Any]


def kill(moment: Moment) -> None:
    """kill -9 of this very process."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def nothing(moment: Moment) -> None:
    """Only the line in the file of events, which then says what there is to strike at."""


def cut_and_kill(moment: Moment) -> None:
    """At an fsync: what was written reached the disk only by half, then the machine stopped."""
    size = os.fstat(moment["file"]).st_size
    os.ftruncate(moment["file"], size // 2)
    kill(moment)


def send(moment: Moment, name: str, times: int = 1, pause_seconds: float = 0.1) -> None:
    """A signal to this process, once or several times."""
    for number in range(times):
        if number:
            time.sleep(pause_seconds)
        os.kill(os.getpid(), getattr(signal, name))


def send_to_session(moment: Moment, name: str) -> None:
    """A signal to this process and all that it started, as a terminal or a scheduler sends it."""
    os.killpg(0, getattr(signal, name))


def send_and_sleep(moment: Moment, name: str, seconds: float) -> None:
    """A signal to this process, and this thread goes no further."""
    send(moment, name)
    time.sleep(seconds)


def kill_child(moment: Moment, command: str) -> None:
    """kill -9 of a process that this one started, known by a part of its command line."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # others come and go
            if command in " ".join(child.cmdline()):
                child.kill()


def fault_the_writer(moment: Moment, faults: list[dict[str, Any]]) -> None:
    """Put faults into every process that this one starts to write checkpoints in the background."""
    real = subprocess.Popen

    class Faulty(real):  # type: ignore[misc, valid-type]
        def __init__(self, command: list[str], **options: Any) -> None:
            if "muybridge.train.checkpoint_writer" in command:
                program = [sys.executable, "-m", "muybridge.tests.faults.writer_program"]
                command = [*program, json.dumps(faults), moment["events"], *command[3:]]
            super().__init__(command, **options)

    subprocess.Popen = Faulty  # type: ignore[misc, assignment]


def sleep(moment: Moment, seconds: float) -> None:
    """Nothing at all, for long."""
    time.sleep(seconds)


def wait_for_parent(moment: Moment) -> None:
    """Stand still until the process that started this one has ended."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.01)


def fail(moment: Moment, number: str = "EIO", kind: str = "") -> None:
    """An OSError with this errno, or another exception `MODULE:NAME`."""
    if kind:
        module, _, name = kind.partition(":")
        raise getattr(importlib.import_module(module), name)("injected by a test")
    code = getattr(errno, number)
    raise OSError(code, os.strerror(code), str(moment.get("text", "")))


def limit_file_size(moment: Moment, nbytes: int, kills: bool = False) -> None:
    """The kernel refuses to write a file beyond this size (EFBIG), or kills the process in the middle of its write; -1 lifts it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def limit_memory(moment: Moment, more_bytes: int) -> None:
    """The kernel gives the process no more memory than so much on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def mount_small_disk(moment: Moment, folder: str, nbytes: int) -> None:
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


def start_a_process(moment: Moment, command: list[str]) -> None:
    """A process that nobody waits for."""
    subprocess.Popen(command, start_new_session=True)


def touch(moment: Moment, path: str) -> None:
    """Make a file, such as a stop file or a sign for another process of the case."""
    Path(path).touch()


def wait_for(moment: Moment, path: str) -> None:
    """Stand still until a file is there."""
    while not Path(path).exists():
        time.sleep(0.01)


def take(moment: Moment, path: str) -> None:
    """Remove a file."""
    Path(path).unlink()


def fill_disk(moment: Moment, path: str) -> None:
    """Leave no free byte on the disk that a file lies on."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def fill_log_disk(moment: Moment) -> None:
    """From here on, what is printed meets a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def write(moment: Moment, path: str, text: str) -> None:
    """Put this into a file."""
    Path(path).write_text(text)


def show(moment: Moment, path: str) -> None:
    """Print a file, which may lie where only this process sees it."""
    print(Path(path).read_text(), flush=True)


def scale_loss(moment: Moment, factor: float | str) -> Callable[[Any], Any]:
    """After the task's losses were computed: each is that many times as large, and so are its gradients."""

    def scale(losses: Any) -> Any:
        return dataclasses.replace(losses, total=losses.total * float(factor))

    return scale


def answer(moment: Moment, value: Any) -> Callable[[Any], Any]:
    """The function gives this value instead of its own."""
    return lambda _: value


def poison_weights(moment: Moment) -> None:
    """One of the master weights is NaN, though no gradient was."""
    moment["args"][0].shards[0].master[0] = float("nan")


def flip_weight(moment: Moment) -> None:
    """The lowest bit of one weight that the forward uses is another, as after a memory fault."""
    import torch

    with torch.no_grad():
        weight = next(moment["args"][0].module.parameters())
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
    "wait for parent": wait_for_parent,
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
