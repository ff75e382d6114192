"""The index of a dataset folder: one row per clip, in an Arrow file that is memory-mapped and never unpickled.

A dataset folder holds WebDataset tars, `index.arrow` (where each clip's bytes lie and what they are) and
`manifest.json` (which shards there are, what they were made from, and the dataset's fingerprint).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

INDEX_NAME = "index.arrow"
MANIFEST_NAME = "manifest.json"
FORMAT = "muybridge-dataset"
FORMAT_VERSION = 1

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
    shard: int = -1  # place in the manifest's list of shards; this and the rest are filled in by `DatasetWriter.add`
    offset: int = -1  # of the media bytes in the shard
    size: int = -1  # of the media bytes
    checksum: int = 0  # CRC-32 of the media bytes

    @property
    def label_values(self) -> dict[str, Any]:
        """The labels as a dictionary, such as colour, shape and direction of a synthetic clip."""
        return json.loads(self.labels) if self.labels else {}


class ClipIndex:
    """A dataset folder opened for reading. Build it with `ClipIndex.open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], table: pa.Table) -> None:
        self.folder = folder
        self.manifest = manifest
        self._columns = {name: table.column(name) for name in _SCHEMA.names}
        self.shards = [folder / shard["name"] for shard in manifest["shards"]]

    @classmethod
    def open(
        cls, folder: str | Path, *, field: str = "data.path", made_by: str = "muybridge prepare SRC OUT"
    ) -> ClipIndex:
        """Opens a dataset folder; `field` is how an error names it, `made_by` the command that makes it.

        Raises ValueError if the folder, its index or one of its shards is missing, unfinished or changed since.
        """
        folder = Path(folder)
        remedy = f"make it with: {made_by}"
        if not folder.is_dir():
            raise ValueError(f"{field}={folder} does not exist; {remedy}")
        manifest = read_manifest(folder)
        if manifest is None:
            parts = sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST_NAME}"))
            hint = f"did you mean {' or '.join(parts)}?" if parts else remedy
            raise ValueError(f"{field}={folder} is no dataset (it has no {MANIFEST_NAME} of ours); {hint}")
        if not manifest["complete"] or not (folder / INDEX_NAME).is_file():
            raise ValueError(f"{field}={folder} is unfinished; {remedy}")
        table = pa.ipc.open_file(pa.memory_map(str(folder / INDEX_NAME))).read_all()
        if table.schema != _SCHEMA or len(table) != manifest["clips"]:
            raise ValueError(f"{field}={folder}: {INDEX_NAME} does not belong to its {MANIFEST_NAME}; {remedy}")
        changed = []
        for shard in manifest["shards"]:
            path = folder / shard["name"]
            if not path.is_file():
                changed.append(f"{shard['name']} is missing")
            elif path.stat().st_size != shard["bytes"]:
                changed.append(f"{shard['name']} has {path.stat().st_size} bytes, not {shard['bytes']}")
        if changed:
            raise ValueError(f"{field}={folder} changed since it was indexed: {', '.join(changed)}; {remedy}")
        return cls(folder, manifest, table)

    def __len__(self) -> int:
        return self.manifest["clips"]

    @property
    def fingerprint(self) -> str:
        """Changes if and only if a clip, a caption or their order does."""
        return self.manifest["fingerprint"]

    def clip(self, row: int) -> Clip:
        """The clip of a row."""
        return Clip(**{name: column[row].as_py() for name, column in self._columns.items()})

    def text(self, name: str, row: int) -> str:
        """One value of a text column (key, caption, labels), cheaper than the whole clip."""
        return self._columns[name][row].as_py()

    def column(self, name: str) -> np.ndarray:
        """A numeric column for all rows."""
        return self._columns[name].to_numpy()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a dataset folder, or None where there is none of ours."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    if manifest.get("version") != FORMAT_VERSION:
        raise ValueError(f"{folder / MANIFEST_NAME}: version={manifest.get('version')} must be {FORMAT_VERSION}")
    return manifest


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes a manifest in one stroke: readers see the old one or the new one."""
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, **content}
    partial = folder / f"{MANIFEST_NAME}.partial"
    partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST_NAME)


def write_index(folder: Path, clips: Iterable[Clip]) -> tuple[int, str]:
    """Writes the Arrow file; returns the number of clips and the fingerprint of their content and order."""
    digest = hashlib.blake2b(digest_size=16)
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    count = 0
    for clip in clips:
        count += 1
        for name, value in asdict(clip).items():
            columns[name].append(value)
        # Not the shard and the offset: the same clips in other shards are the same data.
        digest.update(json.dumps([clip.key, clip.size, clip.checksum, clip.caption]).encode())
    table = pa.table(columns, schema=_SCHEMA)
    with pa.OSFile(str(folder / INDEX_NAME), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        writer.write_table(table)
    return count, digest.hexdigest()
