"""What goes wrong in a rank, and when: faults that a case puts into a forked process before the run starts.

A fault is a dictionary {"at": MOMENT, "nth": 1, "do": ACTION, ...}. Moments need no help from the code under test: the call of a
function, an operation on a file (Python's audit events, and os.fsync), or the process's start. Actions are in `actions.py`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from muybridge.tests.faults.actions import ACTIONS, Moment

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

    def __call__(self, moment: Moment) -> Any:
        # What the action itself does to files is no moment.
        if self._is_busy or not re.search(self._fault.get("of", ""), moment.get("text", "")):
            return None
        self._count += 1
        if self._fault.get("nth", 1) not in (0, self._count):
            return None
        self._is_busy = True
        try:
            if self._fault["at"] != "start":
                with open(self._events, "a") as file:
                    shown = {name: moment[name] for name in ("text", "operation") if name in moment}
                    file.write(json.dumps({"time": time.monotonic(), "at": self._fault["at"], **shown}) + "\n")
            return ACTIONS[self._fault["do"]](moment | {"events": str(self._events)}, **self._fault.get("with", {}))
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
        moment = {"text": str((args, kwargs)) if strike._fault.get("of") else "", "args": args}
        if before:
            strike(moment)
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        answer = strike(moment)
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
    # shutil.rmtree names files by their folder's number.
    if isinstance(folder, int) and folder >= 0 and not text.startswith("/"):
        return f"{_path_of(folder)}/{text}"
    return text


def _path_of(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""
