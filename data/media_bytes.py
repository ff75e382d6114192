"""The media bytes of a clip, checked against the index."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from zlib_ng.zlib_ng import crc32

from .storage import read_range

Data = TypeVar("Data", bytes, memoryview)

_READS = 2  # a byte that was flipped on the way is right the next time


class DatasetChangedError(ValueError):
    """The bytes of a clip are not those that were indexed: no run could be repeated with what is there now."""


def read_media(shard: str, *, key: str, offset: int, size: int, checksum: int) -> bytes:
    """The bytes of the clip `key` at their place in a shard (path or URL).

    Raises DatasetChangedError, and OSError as `storage.read_range` does: TransientReadError where they may be read later.
    """
    return checked(lambda: read_range(shard, offset, size), shard=shard, key=key, checksum=checksum)


def checked(read: Callable[[], Data], *, shard: str, key: str, checksum: int) -> Data:
    """What `read` gives, if it has this CRC-32. Raises DatasetChangedError."""
    reason = ""
    for _ in range(_READS):
        try:
            data = read()
        except (FileNotFoundError, EOFError) as error:
            reason = str(error)
            continue
        found = crc32(data)
        if found == checksum:
            return data
        reason = f"the checksum of its bytes is {found:08x}, not {checksum:08x} as in the index"
    raise DatasetChangedError(
        f"dataset changed under the run: {shard}, clip {key}: {reason}; put the shard back, or make the dataset's index again"
    )
