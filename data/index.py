"""The index of a dataset folder: one row per clip, in Arrow files that are memory-mapped and never unpickled.

A dataset folder holds `manifest.json` (which shards there are, what they were made from, and the dataset's fingerprint), a sidecar
per shard under `index/` (where each clip's bytes lie and what they are) and `index.arrow`, which is all sidecars in one. The
shards themselves, WebDataset tars, lie in the folder or anywhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from zlib_ng.zlib_ng import crc32

from .storage import FileFacts, TransientReadError, file_facts, is_remote

INDEX_NAME = "index.arrow"
MANIFEST_NAME = "manifest.json"
SIDECAR_FOLDER = "index"
FORMAT = "muybridge-dataset"
FORMAT_VERSION = 2

_READABLE_VERSIONS = (1, FORMAT_VERSION)  # version 1 had fewer columns and no sidecars
_REMOTE_CHECKS = 32  # at a time
_SHARD_KEY = b"muybridge.shard"  # what the schema of a sidecar says of its shard

_SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("shard", pa.int32()),  # place in the manifest's list of shards
        ("offset", pa.int64()),  # of the media bytes in the shard
        ("size", pa.int64()),
        ("caption", pa.large_string()),
        ("frames", pa.int32()),
        ("fps_numerator", pa.int32()),
        ("fps_denominator", pa.int32()),
        ("duration_seconds", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seekable", pa.bool_()),
        ("checksum", pa.uint32()),  # CRC-32 of the media bytes
        ("labels", pa.large_string()),  # JSON object, "" for none
        ("caption_choices", pa.large_string()),  # JSON list, "" for one caption
        ("caption_checksum", pa.uint32()),  # CRC-32 of the captions
        ("pixel_format", pa.large_string()),
        ("bit_depth", pa.int8()),
        ("is_image", pa.bool_()),
        ("has_audio", pa.bool_()),
        ("is_variable_rate", pa.bool_()),
        ("is_hdr", pa.bool_()),
        ("luma", pa.float32()),  # these three are null where they were not measured
        ("sharpness", pa.float32()),
        ("motion", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Clip:
    """One row of the index: where the media bytes lie, and what is in them.

    In a latent cache the bytes are the latents; frames, rate, duration and size still describe the video.
    """

    key: str
    caption: str
    frames: int
    fps_numerator: int
    fps_denominator: int
    duration_seconds: float
    width: int  # pixels, after rotation
    height: int
    seekable: bool  # see `decode.VideoInfo`
    labels: str = ""  # JSON object, "" for none
    shard: int = (
        -1
    )  # place in the manifest's list of shards; this and the next three are filled in by `DatasetWriter.add`
    offset: int = -1  # of the media bytes in the shard
    size: int = -1  # of the media bytes
    # CRC-32 (zlib's) of the media bytes. CRC-32C would find no more damage and need a package of its own.
    checksum: int = 0
    caption_choices: str = ""  # JSON list of all captions where there are several, else ""; `caption` is the first
    pixel_format: str = ""  # see `media_info.MediaInfo` for this and the next five
    bit_depth: int = 0
    is_image: bool = False
    has_audio: bool = False
    is_variable_rate: bool = False
    is_hdr: bool = False
    luma: float | None = None  # see `quality.Quality` for these three; null where it was not measured
    sharpness: float | None = None
    motion: float | None = None

    @property
    def label_values(self) -> dict[str, Any]:
        """The labels as a dictionary, such as colour, shape and direction of a synthetic clip."""
        return json.loads(self.labels) if self.labels else {}

    @property
    def captions(self) -> list[str]:
        """All captions, the first of which is `caption`."""
        return json.loads(self.caption_choices) if self.caption_choices else [self.caption]

    @property
    def caption_checksum(self) -> int:
        """CRC-32 of the captions."""
        return crc32("\n".join(self.captions).encode())


_CLIP_FIELDS = [f.name for f in fields(Clip)]


class ClipIndex:
    """A dataset folder opened for reading. Build it with `ClipIndex.open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], table: pa.Table) -> None:
        self.folder = folder
        self.manifest = manifest
        self._columns = {name: table.column(name) for name in _SCHEMA.names}
        self.shard_names = [located(folder, shard["name"]) for shard in manifest["shards"]]  # paths or URLs

    @classmethod
    def open(
        cls, folder: str | Path, *, field: str = "data.path", made_by: str = "muybridge prepare SRC OUT"
    ) -> ClipIndex:
        """Opens a dataset folder; `field` is how an error names it, `made_by` the command that makes it.

        Raises ValueError if the folder, its index or one of its shards is missing, unfinished or changed since, and
        TransientReadError where a storage does not answer.
        """
        folder = Path(folder)
        remedy = f"make it with: {made_by}"
        if not folder.is_dir():
            raise ValueError(f"{field}={folder} does not exist; {remedy}")
        manifest = read_manifest(folder)
        if manifest is None:
            parts = sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST_NAME}"))
            if not parts and any(folder.glob("*.tar")):
                remedy = f"index its tars with: muybridge index {folder}"
            hint = f"did you mean {' or '.join(parts)}?" if parts else remedy
            raise ValueError(f"{field}={folder} is no dataset (it has no {MANIFEST_NAME} of ours); {hint}")
        if not manifest["complete"] or not (folder / INDEX_NAME).is_file():
            raise ValueError(f"{field}={folder} is unfinished; {remedy}")
        table = _read_table(folder / INDEX_NAME, manifest["version"])
        if table is None or len(table) != manifest["clips"]:
            raise ValueError(f"{field}={folder}: {INDEX_NAME} does not belong to its {MANIFEST_NAME}; {remedy}")
        index = cls(folder, manifest, table)
        if changed := index._changed_shards():
            if manifest["description"].get("indexed"):
                remedy = f"index it again with: muybridge index {manifest['description']['source']} {folder}"
            raise ValueError(f"{field}={folder} changed since it was indexed: {', '.join(changed)}; {remedy}")
        return index

    def __len__(self) -> int:
        return self.manifest["clips"]

    @property
    def fingerprint(self) -> str:
        """Changes if and only if a clip, a caption or their order does."""
        return self.manifest["fingerprint"]

    @property
    def shards(self) -> list[Path]:
        """The shards of a dataset whose shards are all local."""
        return [Path(name) for name in self.shard_names]

    def clip(self, row: int) -> Clip:
        """The clip of a row."""
        return Clip(**{name: self._columns[name][row].as_py() for name in _CLIP_FIELDS})

    def text(self, name: str, row: int) -> str:
        """One value of a text column (key, caption, labels), cheaper than the whole clip."""
        column = self._columns[name]
        # All rows are one chunk as we write them; asking it directly takes half the time.
        return (column.chunk(0) if column.num_chunks == 1 else column)[row].as_py()

    def captions(self, row: int) -> list[str]:
        """All captions of a row, in the order of the dataset."""
        choices = self.text("caption_choices", row)
        return json.loads(choices) if choices else [self.text("caption", row)]

    def column(self, name: str) -> np.ndarray:
        """A numeric column for all rows, read-only and memory-mapped where its type allows; NaN where it was not measured."""
        column = self._columns[name]
        return column.chunk(0).to_numpy(zero_copy_only=False) if column.num_chunks == 1 else column.to_numpy()

    def _changed_shards(self) -> list[str]:
        def change(place: int) -> str:
            shard, name = self.manifest["shards"][place], self.shard_names[place]
            try:
                size = file_facts(name).size
            except FileNotFoundError:
                return f"{shard['name']} is missing"
            except TransientReadError:  # nothing is wrong with the dataset
                raise
            except OSError as error:
                return f"{shard['name']} cannot be read ({error})"
            return "" if size == shard["bytes"] else f"{shard['name']} has {size} bytes, not {shard['bytes']}"

        places = range(len(self.shard_names))
        if not any(map(is_remote, self.shard_names)):
            return [text for text in map(change, places) if text]
        with ThreadPoolExecutor(_REMOTE_CHECKS) as threads:
            return [text for text in threads.map(change, places) if text]


@dataclass(frozen=True)
class ShardRecord:
    """What a sidecar says of its shard, besides its clips."""

    name: str  # relative to the dataset folder where it lies there, else an absolute path or URL
    facts: FileFacts  # version "" for shards of ours, whose files come out the same at any time
    members: int
    clips: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # what it was indexed with
    rejections: list[list[Any]] = field(default_factory=list)  # [offset, key, reason] of what is left out
    warnings: list[str] = field(default_factory=list)


def sidecar_path(folder: Path, shard_name: str) -> Path:
    """Where the sidecar of a shard lies."""
    stem = os.path.basename(shard_name).partition(".")[0][:80]
    digest = hashlib.blake2b(shard_name.encode(errors="surrogateescape"), digest_size=6).hexdigest()
    return folder / SIDECAR_FOLDER / f"{stem}-{digest}.arrow"


def write_sidecar(folder: Path, record: ShardRecord, clips: Iterable[Clip]) -> None:
    """Writes the sidecar of a shard in one stroke."""
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for clip in clips:
        for name, values in columns.items():
            values.append(getattr(clip, name))
    about = {
        "name": record.name,
        "bytes": record.facts.size,
        "version": record.facts.version,
        "members": record.members,
        "clips": len(columns["key"]),
        "settings": record.settings,
        "rejections": record.rejections,
        "warnings": record.warnings,
    }
    table = pa.table(columns, schema=_SCHEMA.with_metadata({_SHARD_KEY: json.dumps(about).encode()}))
    path = sidecar_path(folder, record.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_table(path, table)


def read_record(path: Path) -> ShardRecord | None:
    """What a sidecar says of its shard; None where there is none that can be used."""
    try:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_file(file).schema
        about = json.loads((schema.metadata or {})[_SHARD_KEY])
        facts = FileFacts(about.pop("bytes"), about.pop("version"))
        record = ShardRecord(facts=facts, **about)
    except (OSError, KeyError, TypeError, ValueError):  # pa.ArrowInvalid is a ValueError
        return None
    return record if schema.equals(_SCHEMA) else None


def merge_sidecars(folder: Path, shard_names: list[str]) -> dict[str, Any]:
    """Writes the index file from the sidecars of all shards, in their order; returns what the manifest says of it.

    Raises ValueError if a sidecar is missing or damaged.
    """
    digest = hashlib.blake2b(digest_size=16)
    tables, shards = [], []
    for place, name in enumerate(shard_names):
        path = sidecar_path(folder, name)
        record = read_record(path)
        if record is None:
            raise ValueError(f"{path} is missing or damaged; index the dataset again with: muybridge index")
        content = path.read_bytes()
        table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        for key, size, checksum, caption, choices in zip(
            *(table.column(c).to_pylist() for c in ("key", "size", "checksum", "caption", "caption_choices"))
        ):
            # Not the shard and the offset: the same clips in other shards are the same data.
            digest.update(json.dumps([key, size, checksum, caption, *([choices] if choices else [])]).encode())
        places = pa.array(np.full(len(table), place, dtype=np.int32))
        tables.append(table.replace_schema_metadata().set_column(_SCHEMA.get_field_index("shard"), "shard", places))
        shards.append(
            {
                "name": record.name,
                "bytes": record.facts.size,
                "clips": len(table),
                "version": record.facts.version,
                "members": record.members,
                "sidecar": f"{SIDECAR_FOLDER}/{path.name}",
                "sidecar_hash": hashlib.blake2b(content, digest_size=16).hexdigest(),
            }
        )
    # One chunk per column: a numeric column is then a view of the file, which the processes of a machine share.
    table = pa.concat_tables([_SCHEMA.empty_table(), *tables]).combine_chunks()
    _write_table(folder / INDEX_NAME, table)
    return {"shards": shards, "clips": len(table), "fingerprint": digest.hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a dataset folder, or None where there is none of ours."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    if manifest.get("version") not in _READABLE_VERSIONS:
        raise ValueError(f"{folder / MANIFEST_NAME}: version={manifest.get('version')} must be 1..{FORMAT_VERSION}")
    return manifest


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes a manifest in one stroke: readers see the old one or the new one."""
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, **content}
    partial = folder / f"{MANIFEST_NAME}.partial"
    partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST_NAME)


def located(folder: Path, name: str) -> str:
    """The path or URL of a shard that a manifest calls `name`."""
    return name if is_remote(name) else str(folder / name)  # an absolute path stays as it is


def _write_table(path: Path, table: pa.Table) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    partial.replace(path)


def _read_table(path: Path, version: int) -> pa.Table | None:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid:
        return None
    if version == 1:
        blanks: dict[pa.DataType, Any] = {pa.large_string(): "", pa.bool_(): False, pa.float32(): None}
        for column in list(_SCHEMA)[len(table.schema) :]:
            table = table.append_column(column, pa.array([blanks.get(column.type, 0)] * len(table), column.type))
    return table if table.schema.equals(_SCHEMA) else None
