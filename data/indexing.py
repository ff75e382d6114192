"""Building the index over tars that are already there: each shard is read once, and again only when it changed."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from .decode import DecodeError
from .index import (
    INDEX_NAME,
    MANIFEST_NAME,
    SIDECAR_FOLDER,
    Clip,
    ClipIndex,
    ShardRecord,
    located,
    merge_sidecars,
    read_manifest,
    read_record,
    sidecar_path,
    write_manifest,
    write_sidecar,
)
from .storage import FileFacts, RangeReader, file_facts, find_shards, is_remote, read_range
from .tar_members import Member, TarError
from .tar_samples import CaptionRules, Rejection, Sample, ShardContent, read_samples, reason_class
from .workers import WorkerPool

REPORT_NAME = f"{SIDECAR_FOLDER}/rejected.jsonl"  # not beside the shards, where `prepare` has its own
CONTAINERS = ["mp4", "matroska", "image"]

_FACTS_AT_A_TIME = 16
_SHOWN = 20
_VERSION = 2  # raise it when the same shard would give another sidecar


@dataclass(frozen=True)
class IndexSettings:
    """What a sidecar depends on, besides its shard."""

    captions: CaptionRules = field(default_factory=CaptionRules)
    decode: bool = True  # decode videos in full; else look at their packets only
    quality: bool = False  # measure luma, sharpness and motion

    def described(self) -> dict[str, Any]:
        """The settings as a sidecar keeps them."""
        return {"version": _VERSION, **asdict(self)}


@dataclass
class IndexReport:
    """What became of the shards and samples."""

    shards: int = 0
    read_shards: int = 0  # the others were unchanged
    clips: int = 0
    rejections: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)  # shards that cannot be used, each with the reason

    def counts(self) -> Counter[str]:
        """How many samples were left out for each class of reasons."""
        return Counter(reason_class(rejection.reason) for rejection in self.rejections)


class Progress:
    """Told how many bytes of shards there are to read and how many are done; this one keeps it to itself."""

    def start(self, total_bytes: int) -> None:
        """Called once."""

    def advance(self, done_bytes: int) -> None:
        """Called from several threads."""


def build_index(
    source: str,
    out: Path,
    *,
    settings: IndexSettings,
    workers: int,
    timeout_seconds: float,
    max_rejected_share: float = 0.5,
    skip_damaged: bool = False,
    progress: Progress | None = None,
) -> tuple[ClipIndex, IndexReport]:
    """Indexes the shards that `source` names (see `storage.find_shards`) into the folder `out`, which may be theirs.

    Every sidecar is kept as soon as its shard is done, so an interrupted call continues where it was. Raises ValueError, naming
    all shards that cannot be read, unless `skip_damaged`; and if a larger share of samples than `max_rejected_share` is left out.
    """
    check_target(source, out)
    names = [_name_in_manifest(out, shard) for shard in find_shards(source)]
    earlier = {shard["name"]: shard for shard in (read_manifest(out) or {"shards": []})["shards"]}
    out.mkdir(parents=True, exist_ok=True)
    report = IndexReport(shards=len(names))
    facts = _all_facts(out, names, report)
    wanted = settings.described()
    stale = [name for name in names if name in facts and not _is_current(out, name, facts[name], wanted)]
    progress = progress or Progress()
    progress.start(sum(facts[name].size for name in stale))
    with _pool_that_stops(workers, timeout_seconds) as (pool, stop):
        jobs = {
            name: pool.run(_index_shard, out, name, settings, earlier.get(name, {}), pool, progress, stop)
            for name in stale
        }
        for name, job in jobs.items():
            if fault := job.result():
                report.damaged[name] = fault
    report.read_shards = len(stale)
    good = [name for name in names if name not in report.damaged]
    for name in good:
        _add_to_report(report, out, name)
    whole_shards = [Rejection(name, 0, "", reason) for name, reason in report.damaged.items()]
    write_report(out / REPORT_NAME, [*whole_shards, *report.rejections])
    _check_report(report, source, out, max_rejected_share=max_rejected_share, skip_damaged=skip_damaged)
    description = {"source": source, "indexed": wanted}
    write_manifest(out, {"complete": True, "kind": "raw", "description": description, **merge_sidecars(out, good)})
    return ClipIndex.open(out), report


def is_up_to_date(source: str, out: Path, settings: IndexSettings) -> bool:
    """Whether the folder holds the finished index of these shards, none of which changed."""
    manifest = read_manifest(out)
    if manifest is None or not manifest["complete"] or not (out / INDEX_NAME).is_file():
        return False
    names = [_name_in_manifest(out, shard) for shard in find_shards(source)]
    if [shard["name"] for shard in manifest["shards"]] != names:
        return False
    facts = _all_facts(out, names, IndexReport())
    return all(name in facts and _is_current(out, name, facts[name], settings.described()) for name in names)


def check_target(source: str, out: Path) -> None:
    """Raises ValueError if the folder holds something that the index of these shards would overwrite."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT={out} must be a folder")
    manifest = read_manifest(out)
    if manifest is None:
        foreign = [name for name in (MANIFEST_NAME, INDEX_NAME) if (out / name).exists()]
        if foreign:
            raise ValueError(f"OUT={out} has a {foreign[0]} that is not ours; choose another folder")
        return
    if manifest["kind"] != "raw":
        raise ValueError(f"OUT={out} holds {manifest['kind']}; choose another folder")
    if not manifest["description"].get("indexed"):
        names = {_name_in_manifest(out, shard) for shard in find_shards(source)}
        others = [shard["name"] for shard in manifest["shards"] if shard["name"] not in names]
        if others or not manifest["complete"]:
            made_from = manifest["description"].get("source")
            raise ValueError(f"OUT={out} holds a dataset of its own, made from {made_from}; choose another folder")


