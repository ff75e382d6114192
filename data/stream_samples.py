"""The samples of tars that are read from start to end by webdataset's pipeline: no index, no ranges, compressed ones too.

Each pass goes through all shards in a new order. A shard that is damaged ends where the damage begins, which is reported.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, BinaryIO

from .captions import CaptionError
from .keyed import Permutation, keyed_bits
from .staged import StagedStreams
from .storage import TAR_ENDINGS, TransientReadError, find_shards, open_stream
from .tar_members import Member
from .tar_samples import (
    CAPTION_EXTENSIONS,
    MEDIA_EXTENSIONS,
    CaptionRules,
    UnusableSampleError,
    read_sample,
    reason_class,
    split_name,
)

SHUFFLED_SAMPLES = 1000  # of one rank, encoded, among which the next one is drawn
SHUFFLED_BYTES = 256 * 2**20
_TRIED_SHARDS = 100
_SHOWN = 5
_REST_BYTES = 1 << 20  # more zeros than this behind the end of a tar are of no interest


@dataclass(frozen=True)
class StreamSample:
    """A video or image, still encoded, and its captions (at least one)."""

    shard: str
    key: str
    data: bytes
    captions: list[str]
    pass_number: int

    @property
    def row(self) -> int:
        """A number that stands for this sample wherever it comes from, as the row of an index does."""
        return row_of(self.shard, self.key)


@dataclass(frozen=True)
class BadSample:
    """A sample, or the rest of a shard, that cannot be used."""

    shard: str
    key: str  # "" for a shard
    reason: str

    @property
    def row(self) -> int:
        """As `StreamSample.row`."""
        return row_of(self.shard, self.key)


@dataclass(frozen=True)
class EndOfPass:
    """Stands behind the last sample of a pass, also where there was none."""


StreamItem = StreamSample | BadSample | EndOfPass


def row_of(shard: str, key: str) -> int:
    """63 bits that a sample is known by."""
    digest = hashlib.blake2b(f"{shard}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def find_streams(source: str, *, field: str) -> list[str]:
    """The shards that `source` stands for, see `storage.find_shards`. Raises ValueError where none of them can be read."""
    shards = find_shards(source, field=field)
    if packed := [shard for shard in shards if shard.lower().endswith(".zst")]:
        raise ValueError(
            f"{field}={source}: {packed[0]} is compressed with zstd, which Python cannot read; run: unzstd"
        )
    reasons = []
    for shard in shards[:_TRIED_SHARDS]:
        try:
            open_stream(shard).close()
            return shards
        except TransientReadError:
            raise
        except OSError as error:
            reasons.append(f"{shard}: {error.strerror or error}")
    more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    raise ValueError(f"{field}={source}: no shard can be read: {'; '.join(reasons[:_SHOWN])}{more}")


class SampleStream:
    """One rank's samples, pass after pass without an end.

    The ranks share the shards of a pass. Where there are fewer shards than ranks, several ranks read one shard, and each takes its
    share of the samples.
    """

    def __init__(
        self, shards: list[str], *, rank: int, world_size: int, seed: int, copies: StagedStreams | None = None
    ) -> None:
        self._shards, self._rank, self._world_size, self._seed = shards, rank, world_size, seed
        self._copies = copies or StagedStreams()

    def __iter__(self) -> Iterator[StreamItem]:
        for number in count():
            yield from shuffled(self.one_pass(number), seed=keyed_bits(self._seed, "shuffle", self._rank, number))
            yield EndOfPass()

    def one_pass(self, number: int) -> Iterator[StreamSample | BadSample]:
        """What this rank reads of one pass, shard by shard. Raises TransientReadError where a storage does not answer."""
        shards = len(self._shards)
        order = Permutation.keyed(shards, self._seed, "shards", number)
        first = self._rank % shards
        readers = -(-(self._world_size - first) // shards)  # ranks that read this shard
        for place in range(first, shards, self._world_size):
            shard = self._shards[order(place)]
            for i, item in enumerate(read_shard(shard, number, self._copies)):
                if (i + number) % readers == self._rank // shards:
                    yield item


def shuffled(
    items: Iterator[StreamSample | BadSample],
    *,
    seed: int,
    samples: int = SHUFFLED_SAMPLES,
    max_bytes: int = SHUFFLED_BYTES,
) -> Iterator[StreamSample | BadSample]:
    """The same items, each drawn from a number of them that are held back; what is bad comes at once."""
    generator = random.Random(seed)
    held: list[StreamSample] = []
    held_bytes = 0

    def drawn() -> StreamSample:
        i = generator.randrange(len(held))
        held[i], held[-1] = held[-1], held[i]
        return held.pop()

    for item in items:
        if isinstance(item, BadSample):
            yield item
            continue
        held.append(item)
        held_bytes += len(item.data)
        while len(held) > samples or held_bytes > max_bytes:
            sample = drawn()
            held_bytes -= len(sample.data)
            yield sample
    while held:
        yield drawn()


def read_shard(
    shard: str, pass_number: int = 0, copies: StagedStreams | None = None
) -> Iterator[StreamSample | BadSample]:
    """The samples of a tar in their order, then what is wrong with the tar. Raises TransientReadError, see `open_stream`.

    A copy of the tar is read where there is one; should it be damaged, the original goes on where it ends.
    """
    copies = copies or StagedStreams()
    given = 0
    if (copy := copies.open(shard)) is not None:
        damage = ""
        for item in _read_tar(copy, shard, pass_number):
            if isinstance(item, BadSample) and not item.key:
                damage = item.reason
                break
            given += 1
            yield item
        if not damage:
            return
        copies.abandon(copy, damage)
    try:
        file = open_stream(shard)
    except TransientReadError:
        raise
    except OSError as error:
        yield BadSample(shard, "", f"the shard cannot be opened: {error.strerror or error}")
        return
    yield from islice(_read_tar(file, shard, pass_number), given, None)


def _read_tar(file: BinaryIO, shard: str, pass_number: int) -> Iterator[StreamSample | BadSample]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    faults: list[Exception] = []

    def note(error: Exception) -> bool:
        faults.append(error)
        return True

    with file:
        stream = _Tailed(_unpacked(file, shard))
        # One shard at a time, or the first sample of a shard would get the files of a damaged one before it.
        files = tar_file_expander([{"url": shard, "stream": stream}], handler=note, select_files=_is_wanted)
        for group in group_by_keys(files, keys=lambda name: split_name(name) or (None, None), handler=note):
            item = _sample(shard, group, pass_number)
            # A sample that the damage cut in two is a part of it.
            if item is not None and not (isinstance(item, BadSample) and any(map(_is_damage, faults))):
                yield item
        bad = [_bad(shard, error) for error in faults]
        # Python's tarfile takes a damaged header, and the end of the file, for the end of the archive.
        if not bad and shard.lower().endswith(TAR_ENDINGS):
            bad = [_bad(shard, error) for error in stream.end_faults()]
    seen: set[str] = set()
    for found in bad:  # one error often leads to others
        if reason_class(found.reason) not in seen:
            seen.add(reason_class(found.reason))
            yield found


class _Tailed:
    """A file that is read once, and remembers its last bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._tail = b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._tail = (self._tail + data[-512:])[-512:]
        return data

    def end_faults(self) -> list[Exception]:
        """What is wrong unless there are only zeros behind what was read, and at the end of the file."""
        try:
            rest = self.read(_REST_BYTES)
        except Exception as error:  # as webdataset notes anything that reading raises
            return [error]
        return [tarfile.ReadError("it does not end as tars do")] if any(rest) or any(self._tail) else []


