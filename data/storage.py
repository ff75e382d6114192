"""Bytes of files by range, wherever they lie: local paths directly, http(s) by the standard library, all else through fsspec.

A file is named by a local path or a URL. Local paths never need the libraries for remote ones.
"""

from __future__ import annotations

import errno
import glob
import itertools
import os
import random
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from .urls import EXTRAS, HTTP, check_url, url_fault

if TYPE_CHECKING:
    from email.message import Message
    from urllib.error import URLError

T = TypeVar("T")

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

_TIMEOUT_SECONDS = 60.0
_PASSING_FAULTS = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)  # of network file systems
_ATTEMPTS = 5
_FIRST_WAIT_SECONDS = 0.5  # doubled at each attempt, with jitter so that a thousand workers do not come back at once
# The end of one sample, its caption and the next header lie within a block or two: a shard's headers and captions then cost one
# request a sample.
_BLOCK_BYTES = 16 * 1024
_KEPT_BLOCKS = 4096
_MAX_BRACE_NAMES = 1_000_000
_SHOWN_NAMES = 20


class TransientReadError(OSError):
    """A file could not be read though it may be later: a timeout, a lost connection or a server's fault."""


@dataclass(frozen=True)
class FileFacts:
    """What tells whether a file is still the one it was."""

    size: int  # bytes
    version: str  # time of change of a local file, ETag or the like of a remote one; "" where a server has none


def is_remote(name: str) -> bool:
    """Whether a name is a URL rather than a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name) is not None


def is_text(name: str) -> bool:
    """Whether a file's name, which may be any bytes, can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_facts(name: str) -> FileFacts:
    """Size and version of a file. Raises OSError: FileNotFoundError and PermissionError say so, TransientReadError too."""
    if not is_remote(name):
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device would never end
            raise OSError(f"{name} is not a regular file")
        return FileFacts(status.st_size, f"mtime {status.st_mtime_ns}")
    if _is_http(name):
        return _retried(name, lambda: _http_facts(name))
    return _retried(name, lambda: _fsspec_facts(name))


def read_range(name: str, offset: int, size: int) -> bytes:
    """Exactly `size` bytes from `offset` on. Raises OSError as `file_facts` does, and EOFError if the file ends before."""
    if size == 0:
        return b""
    if not is_remote(name):
        data = _retried(name, lambda: _local_range(name, offset, size))
    elif _is_http(name):
        data = _retried(name, lambda: _http_range(name, offset, size)[0])
    else:
        data = _retried(name, lambda: _fsspec_range(name, offset, size))
    if len(data) != size:
        raise EOFError(f"{name} ends at byte {offset + len(data)}, {size} bytes from {offset} were asked for")
    return data


def open_stream(name: str) -> BinaryIO:
    """A file opened to be read once from start to end, also from servers that know no ranges. Raises OSError as `file_facts`."""
    if not is_remote(name):
        file_facts(name)  # of what is no regular file
        return open(name, "rb")
    return _retried(name, lambda: _http_stream(name) if _is_http(name) else _fsspec_stream(name))


