"""The samples of a stock WebDataset tar: members grouped by key, each with its caption, and a reason for each that is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from .captions import CaptionError, NoCaptionError, caption_from_text, captions_from_json, clean_caption, parse_json
from .shards import json_labels
from .storage import RangeReader
from .tar_members import Member, list_members

MEDIA_EXTENSIONS = ("mp4", "mkv", "webm", "mov", "jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "caption", "json")
DEFAULT_CAPTION_FIELD = "caption"

_MAX_KEY_BYTES = 1024
_MAX_LABELS_BYTES = 1024


@dataclass(frozen=True)
class CaptionRules:
    """Where captions are, and what becomes of samples without one or with two."""

    # Of a JSON file, "a.b" for nested objects; null reads text files first, then the field "caption" of JSON files.
    field: str | None = None
    default: str | None = None  # for samples without a caption; null leaves them out
    first_of_duplicates: bool = False  # else a key that comes twice makes the shard unusable


@dataclass(frozen=True)
class Sample:
    """A video or image in a tar and its captions (at least one, which may be the empty default)."""

    key: str
    media: Member
    extension: str
    captions: list[str]
    labels: str = ""  # JSON object, "" for none


@dataclass(frozen=True)
class Rejection:
    """Something that is left out; the reason begins with a class of reasons, before the first colon or bracket."""

    shard: str
    offset: int  # of the header of its first member
    key: str
    reason: str


@dataclass
class ShardContent:
    """What a tar holds."""

    samples: list[Sample] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    duplicates: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    members: int = 0
    has_end: bool = True  # see `tar_members.TarListing` for this and the next
    end: int = 0


class UnusableSampleError(Exception):
    """A sample that is left out; the text is the reason."""


class Bytes(Protocol):
    """Where the files of a sample are read: a tar, or memory."""

    def read(self, offset: int, size: int) -> bytes: ...


def reason_class(reason: str) -> str:
    """The part of a reason that many samples share."""
    return reason.split(":")[0].split(" (")[0]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member: the key ends at the first dot of the base name. None for what is no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    # Also without a stem: macOS's ._name and .DS_Store.
    if not stem or not dot or not extension or "__MACOSX" in folder.split("/"):
        return None
    return folder + slash + stem, extension.lower()


def read_samples(reader: RangeReader, rules: CaptionRules, *, shard: str) -> ShardContent:
    """All samples of a tar in the order of their first members; `shard` is how rejections name it.

    Raises TarError for a damaged tar, and OSError or EOFError where it cannot be read.
    """
    listing = list_members(reader.read, reader.facts.size, name=reader.name)
    content = ShardContent(
        members=len(listing.members), warnings=list(listing.warnings), has_end=listing.has_end, end=listing.end
    )
    content.rejections += [Rejection(shard, offset, name, reason) for offset, name, reason in listing.refused]
    groups: dict[str, dict[str, Member]] = {}
    scattered: set[str] = set()
    previous = None
    for member in listing.members:
        parts = split_name(member.name)
        if parts is None:
            continue
        key, extension = parts
        if key != previous and key in groups:
            scattered.add(key)
        previous = key
        group = groups.setdefault(key, {})
        if extension in group:
            reason = f"duplicate: {member.name} comes twice"
            content.duplicates.append(Rejection(shard, member.header_offset, key, reason))
        group.setdefault(extension, member)
    if scattered:
        content.warnings.append(
            f"{len(scattered)} samples whose members do not lie together, such as {sorted(scattered)[0]}"
        )
    if rules.first_of_duplicates:
        content.rejections += content.duplicates
        content.duplicates = []
    for key, group in groups.items():
        try:
            sample = read_sample(reader, key, group, rules)
        except (CaptionError, UnusableSampleError) as error:
            first = min(member.header_offset for member in group.values())
            content.rejections.append(Rejection(shard, first, key, str(error)))
            continue
        if sample is not None:
            content.samples.append(sample)
    content.rejections.sort(key=lambda rejection: rejection.offset)
    return content


def read_sample(reader: Bytes, key: str, group: dict[str, Member], rules: CaptionRules) -> Sample | None:
    """The sample of the members with one key, by extension; None for members that are neither media nor captions.

    Raises UnusableSampleError, and CaptionError, for one that is left out.
    """
    media = [extension for extension in group if extension in MEDIA_EXTENSIONS]
    if not media:
        dotted = [e for e in group if e.rpartition(".")[2] in MEDIA_EXTENSIONS]
        if dotted:
            raise UnusableSampleError(f"unknown extension: .{dotted[0]} (a key ends at the first dot of a name)")
        if any(extension in group for extension in CAPTION_EXTENSIONS):
            have = ", ".join(list(group)[:8])
            raise UnusableSampleError(f"no media (the key has {have}; media are {', '.join(MEDIA_EXTENSIONS)})")
        return None
    if len(media) > 1:
        raise UnusableSampleError(f"two media files: {' and '.join(group[extension].name for extension in media[:2])}")
    if len(key.encode()) > _MAX_KEY_BYTES:
        raise UnusableSampleError(f"key too long: {len(key.encode())} bytes, more than {_MAX_KEY_BYTES}")
    if group[media[0]].size == 0:
        raise UnusableSampleError("the file is empty")
    source, captions = _captions(reader, key, group, rules)
    labels = "" if source == "json" or "json" not in group else _labels(reader, group["json"])
    return Sample(key, group[media[0]], media[0], captions, labels)


def _captions(reader: Bytes, key: str, group: dict[str, Member], rules: CaptionRules) -> tuple[str, list[str]]:
    order = ("json",) if rules.field is not None else CAPTION_EXTENSIONS
    found = next((extension for extension in order if extension in group), "")
    try:
        if not found:
            raise NoCaptionError(f"no caption ({key}.{order[0]} is missing)")
        member = group[found]
        data = reader.read(member.offset, min(member.size, _CAPTION_READ_BYTES))
        if found == "json":
            return found, captions_from_json(data, field=rules.field or DEFAULT_CAPTION_FIELD, name=member.name)
        return found, [caption_from_text(data, name=member.name)]
    except NoCaptionError:
        if rules.default is None:
            raise
        return found, [clean_caption(rules.default)]


_CAPTION_READ_BYTES = (1 << 20) + 1  # enough to see that one is too large


def _labels(reader: Bytes, member: Member) -> str:
    # `prepare` keeps labels in the JSON beside a text caption, in this very form; a scraper's records would only swell the index.
    if member.size > _MAX_LABELS_BYTES:
        return ""
    data = reader.read(member.offset, member.size)
    try:
        value: Any = parse_json(data, name=member.name)
    except CaptionError:
        return ""
    labels = json_labels(value) if isinstance(value, dict) else ""
    return labels if labels.encode(errors="surrogatepass") == data else ""
