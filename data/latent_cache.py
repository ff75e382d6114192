"""A latent cache: the autoencoder's output for each clip of a dataset, and a frozen text encoder's for each caption.

It has a row for each row of its source, in the same order, and WebDataset tars with a safetensors member per clip. Its manifest
says which videos, which transform and which models it belongs to; what belongs to others is refused.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from zlib_ng.zlib_ng import crc32

from .buckets import NO_BUCKET, Bucket
from .config import DataConfig
from .decode import DecodeError
from .draws import Draws
from .frame_ring import Spot
from .index import ClipIndex, read_manifest, read_record, sidecar_path
from .media_bytes import checked
from .staged import StagedShards
from .storage import is_remote

CACHE_FORMAT = 2  # 1 held float32 latents of the clips in use, and no text
REMEDY = "make it again with: muybridge encode --overwrite"

_MAPPED_SHARDS = 256  # each takes a file descriptor, of which a process has 1024 at first


@dataclass(frozen=True)
class LatentBucket:
    """A clip shape of a cache."""

    name: str  # frames x height x width of its clips
    latent_shape: tuple[int, ...]  # z, T', H', W'


def cache_description(
    source: ClipIndex, config: DataConfig, *, vae_fingerprint: str, text_fingerprint: str | None
) -> dict[str, Any]:
    """What a cache is made from, as its manifest keeps it; `text_fingerprint` None for a cache without text."""
    return {
        "cache_format": CACHE_FORMAT,
        "source": str(source.folder),
        "source_fingerprint": source.fingerprint,
        "transform": config.transform(),
        "filter": config.filter,
        "vae_fingerprint": vae_fingerprint,
        "text_fingerprint": text_fingerprint,
    }


def description_digest(description: dict[str, Any]) -> str:
    """A name for a cache's content that does not depend on where the videos lie."""
    content = {name: value for name, value in description.items() if name != "source"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=4).hexdigest()


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """How a cache's description differs from what is wanted of it, one text an item; what `wanted` leaves out may be anything."""
    if found.get("cache_format", 1) != wanted.get("cache_format", CACHE_FORMAT):
        return [f"its cache_format is {found.get('cache_format', 1)}, not {CACHE_FORMAT}"]
    have, want = _flat(found), _flat(wanted)
    # "source" is where the videos lay; they may have moved, their fingerprint says whether they are the same.
    names = [name for name in want if name != "source"]
    names += [name for name in have if name not in want and name.partition(".")[0] in wanted and name != "source"]
    return [
        f"its {name} is {have.get(name)}, not {want.get(name)}" for name in names if have.get(name) != want.get(name)
    ]


@dataclass(frozen=True)
class CacheOrigin:
    """What the latents of a run must have been made with. What is None is not compared."""

    vae_fingerprint: str | None = None
    text_fingerprint: str | None = None  # without that of a text encoder, text is not read
    videos: dict[str, str] = field(default_factory=dict)  # folder of each dataset's videos, compared where it is there


ANY_ORIGIN = CacheOrigin()


def check_cache(index: ClipIndex, config: DataConfig, name: str, origin: CacheOrigin) -> None:
    """Raises ValueError if the folder of the dataset `name` holds no latents, or not those of these settings and models."""
    where = f"data.datasets.{name}.path={index.folder}" if name else f"data.path={index.folder}"
    if index.manifest["kind"] != "latents":
        raise ValueError(f"{where} holds {index.manifest['kind']} clips; encode them first: muybridge encode")
    wanted: dict[str, Any] = {"transform": config.transform(), "filter": config.sources()[name].filter}
    videos = read_manifest(Path(origin.videos[name])) if origin.videos.get(name) else None
    compared = {
        "source_fingerprint": videos["fingerprint"] if videos and videos["complete"] else None,
        "vae_fingerprint": origin.vae_fingerprint,
        "text_fingerprint": origin.text_fingerprint,
    }
    wanted |= {item: value for item, value in compared.items() if value is not None}
    if stale := differences(index.manifest["description"], wanted):
        raise ValueError(f"{where} is stale: {', '.join(stale)}; {REMEDY}")


def cached_buckets(index: ClipIndex, buckets: Sequence[Bucket]) -> np.ndarray:
    """The bucket that every row had when the cache was made, int16, as a place in the list; -1 for rows that fit none."""
    places = {bucket.name: place for place, bucket in enumerate(buckets)}
    table = [places[bucket["name"]] for bucket in index.manifest["buckets"]]
    stored = np.load(index.folder / index.manifest["bucket_of_row"], mmap_mode="r", allow_pickle=False)
    return np.array([*table, NO_BUCKET], dtype=np.int16)[stored]  # -1 takes the last


class CachedClip(NamedTuple):
    """The latents of a clip and the features of one of its captions: views of its shard, bfloat16 as int16."""

    latents: np.ndarray  # [z, T', H', W']
    text: np.ndarray | None  # [S, D]; None where it is not wanted


