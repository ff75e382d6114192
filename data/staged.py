"""Copies of shards on the machine's own disk: where they lie, and reading them in place of the originals.

`muybridge.slurm.stage` makes them; MUYBRIDGE_STAGED says where. A copy is used as long as it is whole and holds just what the run
would have read, else the original is: what a run reads never depends on its copies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from zlib_ng.zlib_ng import crc32

from .index import Clip, ClipIndex
from .media_bytes import read_media
from .storage import FileFacts, file_facts

STAGED_VARIABLE = "MUYBRIDGE_STAGED"

_log = logging.getLogger(__name__)
_LOGGED = 5


def staging_folder(place: str, *, field: str = STAGED_VARIABLE) -> Path:
    """The folder of this user's copies in `place`, a folder on the machine's own disk; $VARIABLES in it may differ by machine.

    Raises ValueError for a place that has no meaning; `field` is what it was given as.
    """
    path = os.path.expandvars(place)
    if "$" in path:
        raise ValueError(f"{field}={place} names an environment variable that is not set")
    if not os.path.isabs(path):
        raise ValueError(f"{field}={place} must be an absolute path")
    return Path(path) / f"muybridge-staged-{os.geteuid()}"  # where others have theirs beside it


def shard_copy(folder: Path, index: ClipIndex, shard: int) -> Path:
    """Where in a staging folder the copy of an indexed shard lies; another place for another content."""
    about = index.manifest["shards"][shard]
    # The sidecar has the place and the checksum of every clip; datasets of the first format have none.
    content = about.get("sidecar_hash") or index.fingerprint
    return folder / index.manifest["kind"] / _file_name(about["name"], content, about["bytes"])


def stream_copy(folder: Path, name: str, facts: FileFacts) -> Path:
    """Where in a staging folder the copy of a shard without an index lies; another place for another version of the file."""
    return folder / "stream" / _file_name(name, facts.version, facts.size)


def is_whole(path: Path, size: int) -> bool:
    """Whether there is a file of this size, and this user's: in a folder for all, others may put what they like."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size and status.st_uid == os.geteuid()


class StagedShards:
    """The copies of a dataset's shards on this machine, and their originals."""

    def __init__(self, index: ClipIndex, counts: dict[str, int]) -> None:
        """Where copies are looked for, `counts` gets their number, and how many of them could not be used later."""
        self._index, self._counts = index, counts
        self._copies: dict[int, Path] = {}
        self._lock = threading.Lock()
        if (folder := _folder()) is not None:
            places = {shard: shard_copy(folder, index, shard) for shard in range(len(index.shard_names))}
            sizes = [shard["bytes"] for shard in index.manifest["shards"]]
            self._copies = {shard: path for shard, path in places.items() if is_whole(path, sizes[shard])}
            counts |= {"staged_shards": len(self._copies), "lost_copies": 0}

    def copy(self, shard: int) -> Path | None:
        """The copy of a shard; None where the original must be read."""
        return self._copies.get(shard)

    def read(self, clip: Clip) -> bytes:
        """The media bytes of a clip. Raises what `media_bytes.read_media` does of the original."""
        if (copy := self._copies.get(clip.shard)) is not None:
            try:
                with copy.open("rb") as file:  # once, as there is another place to read it from
                    file.seek(clip.offset)
                    data = file.read(clip.size)
                if crc32(data) == clip.checksum:
                    return data
                reason = f"clip {clip.key} is damaged in it"
            except OSError as error:
                reason = error.strerror or str(error)
            self.abandon(clip.shard, reason)
        return read_media(
            self._index.shard_names[clip.shard],
            key=clip.key,
            offset=clip.offset,
            size=clip.size,
            checksum=clip.checksum,
        )

    def abandon(self, shard: int, reason: str) -> None:
        """Goes on with the original of a shard, and makes room for another copy."""
        with self._lock:  # threads that read the shard at the same time
            copy = self._copies.pop(shard, None)
            if copy is None:
                return
            self._counts["lost_copies"] += 1
        _give_up(copy, reason, self._counts["lost_copies"])


class StagedStreams:
    """The copies of shards that have no index. Nothing tells whether their samples are right, only whether the tar is whole."""

    def __init__(self) -> None:
        self._folder = _folder()
        self.counts = {} if self._folder is None else {"staged_reads": 0, "lost_copies": 0}

    def open(self, shard: str) -> BinaryIO | None:
        """The copy of a shard as it is now; None where the original must be read."""
        if self._folder is None:
            return None
        try:
            facts = file_facts(shard)
            copy = stream_copy(self._folder, shard, facts)
            if not is_whole(copy, facts.size):
                return None
            file = copy.open("rb")
        except OSError:  # reading the original says what is wrong with it
            return None
        self.counts["staged_reads"] += 1
        return file

    def abandon(self, file: BinaryIO, reason: str) -> None:
        """Gives up a copy that `open` returned."""
        self.counts["lost_copies"] += 1
        _give_up(Path(file.name), reason, self.counts["lost_copies"])


def _folder() -> Path | None:
    place = os.environ.get(STAGED_VARIABLE)
    return staging_folder(place) if place else None


def _file_name(name: str, content: str, size: int) -> str:
    digest = hashlib.blake2b(json.dumps([name, content, size]).encode(errors="surrogatepass"), digest_size=8)
    # What stands behind the ? of a URL may be a signature.
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(name.partition("?")[0]))
    return f"{digest.hexdigest()}-{readable[:80]}"


def _give_up(copy: Path, reason: str, number: int) -> None:
    if number <= _LOGGED:  # a disk that breaks takes all of them
        last = "; further ones are only counted" if number == _LOGGED else ""
        _log.warning("the copy %s cannot be used (%s); the original is read instead%s", copy, reason, last)
    with suppress(OSError):  # so that the next start makes it again; who has it open keeps it
        copy.unlink()
