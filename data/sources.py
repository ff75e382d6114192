"""What `muybridge prepare` reads: folders of media with captions beside them, tables of paths or bytes with captions, or tars."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .captions import (
    MAX_CAPTION_BYTES,
    CaptionError,
    NoCaptionError,
    caption_from_text,
    captions_from_json,
    clean_caption,
    printable,
)
from .storage import TAR_ENDINGS, RangeReader, find_shards, is_text
from .tar_members import TarError
from .tar_samples import CAPTION_EXTENSIONS, DEFAULT_CAPTION_FIELD, CaptionRules, read_samples

VIDEO_EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"})
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
VIDEO_COLUMNS = ("video", "path", "file_path", "media_path", "file_name", "image", "mp4", "bytes")
CAPTION_COLUMNS = ("caption", "prompt", "text", "cap")

_SHOWN_TARS = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One video or image to prepare; `fault` says why it cannot be (no caption, no such file), else it is "".

    Its bytes are a file, a part of one (`size` is set, for tars), or a cell of a parquet table (`column` is set).
    """

    path: Path
    name: str  # as the user would say it: relative to the folder or the table
    caption: str
    fault: str = ""
    offset: int = 0  # bytes
    size: int | None = None  # bytes
    column: str = ""
    row: int = 0  # of the parquet table
    extension: str = ""  # "mp4"; "" to be told from the bytes
    captions: list[str] = field(default_factory=list)  # all of them where there are several
    labels: str = ""  # JSON object, "" for none


def find_sources(source: Path, rules: CaptionRules | None = None) -> list[Source]:
    """All media of a folder (subfolders included, sorted by name), a csv, jsonl or parquet table, or tars, in their order.

    A folder without any videos and images, but with tars, stands for these. Raises ValueError if there is nothing to prepare at
    all, or a tar is damaged.
    """
    rules = rules or CaptionRules()
    if not source.exists():
        raise ValueError(f"SRC={source} does not exist")
    if not is_text(str(source)):
        raise ValueError(f"SRC={str(source)!r} is not UTF-8; rename it")
    if source.is_dir():
        sources = list(_from_folder(source, rules))
        if not sources and any(source.rglob("*.tar*")):
            sources = _from_tars(source, rules)
        if not sources:
            kinds = ", ".join([*sorted(VIDEO_EXTENSIONS), *sorted(IMAGE_EXTENSIONS)])
            raise ValueError(f"SRC={source} holds no videos or images ({kinds})")
        remedy = f"put the caption of {sources[0].name} into {Path(sources[0].name).with_suffix('.txt')}, and so on"
    elif source.name.lower().endswith(TAR_ENDINGS):
        sources = _from_tars(source, rules)
        remedy = "see --caption-field and --default-caption"
    else:
        sources = list(_from_table(source, rules))
        if not sources:
            raise ValueError(f"SRC={source} has no rows")
        remedy = "fill its caption column"
    if all(s.fault.startswith("no caption") for s in sources):
        raise ValueError(f"SRC={source}: none of its {len(sources)} videos has a caption; {remedy}")
    return sources


