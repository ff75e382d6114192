"""What `muybridge prepare` reads: a folder of videos with caption files, or a table of paths and captions."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .captions import MAX_CAPTION_BYTES, CaptionError, caption_from_text, clean_caption

VIDEO_EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"})
VIDEO_COLUMNS = ("video", "path", "file_path", "media_path", "file_name")
CAPTION_COLUMNS = ("caption", "prompt", "text", "cap")


@dataclass(frozen=True)
class Source:
    """One video to prepare; `fault` says why it cannot be (no caption, no such file), else it is ""."""

    path: Path
    name: str  # as the user would say it: relative to the folder or the table
    caption: str
    fault: str = ""


def find_sources(source: Path) -> list[Source]:
    """All videos of a folder (subfolders included, sorted by name) or a csv/jsonl table (in its order).

    Raises ValueError if there is nothing to prepare at all.
    """
    if not source.exists():
        raise ValueError(f"SRC={source} does not exist")
    if source.is_dir():
        sources = list(_from_folder(source))
        if not sources:
            kinds = ", ".join(sorted(VIDEO_EXTENSIONS))
            raise ValueError(f"SRC={source} holds no videos ({kinds})")
        remedy = f"put the caption of {sources[0].name} into {Path(sources[0].name).with_suffix('.txt')}, and so on"
    else:
        sources = list(_from_table(source))
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
        status = source.path.stat() if source.path.is_file() else None
        digest.update(
            json.dumps(
                [source.name, source.caption, source.fault, status and status.st_size, status and status.st_mtime_ns]
            ).encode()
        )
    return digest.hexdigest()


def _from_folder(folder: Path) -> Iterator[Source]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in VIDEO_EXTENSIONS or path.name.startswith(".") or not path.is_file():
            continue
        name = path.relative_to(folder).as_posix().encode(errors="replace").decode()  # file names may be any bytes
        caption_file = path.with_suffix(".txt")
        if not caption_file.is_file():
            yield Source(path, name, "", f"no caption ({caption_file.name} is missing)")
            continue
        caption, fault = _read_caption(caption_file)
        yield Source(path, name, caption, fault)


def _read_caption(path: Path) -> tuple[str, str]:
    with path.open("rb") as file:
        data = file.read(MAX_CAPTION_BYTES + 1)
    try:
        return caption_from_text(data, name=path.name), ""
    except CaptionError as error:
        return "", str(error)


def _from_table(table: Path) -> Iterator[Source]:
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if table.suffix.lower() not in readers:
        raise ValueError(f"SRC={table} must be a folder, a .csv or a .jsonl file")
    try:
        rows = list(readers[table.suffix.lower()](table))
    except UnicodeDecodeError as error:
        raise ValueError(f"SRC={table} is not UTF-8 text (byte {error.start})") from error
    except csv.Error as error:
        raise ValueError(f"SRC={table} is not a csv table: {error}") from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    video_column, caption_column = _column(table, names, VIDEO_COLUMNS), _column(table, names, CAPTION_COLUMNS)
    for row in rows:
        name, caption = row.get(video_column), row.get(caption_column)
        if not isinstance(name, str) or not name.strip():
            yield Source(table, f"a row of {table.name}", "", f"its {video_column} is empty or not text")
            continue
        path = table.parent / name.strip()  # an absolute path stays as it is
        if not path.is_file():
            yield Source(path, name, "", "no such file")
            continue
        caption = clean_caption(caption) if isinstance(caption, str) else ""
        yield Source(path, name, caption, "" if caption else f"no caption (its {caption_column} is empty or not text)")


def _csv_rows(table: Path) -> Iterator[dict[str, object]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            yield {(name or "").strip(): value for name, value in row.items()}


def _jsonl_rows(table: Path) -> Iterator[dict[str, object]]:
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"SRC={table}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"SRC={table}, line {number} must be a JSON object with a path and a caption")
        yield row


def _column(table: Path, names: list[str], aliases: tuple[str, ...]) -> str:
    found = [name for alias in aliases for name in names if name.lower() == alias]
    if not found:
        have = ", ".join(names) or "none"
        raise ValueError(f"SRC={table} must have one of the columns {', '.join(aliases)}; it has {have}")
    return found[0]
