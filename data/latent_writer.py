"""Writing a latent cache: whole shards at a time, by any number of processes, so that a stopped one goes on where it was."""

from __future__ import annotations

import fcntl
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from zlib_ng.zlib_ng import crc32

from .index import (
    INDEX_NAME,
    Clip,
    ClipIndex,
    ShardRecord,
    merge_sidecars,
    read_manifest,
    read_record,
    sidecar_path,
    write_manifest,
    write_sidecar,
)
from .latent_cache import LatentBucket, description_digest, differences
from .shards import shard_key
from .storage import FileFacts

SHARD_BYTES = 256 * 1024 * 1024
_CLIPS_PER_SHARD = 512  # at most: a stopped process loses no more work than that, and several find enough shards
_LOCK_NAME = ".lock"
_EXTENSION = "latents.safetensors"
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_/-]*")


@dataclass(frozen=True)
class EncodedClip:
    """What goes into the cache for a row of the source."""

    row: int
    latents: torch.Tensor | None  # [z, T', H', W'], float32; None for a clip that cannot be read
    text: list[torch.Tensor] = field(default_factory=list)  # bfloat16 [S, D] of each caption, where the cache has text
    reason: str = ""  # why there are no latents


class LatentWriter:
    """Writes the missing shards of a cache. Every process that writes it opens it alike, and closes it when its shards are there.

    The source's rows are cut into shards once and for all, by the order of the rows and the size of the latents.
    """

    def __init__(
        self,
        folder: str | Path,
        source: ClipIndex,
        description: dict[str, Any],
        *,
        bucket_table: Sequence[LatentBucket],
        bucket_of_row: np.ndarray,
        text_bytes: int = 0,
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        """`bucket_of_row` is int16, -1 for rows that are not cached; `text_bytes` is about what a clip's captions take.

        Raises ValueError if the folder holds anything but this cache: another one is replaced with `overwrite`.
        """
        self.folder = Path(folder)
        self._source, self._description = source, description
        self._bucket_table, self._bucket_of_row = list(bucket_table), bucket_of_row
        sizes = [2 * int(np.prod(bucket.latent_shape)) + text_bytes for bucket in self._bucket_table]
        self._ranges = _shard_ranges(np.array([*sizes, 0])[bucket_of_row], shard_bytes)
        self._digest = description_digest(description)
        self._names = [f"shard-{self._digest}-{number:06d}.tar" for number in range(len(self._ranges))]
        self._empty_text = f"empty-text-{self._digest}.safetensors"
        # A folder of something else gets not even a lock. Where there is one, another process may be about to begin the cache.
        if self._is_of_others() and not (self.folder / _LOCK_NAME).exists():
            raise self._refusal()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self._is_of_others():
                raise self._refusal()
            self._begin(overwrite)

    def missing_shards(self) -> list[int]:
        """The numbers of the shards that are not there yet, whoever is to write them."""
        return [number for number in range(len(self._names)) if not self._has_shard(number)]

    def shards_of(self, rank: int, world_size: int) -> list[int]:
        """The numbers of the shards that one of `world_size` processes has to see to."""
        return list(range(rank, len(self._names), world_size))

    def rows(self, shard: int) -> np.ndarray:
        """The rows of a shard that are to be encoded, ascending."""
        first, end = self._ranges[shard]
        return first + np.flatnonzero(self._bucket_of_row[first:end] >= 0)

    @property
    def has_empty_text(self) -> bool:
        """Whether the features of the empty caption are there."""
        return (self.folder / self._empty_text).is_file()

    def write_empty_text(self, text: torch.Tensor) -> None:
        """Stores the features [S, D] of the empty caption, which stands for a dropped one."""
        with self._locked():
            partial = self.folder / f"{self._empty_text}.partial"
            partial.write_bytes(save({"text": _stored(text)}))
            partial.replace(self.folder / self._empty_text)

    def write_shard(self, number: int, clips: Iterable[EncodedClip]) -> None:
        """Writes a shard, whose clips must be those of `rows`, in their order. It counts only when it is whole.

        Raises ValueError if another process is writing it.
        """
        name = self._names[number]
        partial = self.folder / f"{name}.partial"
        with open(partial, "ab") as file:
            # The name may have passed to the finished shard of another process between the opening and the lock.
            if not _lock(file, wait=False) or not _is_at(file, partial):
                raise ValueError(f"{partial} is being written by another process; does this command run twice?")
            file.truncate(0)
            file.seek(0)
            members, places, failures = self._write_members(file, self.rows(number), clips)
            file.flush()
            record = ShardRecord(name, FileFacts(partial.stat().st_size, ""), members=members, rejections=failures)
            # The shard first: one without a sidecar is written again, a sidecar without its shard would be believed.
            partial.replace(self.folder / name)
        first, end = self._ranges[number]
        rows = (
            places.get(row) or replace(self._source.clip(row), offset=-1, size=0, checksum=0)
            for row in range(first, end)
        )
        write_sidecar(self.folder, record, rows)

    def failures(self) -> list[list[Any]]:
        """[row, key, reason] of the clips that could not be encoded, in all shards that are there."""
        records = (read_record(sidecar_path(self.folder, name)) for name in self._names)
        return [failure for record in records if record is not None for failure in record.rejections]

    def close(self) -> ClipIndex | None:
        """Finishes the cache if all its shards are there and opens it; None while other processes have some to write."""
        with self._locked():
            if self.missing_shards():
                return None
            manifest = read_manifest(self.folder)
            if manifest is None or not manifest["complete"] or not (self.folder / INDEX_NAME).is_file():
                self._finish()
        return ClipIndex.open(self.folder)

    def _is_of_others(self) -> bool:
        if not self.folder.is_dir():
            return False
        manifest = read_manifest(self.folder)
        if manifest is not None:
            return manifest["kind"] != "latents"
        return any(path.name != _LOCK_NAME for path in self.folder.iterdir())

    def _refusal(self) -> ValueError:
        return ValueError(f"{self.folder} is not empty and holds no latents; choose another folder")

    def _begin(self, overwrite: bool) -> None:
        manifest = read_manifest(self.folder)
        if manifest is not None and (stale := differences(manifest["description"], self._description)):
            if not overwrite:
                raise ValueError(
                    f"{self.folder} holds other latents: {', '.join(stale)}; --overwrite replaces them, or choose another "
                    "data.latents"
                )
            manifest = None
        if manifest is None or (manifest["complete"] and self.missing_shards()):
            self._write_manifest(complete=False)
        self._remove_others()

    def _remove_others(self) -> None:
        # What is left of a cache of another description, whose names are others.
        for pattern in ("shard-*.tar", "empty-text-*.safetensors", "buckets-*.npy"):
            for path in self.folder.glob(pattern):
                if f"-{self._digest}" not in path.name:
                    path.unlink(missing_ok=True)
                    sidecar_path(self.folder, path.name).unlink(missing_ok=True)

    def _has_shard(self, number: int) -> bool:
        name = self._names[number]
        record = read_record(sidecar_path(self.folder, name))
        first, end = self._ranges[number]
        if record is None or record.clips != end - first:
            return False
        with suppress(FileNotFoundError):
            return (self.folder / name).stat().st_size == record.facts.size
        return False

    def _write_members(
        self, file: io.BufferedWriter, rows: np.ndarray, clips: Iterable[EncodedClip]
    ) -> tuple[int, dict[int, Clip], list[list[Any]]]:
        places: dict[int, Clip] = {}
        failures: list[list[Any]] = []
        names: set[str] = set()
        members = 0
        with tarfile.open(fileobj=file, mode="w") as tar:
            for row, clip in zip(rows.tolist(), clips, strict=True):
                assert clip.row == row
                about = self._source.clip(row)
                if clip.latents is None:
                    failures.append([row, about.key, clip.reason])
                    continue
                tensors = {f"text.{place}": _stored(text) for place, text in enumerate(clip.text)}
                data = save({"latents": _stored(clip.latents), **tensors})
                name = _member_name(about.key, row, names)
                names.add(name)
                offset = _add(tar, f"{name}.{_EXTENSION}", data)
                places[row] = replace(about, offset=offset, size=len(data), checksum=crc32(data))
                _add(tar, f"{name}.txt", about.caption.encode())
                members += 2
                if about.labels:
                    _add(tar, f"{name}.json", about.labels.encode())
                    members += 1
        return members, places, failures

    def _finish(self) -> None:
        rows_name = f"buckets-{self._digest}.npy"
        with open(self.folder / rows_name, "wb") as file:
            np.save(file, self._bucket_of_row.astype(np.int16), allow_pickle=False)
        content: dict[str, Any] = {
            "buckets": [asdict(bucket) for bucket in self._bucket_table],
            "bucket_of_row": rows_name,
        }
        if self.has_empty_text:
            data = (self.folder / self._empty_text).read_bytes()
            content["empty_text"] = {"name": self._empty_text, "checksum": crc32(data)}
        self._write_manifest(complete=True, **content, **merge_sidecars(self.folder, self._names))

    def _write_manifest(self, *, complete: bool, **content: Any) -> None:
        write_manifest(
            self.folder,
            {"complete": complete, "kind": "latents", "description": self._description, "shards": [], **content},
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # One process at a time. A file system without locks leaves it to chance, which would have to be very unkind.
        with open(self.folder / _LOCK_NAME, "ab") as file:
            _lock(file, wait=True)
            yield


def _shard_ranges(bytes_of_row: np.ndarray, shard_bytes: int) -> list[tuple[int, int]]:
    # First row and end of every shard. Rows that are not cached cost nothing and go with those before them.
    cost = np.where(bytes_of_row > 0, np.maximum(bytes_of_row, -(-shard_bytes // _CLIPS_PER_SHARD)), 0)
    before = np.cumsum(cost) - cost
    starts = np.flatnonzero(np.diff(before // shard_bytes, prepend=-1))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(cost)]))


def _lock(file: io.BufferedWriter, *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        pass
    return True


def _is_at(file: io.BufferedWriter, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _member_name(key: str, row: int, taken: set[str]) -> str:
    # A key of somebody else's tars may be a path that leads out of a folder, or come again from another shard.
    return key if _PLAIN_KEY.fullmatch(key) and key not in taken else shard_key(row, key)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member without owner and time, so that bytes repeat; returns where its data lie."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.bfloat16).contiguous()