class LatentCache:
    """Reads latents from memory-mapped shards, or remote ones by range: no processes, no decoding."""

    def __init__(self, index: ClipIndex, *, reads_text: bool) -> None:
        """Raises DatasetChangedError if the features of the empty caption are damaged."""
        self.is_remote = any(map(is_remote, index.shard_names))  # whether reading waits for a network
        self.counts: dict[str, int] = {}
        self._index = index
        self._staged = StagedShards(index, self.counts)
        self._shard, self._offset, self._size, self._checksum = (
            index.column(name) for name in ("shard", "offset", "size", "checksum")
        )
        self._shards: OrderedDict[Path, memoryview] = OrderedDict()
        self._lock = threading.Lock()
        self._empty_text = _read_empty_text(index) if reads_text else None
        self._shapes = {bucket["name"]: bucket["latent_shape"] for bucket in index.manifest["buckets"]}

    def read(self, row: int, bucket: Bucket, draws: Draws, spot: Spot | None = None) -> CachedClip:
        """What is cached of a row, with the features of the caption that was drawn.

        Raises DecodeError where the clip could not be encoded, DatasetChangedError, and OSError as `media_bytes.read_media` does.
        """
        del bucket, spot  # latents have the shape that they were encoded in, and lie in memory
        shard, offset, size = self._shard.item(row), self._offset.item(row), self._size.item(row)
        if size == 0:
            raise DecodeError(self._failure(row, shard))
        mapped = self._mapped(shard)
        data = None if mapped is None else mapped[offset : offset + size]
        if data is None or crc32(data) != self._checksum.item(row):
            # Once more and not from the map; says what is wrong where it is wrong again.
            data = memoryview(self._staged.read(self._index.clip(row)))
        # A safetensors file: the header's length, the header (JSON), the tensors. The checksum says it is what we wrote.
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(str(data[8:start], "ascii"))
        text = self._empty_text
        if text is not None and draws.caption is not None:
            text = _view(data, start, header[f"text.{draws.caption}"])
        return CachedClip(_view(data, start, header["latents"]), text)

    def assemble(self, bucket: Bucket, clips: Sequence[CachedClip | None]) -> dict[str, Any]:
        """The fields of a `VideoBatch` that clips of one bucket fill; None stands for a ghost."""
        # Not widened here: float32 is made on the device, from half the bytes.
        latents = np.empty((len(clips), *self._shapes[bucket.name]), dtype=np.int16)
        for place, clip in enumerate(clips):
            latents[place] = 0 if clip is None else clip.latents
        fields: dict[str, Any] = {"latents": torch.from_numpy(latents).view(torch.bfloat16)}
        if self._empty_text is not None:
            text = [self._empty_text if clip is None or clip.text is None else clip.text for clip in clips]
            writable = [bits if bits.flags.writeable else bits.copy() for bits in text]  # torch wants no other
            fields["text"] = [torch.from_numpy(bits).view(torch.bfloat16) for bits in writable]
        return fields

    def _mapped(self, shard: int) -> memoryview | None:
        # A whole shard; None for one that is not on a local path.
        copy, name = self._staged.copy(shard), self._index.shard_names[shard]
        if copy is None and is_remote(name):
            return None
        path = copy or Path(name)
        with self._lock:
            if path in self._shards:
                self._shards.move_to_end(path)
                return self._shards[path]
            try:
                with path.open("rb") as file:
                    # Private and writable, so that text needs no copy: the file stays as it is, whoever writes to a tensor.
                    found = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
            except (OSError, ValueError) as error:  # the second where it is empty
                if copy is None:
                    raise
                fault = str(error)
            else:
                self._shards[path] = found
                if len(self._shards) > _MAPPED_SHARDS:
                    self._shards.popitem(last=False)
                return found
        self._staged.abandon(shard, fault)
        return self._mapped(shard)

    def _failure(self, row: int, shard: int) -> str:
        record = read_record(sidecar_path(self._index.folder, self._index.manifest["shards"][shard]["name"]))
        reasons = {failed: reason for failed, _, reason in record.rejections} if record is not None else {}
        return reasons.get(row, "it is not in the cache")


def _read_empty_text(index: ClipIndex) -> np.ndarray:
    about = index.manifest["empty_text"]
    path = index.folder / about["name"]
    data = checked(path.read_bytes, shard=str(path), key="of the empty caption", checksum=about["checksum"])
    start = 8 + int.from_bytes(data[:8], "little")
    return _view(memoryview(data), start, json.loads(data[8:start])["text"])


def _view(data: memoryview, start: int, tensor: dict[str, Any]) -> np.ndarray:
    first, last = tensor["data_offsets"]
    assert tensor["dtype"] == "BF16"
    return np.frombuffer(data[start + first : start + last], dtype="<i2").reshape(tensor["shape"])


def _flat(items: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in items.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