def write_report(path: Path, rejections: list[Rejection]) -> None:
    """Writes one JSON object a line: shard, offset (bytes), key ("" for a whole shard) and reason of everything left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(rejection)) + "\n" for rejection in rejections)


def _name_in_manifest(out: Path, shard: str) -> str:
    if is_remote(shard):
        return shard
    path, folder = os.path.abspath(shard), os.path.abspath(out)
    return os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path


def _all_facts(out: Path, names: list[str], report: IndexReport) -> dict[str, FileFacts]:
    def facts_of(name: str) -> FileFacts | OSError:
        try:
            return file_facts(located(out, name))
        except OSError as error:
            return error

    found: dict[str, FileFacts] = {}
    with ThreadPoolExecutor(_FACTS_AT_A_TIME) as threads:
        for name, facts in zip(names, threads.map(facts_of, names)):
            if isinstance(facts, OSError):
                reason = "does not exist" if isinstance(facts, FileNotFoundError) else f"cannot be read: {facts}"
                report.damaged[name] = reason
            else:
                found[name] = facts
    return found


def _is_current(out: Path, name: str, facts: FileFacts, settings: dict[str, Any]) -> bool:
    record = read_record(sidecar_path(out, name))
    if record is None or record.facts.size != facts.size:
        return False
    if not record.settings:  # `prepare` wrote the shard and knows it; its own sidecar has no time of change
        return not settings["quality"]
    return record.settings == settings and record.facts.version == facts.version


@contextmanager
def _pool_that_stops(workers: int, timeout_seconds: float) -> Iterator[tuple[WorkerPool, threading.Event]]:
    # After an error or Ctrl-C no shard is waited for to its end.
    stop = threading.Event()
    with WorkerPool(workers, timeout_seconds=timeout_seconds) as pool:
        try:
            yield pool, stop
        finally:
            stop.set()


def _index_shard(
    out: Path,
    name: str,
    settings: IndexSettings,
    earlier: dict[str, Any],
    pool: WorkerPool,
    progress: Progress,
    stop: threading.Event,
) -> str:
    # Writes the sidecar of one shard; returns why that cannot be, else "". Runs in a thread of the pool. `earlier` is what the
    # manifest says of the shard.
    done = 0
    try:
        with RangeReader(located(out, name)) as reader:
            content = read_samples(reader, settings.captions, shard=name)
            facts = reader.facts
            if not content.has_end:
                _check_against_earlier(content, facts, read_record(sidecar_path(out, name)), earlier)
        if content.duplicates:
            more = f" and {len(content.duplicates) - 1} more" if len(content.duplicates) > 1 else ""
            first = content.duplicates[0]
            return f"{first.reason} (byte {first.offset}){more}; --allow-duplicates=first keeps the first of each"
        if not content.samples and not content.rejections:
            return "holds no samples"
        clips, rejections = [], content.rejections
        for sample in content.samples:
            if stop.is_set():
                return "interrupted"
            try:
                found = _inspected(reader.name, sample.media, settings, pool)
                clips.append(clip_of(sample, found))
            except DecodeError as error:
                rejections.append(Rejection(name, sample.media.header_offset, sample.key, str(error)))
            progress.advance(sample.media.offset + sample.media.size - done)
            done = sample.media.offset + sample.media.size
    except (TarError, OSError, EOFError, RuntimeError) as error:
        return str(error)
    rejections.sort(key=lambda rejection: rejection.offset)
    record = ShardRecord(
        name,
        facts,
        content.members,
        settings=settings.described(),
        rejections=[[rejection.offset, rejection.key, rejection.reason] for rejection in rejections],
        warnings=content.warnings,
    )
    write_sidecar(out, record, clips)
    progress.advance(facts.size - done)
    return ""


def _inspected(name: str, media: Member, settings: IndexSettings, pool: WorkerPool) -> dict[str, Any]:
    # What a decoding process finds. Remote bytes are read here: it has no keys of a storage in its environment.
    rules: dict[str, Any] = {"containers": CONTAINERS, "decode": settings.decode, "quality": settings.quality}
    if is_remote(name):
        return pool.call("inspect_clip", data=read_range(name, media.offset, media.size), **rules)[0]
    return pool.call("inspect_range", name=name, offset=media.offset, size=media.size, **rules)[0]


def _check_against_earlier(
    content: ShardContent, facts: FileFacts, record: ShardRecord | None, earlier: dict[str, Any]
) -> None:
    # A cut between two members leaves no trace but that the end is missing: what was there before tells.
    size = record.facts.size if record else earlier.get("bytes", 0)
    members = record.members if record else earlier.get("members", 0)
    if facts.size < size or content.members < members:
        raise TarError(
            f"cut: it had {size} bytes and {members} members when it was indexed before, now {facts.size} and "
            f"{content.members}; if that is meant, index it into another folder",
            content.end,
        )


def clip_of(sample: Sample, found: dict[str, Any]) -> Clip:
    """The row of a sample, with what `media_info.inspect_range` found."""
    choices = json.dumps(sample.captions, ensure_ascii=False) if len(sample.captions) > 1 else ""
    return Clip(
        key=sample.key,
        caption=sample.captions[0],
        caption_choices=choices,
        labels=sample.labels,
        offset=sample.media.offset,
        size=sample.media.size,
        **found,
    )


def _add_to_report(report: IndexReport, out: Path, name: str) -> None:
    record = read_record(sidecar_path(out, name))
    assert record is not None, "written or checked above"
    report.clips += record.clips
    report.rejections += [Rejection(name, *entry) for entry in record.rejections]
    report.warnings += [f"{name}: {warning}" for warning in record.warnings]


def _check_report(
    report: IndexReport, source: str, out: Path, *, max_rejected_share: float, skip_damaged: bool
) -> None:
    if report.damaged and not skip_damaged:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in islice(report.damaged.items(), _SHOWN))
        hidden = len(report.damaged) - _SHOWN
        more = f"\n  and {hidden} more, see {out / REPORT_NAME}" if hidden > 0 else ""
        raise ValueError(
            f"SRC={source}: {len(report.damaged)} of {report.shards} shards cannot be used:\n  {listed}{more}\n"
            f"Mend or remove them, or leave them out with --skip-damaged-shards"
        )
    total = report.clips + len(report.rejections)
    common = ", ".join(f"{reason} ({count})" for reason, count in report.counts().most_common(_SHOWN))
    if not report.clips:
        raise ValueError(f"SRC={source}: none of its {total} samples can be used: {common}; see {out / REPORT_NAME}")
    if len(report.rejections) > max_rejected_share * total:
        raise ValueError(
            f"SRC={source}: {len(report.rejections)} of {total} samples cannot be used: {common}; see {out / REPORT_NAME}. "
            f"--max-rejected sets the share that may be left out ({max_rejected_share:g})"
        )
