"""Files of one JSON object a line, which are whole after a kill and lose nothing to a full disk."""

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..redaction import without_secrets


class JsonLines:
    """Appends rows to a file. What the disk refuses waits in memory and goes with the next row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the run's life)
        self._waiting = b""
        self._writing = threading.Lock()  # the watchdog's thread writes the end of an attempt
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a line that a kill cut short

    def append(self, row: dict[str, Any], *, sync: bool = False) -> str:
        """Write a row without secrets, with `sync` down to the disk; returns what went wrong, else an empty string."""
        line = json.dumps(without_secrets(row)).encode() + b"\n"  # the cause of a failure may be any text
        with self._writing:
            self._waiting += line
            try:
                self._write()
                if sync:
                    os.fsync(self._file.fileno())
            except OSError as error:
                return f"{self._path}: {error.strerror or error}"
        return ""

    def close(self) -> None:
        """A last try for what waits."""
        with suppress(OSError):
            self._write()
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, in their order; [] where there is none. Lines that are no JSON object are left out."""
    return _rows(path.read_bytes()) if path.exists() else []


def read_last_json_lines(path: Path, *, nbytes: int = 2**18) -> list[dict[str, Any]]:
    """The last rows of a file, as many as lie whole in its last bytes: of one that may be too large to be read every time."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        begin = file.seek(max(0, end - nbytes))
        data = file.read(nbytes)
    return _rows(data[data.find(b"\n") + 1 :] if begin else data)


def _rows(data: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in data.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last one of a run that goes on, or that was killed
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
