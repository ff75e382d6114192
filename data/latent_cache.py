"""A dataset of latents: the autoencoder's output for each clip of a video dataset, in the same shards and index.

The manifest says which videos, which transform and which autoencoder they belong to; latents that belong to others are refused.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from .buckets import Bucket
from .config import DataConfig
from .draws import MIDDLE, Draws
from .frame_ring import Spot
from .index import ClipIndex, read_manifest
from .media_bytes import checked
from .shards import DatasetWriter, remove_dataset

_TENSOR_NAME = "latents"
_DTYPES = {"F32": "<f4", "F16": "<f2"}


def cache_description(source: ClipIndex, config: DataConfig, *, vae_fingerprint: str) -> dict[str, Any]:
    """What a cache is made from, as its manifest keeps it."""
    return {
        "source": str(source.folder),
        "source_fingerprint": source.fingerprint,
        "transform": config.transform(),
        "filter": config.filter,
        "vae_fingerprint": vae_fingerprint,
    }


def has_latents(folder: str | Path, source: ClipIndex, config: DataConfig, *, vae_fingerprint: str) -> bool:
    """Whether a folder holds the finished latents of these clips, this transform and this autoencoder."""
    manifest = read_manifest(Path(folder))
    wanted = cache_description(source, config, vae_fingerprint=vae_fingerprint)
    return manifest is not None and manifest["complete"] and _differences(manifest["description"], wanted) == []


class LatentWriter:
    """Writes a latent cache row by row; use it as a context, and call `close` at the end.

    Raises ValueError if the folder holds anything but an earlier cache.
    """

    def __init__(
        self,
        folder: str | Path,
        source: ClipIndex,
        config: DataConfig,
        *,
        vae_fingerprint: str,
        shard_bytes: int = 256_000_000,
    ) -> None:
        folder = Path(folder)
        manifest = read_manifest(folder)
        if folder.is_dir() and any(folder.iterdir()) and (manifest is None or manifest["kind"] != "latents"):
            raise ValueError(f"{folder} is not empty and holds no latents; choose another folder")
        remove_dataset(folder)
        self._source = source
        description = cache_description(source, config, vae_fingerprint=vae_fingerprint)
        self._writer = DatasetWriter(folder, kind="latents", description=description, shard_bytes=shard_bytes)

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)

    def add(self, row: int, latents: torch.Tensor) -> None:
        """Appends the latents [z, T', H', W'] (float32 or float16) of a row of the source."""
        data = save({_TENSOR_NAME: latents.detach().cpu().contiguous()})
        self._writer.add(self._source.clip(row), data, extension="latents.safetensors")

    def close(self) -> ClipIndex:
        """Finishes the cache; before this it counts as unfinished."""
        return self._writer.close()


class LatentCache:
    """Reads latents by memory-mapped shards: no processes, no decoding.

    Raises ValueError if the folder holds no latents or those of another transform or autoencoder.
    """

    def __init__(self, index: ClipIndex, config: DataConfig, *, vae_fingerprint: str | None = None) -> None:
        where = f"data.path={index.folder}"
        if index.manifest["kind"] != "latents":
            raise ValueError(f"{where} holds {index.manifest['kind']} clips; encode them first: muybridge encode")
        wanted: dict[str, Any] = {"transform": config.transform(), "filter": config.filter}
        if vae_fingerprint is not None:
            wanted["vae_fingerprint"] = vae_fingerprint
        if stale := _differences(index.manifest["description"], wanted):
            raise ValueError(f"{where} is stale: {', '.join(stale)}; make it again with: muybridge encode")
        self.counts: dict[str, int] = {}
        self._index = index
        self._columns = [index.column(name) for name in ("shard", "offset", "size", "checksum")]
        self._shards: dict[int, mmap.mmap] = {}
        self._blanks: dict[str, np.ndarray] = {}

    def read(self, row: int, bucket: Bucket, draws: Draws, spot: Spot | None = None) -> np.ndarray:
        """Latents of a row, float32 [z, T', H', W']. Raises DatasetChangedError."""
        del bucket, draws, spot  # latents are of the middle of the clip, in the shape that it was encoded in
        shard, offset, size, checksum = (int(column[row]) for column in self._columns)
        data = checked(
            lambda: memoryview(self._mapped(shard))[offset : offset + size],
            shard=self._index.shard_names[shard],
            key=self._index.text("key", row),
            checksum=checksum,
        )
        # A safetensors file: the header's length, the header (JSON), the tensors. The checksum says it is what we wrote.
        start = 8 + int.from_bytes(data[:8], "little")
        tensor = json.loads(str(data[8:start], "utf-8"))[_TENSOR_NAME]
        first, last = tensor["data_offsets"]
        values = np.frombuffer(data[start + first : start + last], dtype=_DTYPES[tensor["dtype"]])
        return values.reshape(tensor["shape"]).astype(np.float32, copy=False)

    def blank(self, bucket: Bucket, rows: np.ndarray) -> np.ndarray:
        """Zeros in the shape of the latents of a bucket, given its rows."""
        if bucket.name not in self._blanks:
            self._blanks[bucket.name] = np.zeros_like(self.read(int(rows[0]), bucket, MIDDLE))
        return self._blanks[bucket.name]

    def _mapped(self, shard: int) -> mmap.mmap:
        if shard not in self._shards:
            with self._index.shards[shard].open("rb") as file:
                self._shards[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._shards[shard]


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    # "source" is where the videos lay; they may have moved, their fingerprint says whether they are the same.
    different = [name for name, value in wanted.items() if name != "source" and found.get(name) != value]
    return [f"its {name} is {found.get(name)}, not {wanted[name]}" for name in different]