class RangeReader:
    """A file opened for many small reads; remote ones are read in blocks, which are kept. Close it, or use it as a context."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.facts = file_facts(name)
        self._file = None if is_remote(name) else open(name, "rb")  # noqa: SIM115 (closed by us)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes: fewer only at the end of the file."""
        if self._file is not None:
            self._file.seek(offset)
            return self._file.read(size)
        end = min(offset + size, self.facts.size)
        if end <= offset:
            return b""
        first = offset // _BLOCK_BYTES
        parts = b"".join(self._block(number) for number in range(first, -(-end // _BLOCK_BYTES)))
        return parts[offset - first * _BLOCK_BYTES : end - first * _BLOCK_BYTES]

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * _BLOCK_BYTES
            self._blocks[number] = read_range(self.name, start, min(_BLOCK_BYTES, self.facts.size - start))
            if len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number]


def find_shards(source: str, *, field: str = "SRC") -> list[str]:
    """The tars that a folder, a pattern with braces ({000..009}, {a,b}) or with * and ?, or a single name stands for, sorted.

    Compressed ones and links that lead nowhere are among them, so that they can be refused by name. Raises ValueError if there is
    none, or none for one of the names that braces stand for, and for names that are not UTF-8; `field` is what it was given as.
    """
    names = list(itertools.islice(expand_braces(source), _MAX_BRACE_NAMES + 1))
    if len(names) > _MAX_BRACE_NAMES:
        raise ValueError(f"{field}={source} stands for more than {_MAX_BRACE_NAMES} shards")
    if fault := next((fault for name in names if is_remote(name) and (fault := url_fault(name))), ""):
        raise ValueError(f"{field}: {fault}")
    matches = {name: _matches(name) for name in names}
    found = [shard for name in names for shard in matches[name]]
    if not found:
        raise ValueError(f"{field}={source} holds no shards ({', '.join(TAR_ENDINGS[:1])} files)")
    if barren := [name for name in matches if not matches[name]]:
        raise ValueError(f"{field}={source}: no shards in {_listed(barren)}")
    if nameless := [name for name in found if not is_text(name)]:  # the manifest, which is text, could not hold them
        raise ValueError(f"{field}={source}: names that are not UTF-8: {_listed(nameless)}; rename these shards")
    if twice := {name for name in found if found.count(name) > 1} if len(found) != len(set(found)) else set():
        raise ValueError(f"{field}={source} names {sorted(twice)[0]} twice")
    return found


def expand_braces(pattern: str) -> Iterator[str]:
    """`a-{00..02}.{x,y}` as a-00.x, a-00.y, ..., a-02.y."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, choices = match.groups()
    if choices is not None:
        values: Iterator[str] = iter(choices.split(","))
    else:
        width = len(first) if first.startswith("0") else 0
        values = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    for value in values:
        yield from expand_braces(pattern[: match.start()] + value + pattern[match.end() :])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(map(repr, names[:_SHOWN_NAMES])) + more


def _matches(name: str) -> list[str]:
    if not is_remote(name):
        if os.path.isdir(name):
            return sorted(str(path) for path in Path(name).rglob("*") if _is_tar(path.name) and not path.is_dir())
        return sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
    if _is_http(name) or (_is_tar(name) and not glob.has_magic(name)):
        return [name]
    pattern = name if glob.has_magic(name) else name.rstrip("/") + "/**"
    fs, path = _filesystem(pattern)
    return sorted(fs.unstrip_protocol(found) for found in fs.glob(path) if _is_tar(found))


def _is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_ENDINGS) and not os.path.basename(name).startswith(".")


def _is_http(name: str) -> bool:
    return name.partition("://")[0].lower() in HTTP


def _retried(name: str, read: Callable[[], T]) -> T:
    from http.client import HTTPException

    wait = _FIRST_WAIT_SECONDS
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return read()
        except (TransientReadError, TimeoutError, ConnectionError, HTTPException) as error:
            if attempt == _ATTEMPTS:
                raise TransientReadError(f"{name} cannot be read after {_ATTEMPTS} attempts: {error}") from error
        time.sleep(wait * random.uniform(0.5, 1.5))
        wait *= 2
    raise AssertionError("unreachable")


def _local_range(name: str, offset: int, size: int) -> bytes:
    try:
        with open(name, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        if error.errno in _PASSING_FAULTS:
            raise TransientReadError(error.strerror) from error
        raise


def _http_range(name: str, offset: int, size: int) -> tuple[bytes, Message]:
    import urllib.error
    import urllib.request

    from .web import open_http

    check_url(name)
    request = urllib.request.Request(name, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
    try:
        with open_http(request, timeout_seconds=_TIMEOUT_SECONDS) as answer:
            if answer.status != 206:
                raise OSError(f"{name}: the server does not serve ranges of a file (status {answer.status}, not 206)")
            return answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and (error.headers.get("Content-Range") or "").endswith("/0"):
                return b"", error.headers  # an empty file has no range to serve
            raise _http_fault(name, error.code) from error
    except urllib.error.URLError as error:
        raise _url_fault(error) from error


def _http_stream(name: str) -> BinaryIO:
    import urllib.error

    from .web import open_http

    check_url(name)
    try:
        answer: BinaryIO = open_http(name, timeout_seconds=_TIMEOUT_SECONDS)
        return answer
    except urllib.error.HTTPError as error:
        with error:
            raise _http_fault(name, error.code) from error
    except urllib.error.URLError as error:
        raise _url_fault(error) from error


def _http_fault(name: str, status: int) -> OSError:
    if status in (404, 410):
        return FileNotFoundError(f"{name} does not exist (status {status})")
    if status in (401, 403):
        return PermissionError(f"{name} may not be read (status {status})")
    if status in (408, 429) or status >= 500:
        return TransientReadError(f"status {status}")
    return OSError(f"{name} cannot be read (status {status})")


def _url_fault(error: URLError) -> OSError:
    from .web import RefusedAddressError

    return error.reason if isinstance(error.reason, RefusedAddressError) else TransientReadError(str(error.reason))


def _http_facts(name: str) -> FileFacts:
    # A range of one byte rather than HEAD, which signed URLs refuse.
    _, headers = _http_range(name, 0, 1)
    total = (headers.get("Content-Range") or "").rpartition("/")[2]
    if not total.isdigit():
        raise OSError(f"{name}: the server does not say how large the file is")
    return FileFacts(int(total), headers.get("ETag") or headers.get("Last-Modified") or "")


def _fsspec_facts(name: str) -> FileFacts:
    fs, path = _filesystem(name)
    info = fs.info(path)
    known = [info[field] for field in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(field)]
    return FileFacts(int(info["size"]), str(known[0]) if known else "")


def _fsspec_range(name: str, offset: int, size: int) -> bytes:
    fs, path = _filesystem(name)
    return bytes(fs.cat_file(path, start=offset, end=offset + size))


def _fsspec_stream(name: str) -> BinaryIO:
    fs, path = _filesystem(name)
    stream: BinaryIO = fs.open(path, "rb")
    return stream


def _filesystem(name: str) -> tuple[Any, str]:
    check_url(name)
    scheme = name.partition("://")[0].lower()
    try:
        import fsspec

        return fsspec.core.url_to_fs(name)
    except ImportError as error:
        package = EXTRAS.get(scheme, "the package that fsspec names")
        raise ValueError(
            f"{name}: reading {scheme}:// needs {package} ({error}); pip install fsspec {package}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
