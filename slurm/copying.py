"""Copying shards to the machine's own disk: whole and checked or not at all, whoever else copies there, whenever it is killed."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from ..data.staged import is_whole
from ..data.storage import FileFacts, file_facts, read_range

KEPT_FREE_SHARE = 0.05  # of the disk: others need some of it, checkpoints and caches for instance
_CHUNK_BYTES = 16 * 2**20
_PARTIAL = ".partial"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, eq=False)
class Shard:
    """A file to copy."""

    name: str  # path or URL
    size: int  # bytes
    target: Path
    clips: np.ndarray | None = (
        None  # int64 [clips, 3]: offset, size and CRC-32 of the bytes that are checked on the way
    )
    facts: FileFacts | None = None  # what the file must still be at the end, where nothing is known of its clips


class Outcome(Enum):
    """What became of a shard."""

    copied = auto()
    there = auto()
    no_room = auto()
    busy = auto()  # another process is at it


class Copier:
    """Copies shards into a folder, from any number of threads. `advance` is told the bytes as they come."""

    def __init__(self, folder: Path, advance: Callable[[int], None]) -> None:
        """Raises OSError where the folder cannot be made."""
        self._folder, self._advance = folder, advance
        self._room = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._kept_free = int(shutil.disk_usage(folder).total * KEPT_FREE_SHARE)

    def copy(self, shard: Shard) -> Outcome:
        """Copies a shard, unless a whole copy is there.

        Raises OSError and EOFError where it cannot be read or written, and ValueError where it is not what was indexed.
        """
        if is_whole(shard.target, shard.size):
            return Outcome.there
        shard.target.parent.mkdir(exist_ok=True, mode=0o700)
        partial = shard.target.with_name(shard.target.name + _PARTIAL)
        file = _locked(partial)
        if file is None:
            return Outcome.busy
        with file:  # closing it gives up the lock, and so does the end of the process
            if is_whole(shard.target, shard.size):  # by who had the lock before
                partial.unlink()
                return Outcome.there
            try:
                file.truncate(0)
                if not self._reserve(file, shard.size):
                    partial.unlink()
                    return Outcome.no_room
                self._fill(file, shard)
                os.fsync(file.fileno())
                partial.rename(shard.target)
            except BaseException as error:
                partial.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    return Outcome.no_room
                raise
        return Outcome.copied

    def remove_leftovers(self) -> None:
        """Removes what processes that were killed have left."""
        for partial in self._folder.glob(f"*/*{_PARTIAL}"):
            with suppress(OSError):
                file = _locked(partial)
                if file is not None:
                    with file:
                        partial.unlink()

    def _reserve(self, file: io.FileIO, size: int) -> bool:
        # Room is taken before the first byte is written: the disk then tells other threads and processes what is left.
        with self._room:
            if shutil.disk_usage(self._folder).free - self._kept_free < size:
                return False
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    return False
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot do this
                    raise
            return True

    def _fill(self, file: io.FileIO, shard: Shard) -> None:
        checks = _Checks(shard.clips)
        for start in range(0, shard.size, _CHUNK_BYTES):
            data = memoryview(read_range(shard.name, start, min(_CHUNK_BYTES, shard.size - start)))
            checks.update(start, data)
            left = data
            while left:
                left = left[file.write(left) :]
            self._advance(len(data))
        if shard.facts is not None and file_facts(shard.name) != shard.facts:
            raise ValueError("it changed while it was copied")


class _Checks:
    """Compares the bytes of a file, chunk by chunk, with the checksums of its clips."""

    def __init__(self, clips: np.ndarray | None) -> None:
        places = [] if clips is None else clips.tolist()
        self._left = deque(sorted({(offset, size, checksum) for offset, size, checksum in places if size}))
        self._found = 0  # CRC-32 of what has come of the first that is left

    def update(self, start: int, data: memoryview) -> None:
        end = start + len(data)
        while self._left and self._left[0][0] < end:
            offset, size, checksum = self._left[0]
            self._found = crc32(data[max(0, offset - start) : max(0, offset + size - start)], self._found)
            if offset + size > end:
                return
            if self._found != checksum:
                raise ValueError(f"its bytes from {offset} on are not those that were indexed")
            self._left.popleft()
            self._found = 0


def _locked(path: Path) -> io.FileIO | None:
    """A file opened for writing and locked, made where it is not there; None where another process has it."""
    while True:
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had the lock before may have renamed or removed the file since it was opened.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()