def listing_fingerprint(sources: list[Source]) -> str:
    """Changes when a file's name, size or time of change, or a caption does."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        status = source.path.stat() if os.path.isfile(source.path) else None
        facts: list[Any] = [source.name, source.caption, source.fault]
        facts += [status and status.st_size, status and status.st_mtime_ns]
        if source.size is not None or source.column or source.captions:
            facts += [source.offset, source.size, source.column, source.row, source.captions]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def _from_folder(folder: Path, rules: CaptionRules) -> Iterator[Source]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
        and not path.name.startswith(".")
        and (path.is_file() or not path.exists())
    ]
    videos = {path.with_suffix("") for path in found if path.suffix.lower() in VIDEO_EXTENSIONS}
    for path in found:
        caption_file = _caption_file(path, rules)
        # Beside videos, pictures without captions or with a video's name are previews.
        is_preview = path.with_suffix("") in videos or caption_file is None
        if videos and path.suffix.lower() in IMAGE_EXTENSIONS and is_preview:
            continue
        name = printable(path.relative_to(folder).as_posix())  # file names may be any bytes
        extension = path.suffix[1:].lower()
        if not path.exists():
            yield Source(path, name, "", "no such file: the link leads nowhere")
            continue
        try:
            captions = _read_captions(path, caption_file, rules)
        except CaptionError as error:
            yield Source(path, name, "", str(error), extension=extension)
            continue
        several = captions if len(captions) > 1 else []
        yield Source(path, name, captions[0], extension=extension, captions=several)


def _caption_file(path: Path, rules: CaptionRules) -> Path | None:
    extensions = ("json",) if rules.field is not None else CAPTION_EXTENSIONS
    candidates = (path.with_suffix(f".{extension}") for extension in extensions)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_captions(path: Path, caption_file: Path | None, rules: CaptionRules) -> list[str]:
    try:
        if caption_file is None:
            wanted = path.with_suffix(".txt" if rules.field is None else ".json")
            raise NoCaptionError(f"no caption ({printable(wanted.name)} is missing)")
        with caption_file.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
        name = printable(caption_file.name)
        if caption_file.suffix == ".json":
            return captions_from_json(data, field=rules.field or DEFAULT_CAPTION_FIELD, name=name)
        return [caption_from_text(data, name=name)]
    except NoCaptionError:
        if rules.default is None:
            raise
        return [clean_caption(rules.default)]


def _from_tars(source: Path, rules: CaptionRules) -> list[Source]:
    found: list[Source] = []
    faults = []
    for shard in find_shards(str(source)):
        name = Path(shard).relative_to(source).as_posix() if source.is_dir() else Path(shard).name
        try:
            with RangeReader(shard) as reader:
                content = read_samples(reader, rules, shard=name)
        except (TarError, OSError) as error:
            faults.append(f"{name}: {error}")
            continue
        for warning in content.warnings:
            _log.warning("%s: %s", name, warning)
        if content.duplicates:
            faults.append(f"{name}: {content.duplicates[0].reason}; --allow-duplicates=first keeps the first of each")
        found += [
            Source(
                Path(shard),
                f"{name}/{sample.key}",
                sample.captions[0],
                offset=sample.media.offset,
                size=sample.media.size,
                extension=sample.extension,
                captions=sample.captions if len(sample.captions) > 1 else [],
                labels=sample.labels,
            )
            for sample in content.samples
        ]
        found += [Source(Path(shard), f"{name}/{r.key}", "", r.reason) for r in content.rejections]
    if faults:
        listed = "\n  ".join(faults[:_SHOWN_TARS])
        more = f"\n  and {len(faults) - _SHOWN_TARS} more" if len(faults) > _SHOWN_TARS else ""
        raise ValueError(f"SRC={source}: {len(faults)} tars cannot be used:\n  {listed}{more}\nMend or remove them")
    return found


def _from_table(table: Path, rules: CaptionRules) -> Iterator[Source]:
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if table.suffix.lower() not in readers:
        raise ValueError(f"SRC={table} must be a folder, a .csv, .jsonl or .parquet table, or a .tar")
    try:
        rows = list(readers[table.suffix.lower()](table))
    except UnicodeDecodeError as error:
        raise ValueError(f"SRC={table} is not UTF-8 text (byte {error.start})") from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    video_column, caption_column = _column(table, names, VIDEO_COLUMNS), _column(table, names, CAPTION_COLUMNS)
    for number, row in enumerate(rows):
        text, media = row.get(caption_column), row.get(video_column)
        is_large = isinstance(text, str) and len(text.encode(errors="surrogatepass")) > MAX_CAPTION_BYTES
        caption = clean_caption(text) if isinstance(text, str) and not is_large else ""
        fault = ""
        if is_large:
            fault = f"caption is too large (its {caption_column} has more than 1 MiB)"
        elif not caption and rules.default is None:
            fault = f"no caption (its {caption_column} is empty or not text)"
        caption = caption or clean_caption(rules.default or "")
        if isinstance(media, _Bytes):
            yield Source(table, f"row {number}", caption, fault, column=video_column, row=number)
        elif not isinstance(media, str) or not media.strip():
            yield Source(table, f"a row of {table.name}", "", f"its {video_column} is empty or not text")
        elif not os.path.isfile(path := table.parent / media.strip()):  # an absolute path stays as it is
            yield Source(path, printable(media), "", "no such file")
        else:
            yield Source(path, printable(media), caption, fault, extension=path.suffix[1:].lower())


def _csv_rows(table: Path) -> Iterator[dict[str, object]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                yield {(name or "").strip(): value for name, value in row.items()}
        except (
            csv.Error
        ) as error:  # such as a cell of more than 128 KiB, which is what a quote that is never closed gives
            raise ValueError(f"SRC={table} is not a csv table: {error} (after line {rows.line_num})") from error


def _jsonl_rows(table: Path) -> Iterator[dict[str, object]]:
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"SRC={table}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"SRC={table}, line {number} must be a JSON object with a path and a caption")
        yield row


class _Bytes:
    # Stands for a cell of bytes, which are read one at a time when they are needed.
    pass


def _parquet_rows(table: Path) -> Iterator[dict[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(table) as file:
            schema = file.schema_arrow
            # Bytes alone, or with their file's name as Hugging Face's datasets have them.
            heavy = [f.name for f in schema if pa.types.is_struct(f.type) or _is_binary(f.type)]
            light = [
                name
                for name in schema.names
                if name not in heavy and name.lower() in (*VIDEO_COLUMNS, *CAPTION_COLUMNS)
            ]
            rows = file.read(columns=light).to_pylist() if light else [{} for _ in range(file.metadata.num_rows)]
            others = dict.fromkeys(schema.names)  # to name them where no column fits
    except pa.ArrowException as error:
        raise ValueError(f"SRC={table} is not a parquet table: {error}") from error
    for row in rows:
        yield {**others, **row, **{name: _Bytes() for name in heavy}}


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _column(table: Path, names: list[str], aliases: tuple[str, ...]) -> str:
    found = [name for alias in aliases for name in names if name.lower() == alias]
    if not found:
        have = ", ".join(names) or "none"
        raise ValueError(f"SRC={table} must have one of the columns {', '.join(aliases)}; it has {have}")
    return found[0]
