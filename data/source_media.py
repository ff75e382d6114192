"""The bytes of the sources of `muybridge prepare`, as files or parts of files that a decoding process can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .decode import DecodeError
from .sources import Source
from .storage import read_range

_CELLS_AT_A_TIME = 8


@dataclass(frozen=True)
class MediaPlace:
    """Where media bytes lie."""

    path: Path
    offset: int
    size: int
    is_copy: bool = False  # a file of ours in the spool, to be removed after use

    def read(self) -> bytes:
        """The bytes. Raises OSError or EOFError."""
        return read_range(str(self.path), self.offset, self.size)

    def remove_copy(self) -> None:
        """Removes the file if it is a copy."""
        if self.is_copy:
            self.path.unlink(missing_ok=True)


class MediaPlaces:
    """Finds the bytes of sources, asked for in their order; cells of tables are copied into the folder `spool`."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._tables: dict[tuple[Path, str], Iterator[tuple[int, bytes | None]]] = {}

    def place(self, source: Source) -> MediaPlace:
        """Where the bytes of a source lie. Raises DecodeError if they cannot be read."""
        try:
            if source.column:
                return self._copied(source)
            size = source.path.stat().st_size if source.size is None else source.size
            return MediaPlace(source.path.absolute(), source.offset, size)
        except OSError as error:
            raise DecodeError(f"cannot be read: {error.strerror}") from error

    def _copied(self, source: Source) -> MediaPlace:
        cells = self._tables.setdefault((source.path, source.column), _cells(source.path, source.column))
        for row, data in cells:
            if row == source.row:
                if not data:
                    raise DecodeError("the file is empty")
                path = self._spool / f"{source.row}"
                path.write_bytes(data)
                return MediaPlace(path.absolute(), 0, len(data), is_copy=True)
        raise AssertionError("sources must be asked for in their order")


def extension_of(data: bytes) -> str:
    """The usual extension of media by their first bytes; mp4 where these tell nothing."""
    starts = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"\x1aE\xdf\xa3": "mkv", b"GIF8": "gif"}
    if data[:4] == b"RIFF":
        return "webp" if data[8:12] == b"WEBP" else "avi"
    return next((extension for start, extension in starts.items() if data.startswith(start)), "mp4")


def _cells(table: Path, column: str) -> Iterator[tuple[int, bytes | None]]:
    import pyarrow.parquet as pq

    row = 0
    with pq.ParquetFile(table, pre_buffer=False) as file:
        for batch in file.iter_batches(_CELLS_AT_A_TIME, columns=[column]):
            for cell in batch.column(0):
                value: Any = cell.as_py()
                data = value.get("bytes") if isinstance(value, dict) else value
                yield row, data if isinstance(data, bytes) else None
                row += 1
