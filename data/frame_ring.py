"""Shared memory that decoding processes write frames into, so that no clip has to go through a pipe.

It is a number of equal places, each large enough for the clips that one process needs for one step.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

_SHARE_OF_MEMORY = 0.8  # of what is free; the rest is for the decoders themselves and for what training allocates later
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_GIB = 2**30


class Spot(NamedTuple):
    """Where the frames of one clip go: bytes [offset, offset + product of shape) of a place."""

    place: int
    offset: int
    shape: tuple[int, int, int, int]  # [T, H, W, 3]

    @property
    def size(self) -> int:
        """Bytes of the frames."""
        frames, height, width, channels = self.shape
        return frames * height * width * channels


class FrameRing:
    """`places` places of `place_bytes` bytes, handed out and taken back by one process and written by its decoders.

    The memory is taken at the first `acquire`; by then all processes of a machine have checked that theirs fits.
    """

    def __init__(self, places: int, place_bytes: int) -> None:
        """Raises ValueError where such rings of all training processes (LOCAL_WORLD_SIZE) do not fit into this machine."""
        if places < 1 or place_bytes < 1:
            raise ValueError(f"places={places} and place_bytes={place_bytes} must be positive")
        self.places = places
        self.place_bytes = -(-place_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        check_memory(places, self.place_bytes, processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        # A nameless file in memory: /dev/shm has 64 MB in most containers, and keeps what a killed process leaves behind.
        self.file = os.memfd_create("muybridge-frames")
        self._memory: np.ndarray | None = None
        self._free = deque(range(places))
        self._lock = threading.Lock()

    def acquire(self) -> int | None:
        """A free place, or None. It does not wait: who asks is who releases. Raises OSError where the memory is gone."""
        with self._lock:
            if self._memory is None:
                self._memory = self._allocated()
            return self._free.popleft() if self._free else None

    def release(self, place: int) -> None:
        """Makes a place free again; nobody may read or write it any more."""
        with self._lock:
            assert place in range(self.places), f"place {place} is not one of {self.places}"
            assert place not in self._free, f"place {place} is not in use"
            self._free.append(place)

    def start(self, spot: Spot) -> int:
        """The byte of the whole memory where a spot starts."""
        assert spot.place in range(self.places), f"{spot} is not in one of {self.places} places"
        assert 0 <= spot.offset <= self.place_bytes - spot.size, f"{spot} exceeds a place of {self.place_bytes} bytes"
        return spot.place * self.place_bytes + spot.offset

    def view(self, spot: Spot) -> np.ndarray:
        """The frames at a spot, uint8 [T, H, W, 3], without a copy: they change when the place is used again."""
        assert self._memory is not None, "the place was not acquired"
        start = self.start(spot)
        return self._memory[start : start + spot.size].reshape(spot.shape)

    def close(self) -> None:
        """Gives the memory back, once the last view of it is gone."""
        self._memory = None
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _allocated(self) -> np.ndarray:
        size = self.places * self.place_bytes
        # Now and not page by page while decoding, where a lack of memory would be a SIGBUS.
        os.posix_fallocate(self.file, 0, size)
        return np.frombuffer(mmap.mmap(self.file, size), dtype=np.uint8)


def check_memory(places: int, place_bytes: int, *, processes: int) -> None:
    """Raises ValueError where as many rings as there are processes on this machine do not fit into its free memory."""
    wanted, free = places * place_bytes * processes, available_memory()
    if wanted > _SHARE_OF_MEMORY * free:
        raise ValueError(
            f"the decoded clips need {wanted / _GIB:.1f} GiB of memory ({processes} processes on this machine x {places} steps "
            f"decoded ahead x {place_bytes / _GIB:.2f} GiB a step), more than {_SHARE_OF_MEMORY:.0%} of the {free / _GIB:.1f} "
            f"GiB that are free; lower data.prefetch, micro_batch or the size of the largest bucket, or set data.workers=0"
        )


def available_memory() -> int:
    """Bytes that this machine and this process's cgroups still give."""
    return min([psutil.virtual_memory().available, *_cgroup_headrooms()])


def _cgroup_headrooms() -> list[int]:
    # What is left under the limit of every group that this process is in: a container or job, and what encloses it.
    headrooms = []
    for line in _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            root, files = _CGROUPS, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root, files = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = root / name.lstrip("/")
        # In a container the name may be that of the machine outside; the root is then the container's own group.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            headroom = _headroom(folder, *files)
            if headroom is not None:
                headrooms.append(headroom)
    return headrooms


def _headroom(folder: Path, limit_file: str, usage_file: str, prefix: str) -> int | None:
    try:
        limit = int((folder / limit_file).read_text())
        usage = int((folder / usage_file).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max", which is no limit
        return None
    # The kernel drops the cache of files when memory gets short.
    cache = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, limit - usage + cache)