def _unpacked(file: BinaryIO, name: str) -> Any:
    # By these, as tarfile does not notice that a compressed file is cut.
    name = name.lower()
    if name.endswith((".gz", ".tgz")):
        return gzip.GzipFile(fileobj=file)
    if name.endswith(".bz2"):
        return bz2.BZ2File(file)
    return lzma.LZMAFile(file) if name.endswith(".xz") else file


class _Files:
    """Files in memory, read by their number."""

    def __init__(self, files: list[bytes]) -> None:
        self._files = files

    def read(self, offset: int, size: int) -> bytes:
        return self._files[offset][:size]


def _is_wanted(name: str) -> bool:
    # What is neither media nor a caption may be large, and would be read into memory for nothing.
    parts = split_name(name)
    return parts is not None and parts[1].rpartition(".")[2] in (*MEDIA_EXTENSIONS, *CAPTION_EXTENSIONS)


def _sample(shard: str, group: dict[str, Any], pass_number: int) -> StreamSample | BadSample | None:
    key = group.pop("__key__")
    del group["__url__"]
    files = list(group.values())
    members = {name: Member(f"{key}.{name}", i, len(files[i]), i) for i, name in enumerate(group)}
    try:
        sample = read_sample(_Files(files), key, members, CaptionRules())
    except (CaptionError, UnusableSampleError) as error:
        return BadSample(shard, key, str(error))
    if sample is None:
        return None
    return StreamSample(shard, key, files[sample.media.offset], sample.captions, pass_number)


def _is_damage(error: Exception) -> bool:
    return _DUPLICATE not in str(error)


_DUPLICATE = ": duplicate file name"  # what webdataset says


def _bad(shard: str, error: Exception) -> BadSample:
    # webdataset adds the file and the address to an error's arguments.
    text = str(error.args[0] if error.args else error).partition(" @ ")[0]
    if not _is_damage(error):
        name = text.partition(_DUPLICATE)[0]
        return BadSample(shard, name, f"duplicate: {name} comes twice")
    return BadSample(shard, "", f"damaged shard: {type(error).__name__}: {text}, and the rest is lost")
