"""Writing a dataset folder: WebDataset tars, then the index over them. The one file that writes by webdataset."""

from __future__ import annotations

import io
import json
import re
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from zlib_ng.zlib_ng import crc32

from .index import (
    INDEX_NAME,
    MANIFEST_NAME,
    SIDECAR_FOLDER,
    Clip,
    ClipIndex,
    ShardRecord,
    merge_sidecars,
    read_manifest,
    sidecar_path,
    write_manifest,
    write_sidecar,
)
from .storage import FileFacts


class DatasetWriter:
    """Writes clips into a folder, shard by shard. Call `close` at the end: until then the folder counts as unfinished.

    As a context it closes its files whatever happens; an exception leaves an unfinished folder.
    `description` goes into the manifest: what the dataset was made from. A shard holds up to `shard_bytes` of media.
    The same clips give the same bytes.
    """

    def __init__(
        self, folder: str | Path, *, kind: str, description: dict[str, Any], shard_bytes: int = 256 * 1024 * 1024
    ) -> None:
        self.folder = Path(folder)
        self._kind = kind
        self._description = description
        self._shard_bytes = shard_bytes
        self._clips = 0
        self._shards: list[str] = []
        self._pending: list[tuple[str, Clip]] = []  # of the open shard, each with the name of its media member
        self._pending_bytes = 0
        self._file: io.BufferedWriter | None = None
        self._tar: Any = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_manifest(complete=False)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_shard()

    def __len__(self) -> int:
        return self._clips

    def add(self, clip: Clip, media: bytes, *, extension: str) -> None:
        """Appends a clip; its shard, offset, size and checksum are filled in here."""
        if self._file is not None and self._pending_bytes + len(media) > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            self._open_shard()
        members: dict[str, Any] = {"__key__": clip.key, extension: media, "txt": clip.caption.encode()}
        if clip.labels:
            members["json"] = clip.labels.encode()
        self._tar.write(members)
        place = replace(clip, shard=len(self._shards) - 1, size=len(media), checksum=crc32(media))
        self._pending.append((f"{clip.key}.{extension}", place))
        self._pending_bytes += len(media)
        self._clips += 1

    def close(self) -> ClipIndex:
        """Finishes the shards, writes index and manifest, and opens the result."""
        self._close_shard()
        self._write_manifest(complete=True, **merge_sidecars(self.folder, self._shards))
        return ClipIndex.open(self.folder)

    def abandon(self) -> None:
        """Removes what was written, and the folder if nothing else is in it."""
        self._close_shard()
        remove_dataset(self.folder)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _open_shard(self) -> None:
        from webdataset import TarWriter  # pulls in much of torch: only where shards are written

        name = f"shard-{len(self._shards):06d}.tar"
        self._shards.append(name)
        self._file = open(self.folder / name, "wb")  # noqa: SIM115 (closed with the shard)
        # An open file and no encoder: nothing is guessed from names or types. No time stamps, so that bytes repeat.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        self._file = None
        name = self._shards[-1]
        path = self.folder / name
        # Offsets come from the finished file: what a reader will find, not what we believe to have written.
        with tarfile.open(path, "r:") as tar:
            offsets = {member.name: member.offset_data for member in tar}
        # No time of change, so that the same clips give the same sidecar.
        record = ShardRecord(name, FileFacts(path.stat().st_size, ""), members=len(offsets))
        write_sidecar(self.folder, record, (replace(clip, offset=offsets[member]) for member, clip in self._pending))
        self._pending, self._pending_bytes = [], 0

    def _write_manifest(self, *, complete: bool, **content: Any) -> None:
        write_manifest(
            self.folder,
            {
                "complete": complete,
                "kind": self._kind,
                "description": self._description,
                "shards": [],
                **content,
            },
        )


def shard_key(number: int, name: str) -> str:
    """A WebDataset key: unique by its number, readable by its name. Keys end at the first dot, so the name has none."""
    return f"{number:06d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:80]}"


def remove_dataset(folder: Path) -> None:
    """Removes the files a `DatasetWriter` wrote into a folder, and nothing else.

    Raises ValueError for a folder whose shards somebody else made: `muybridge index` only wrote the index over them.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    if manifest["description"].get("indexed"):
        raise ValueError(f"{folder} holds the index of shards that were there before; it is not ours to overwrite")
    shards = sorted(folder.glob("shard-*.tar"))
    for path in [*shards, *(sidecar_path(folder, shard.name) for shard in shards), folder / INDEX_NAME]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or holds something else
        (folder / SIDECAR_FOLDER).rmdir()
    (folder / MANIFEST_NAME).unlink(missing_ok=True)


def json_labels(labels: dict[str, Any]) -> str:
    """Labels as the text that the index and the tar keep."""
    return json.dumps(labels, sort_keys=True, ensure_ascii=False) if labels else ""
