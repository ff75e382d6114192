"""Files of a submission, put in place so that a submission that fails leaves everything as it was."""

import os
from contextlib import suppress
from pathlib import Path


class Placement:
    """Writes and removes files, until `keep` with a way back: what was there stays under another name, as a disk may be full."""

    def __init__(self) -> None:
        self._before: dict[Path, Path | None] = {}  # where the former content waits; None: there was nothing
        self._made: list[Path] = []  # folders that were not there, the outermost first

    def folder(self, path: Path) -> None:
        """Make a folder, and those above it. Raises OSError."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file, which is whole once it has its name. Raises OSError."""
        self.folder(path.parent)
        staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(staging, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a full disk or a quota may show only here
            self.remove(path)
            staging.replace(path)
        except BaseException:
            with suppress(OSError):
                staging.unlink(missing_ok=True)
            raise

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there. Raises OSError."""
        kept = path.with_name(f".{path.name}.{os.getpid()}.before")
        if path in self._before:
            path.unlink(missing_ok=True)
        elif os.path.lexists(path):
            path.rename(kept)
            self._before[path] = kept
        else:
            self._before[path] = None

    def keep(self) -> None:
        """There is no way back from here."""
        for kept in filter(None, self._before.values()):
            with suppress(OSError):
                kept.unlink()
        self._before, self._made = {}, []

    def undo(self) -> None:
        """Put back what was there, as far as that can be done: what made the submission fail may still be the case."""
        for path, kept in self._before.items():
            with suppress(OSError):
                if kept is not None:
                    kept.replace(path)
                else:
                    path.unlink(missing_ok=True)
        for folder in reversed(self._made):
            with suppress(OSError):  # somebody else has put a file there
                folder.rmdir()
        self._before, self._made = {}, []
