"""Whatever a dataset may hold: each kind of bad input is a file made here, and the index names its reason.

What is checked elsewhere, all in tests/data unless it says otherwise:

| input | where |
|---|---|
| captions: missing, empty, of any encoding, JSON of any form | test_bad_captions.py, test_captions.py |
| media of all kinds: not readable, cut, rotated, HDR, variable rate, too large, ... | test_bad_media.py, test_index_media.py |
| a clip that changes under the run, or decodes to fewer frames than indexed | test_loader.py, end_to_end/test_data_failures.py |
| clips too short or too narrow for every bucket | with the loader, which knows the buckets |
| a decoder that crashes or hangs | test_index_tars.py::test_a_decoder_that_crashes_or_hangs_costs_one_sample |
| a shard cut at every block, between blocks, and with zeros for the rest | test_tar_cuts.py |
| every flipped bit of a header; joined tars; holes of zeros; long names; damaged PAX records | test_tar_members.py |
| members not grouped, macOS's files, dots in keys, upward names | test_index_tars.py::test_members_are_grouped_by_key |
| shards that changed since they were indexed, all named | test_tar_cuts.py, test_index.py, test_index_tars.py |
| shards that answer with 404, 403, 503 or nothing | test_shards_remote.py |
| more samples left out than are allowed | test_index_tars.py::test_too_many_rejections_are_an_error_that_names_the_commonest |
| settings that cannot be | train/test_config.py, test_data_config.py |
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from muybridge.data.index import ClipIndex
from muybridge.data.indexing import IndexReport, IndexSettings, build_index
from muybridge.data.sources import find_sources
from muybridge.data.tar_samples import CaptionRules
from muybridge.scripts import cli

BLOCK = 512


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


PICTURE = picture()
Members = list[tuple[str, bytes]]


def pair(key: str, caption: bytes = b"a dog") -> Members:
    return [(f"{key}.png", PICTURE), (f"{key}.txt", caption)]


def tar_of(members: Members, *, format: int = tarfile.USTAR_FORMAT, **fields: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data) if data else None)
    return file.getvalue()


@dataclass
class Result:
    """What an index says."""

    index: ClipIndex
    report: IndexReport

    def captions(self) -> dict[str, list[str]]:
        return {self.index.text("key", row): self.index.captions(row) for row in range(len(self.index))}

    def reasons(self) -> dict[str, str]:
        return {rejection.key: rejection.reason for rejection in self.report.rejections}


def build(source: Path | str, out: Path, rules: CaptionRules | None = None, *, skip_damaged: bool = False) -> Result:
    settings = IndexSettings(captions=rules or CaptionRules())
    options: dict[str, Any] = {"workers": 1, "timeout_seconds": 20.0, "max_rejected_share": 1.0}
    return Result(*build_index(str(source), out, settings=settings, skip_damaged=skip_damaged, **options))


# Shards. Of each: its bytes, and why it cannot be used.


def odd_member(kind: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("odd.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
        for name, data in pair("good"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def with_flipped_bit(data: bytes, byte: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :]


TWO = tar_of([*pair("a"), *pair("b")])
PAX: dict[str, Any] = {"format": tarfile.PAX_FORMAT}
DAMAGED_SHARDS: dict[str, tuple[bytes, str]] = {
    "empty.tar": (b"", "empty: 0 bytes (byte 0)"),
    "page.tar": (
        b"<html>404</html>" * 40,
        "not a tar, or its first header is damaged: it starts with b'<html>404</html>' (byte 0)",
    ),
    "zeros.tar": (bytes(10240), "holds no samples"),
    "textless.tar": (tar_of([("README", b"no sample")]), "holds no samples"),
    "mid-header.tar": (
        TWO[: 2 * BLOCK + 100],
        f"cut in the middle of a header: 100 of 512 bytes are left (byte {2 * BLOCK})",
    ),
    "mid-data.tar": (
        TWO[: BLOCK + 9],
        f"cut in the middle of a.png: {len(PICTURE) - 9} of its {len(PICTURE)} bytes are missing (byte 0)",
    ),
    "bit-flip.tar": (
        with_flipped_bit(TWO, 2 * BLOCK + 5),
        f"damaged header: its checksum does not fit (byte {2 * BLOCK})",
    ),
    "size-flip.tar": (
        with_flipped_bit(TWO, 4 * BLOCK + 130),
        f"damaged header: its checksum does not fit (byte {4 * BLOCK})",
    ),
    "joined.tar": (TWO + TWO, "something follows the end-of-archive blocks: joined tars, or damage (byte "),
    "packed.tar.gz": (
        gzip.compress(TWO),
        "compressed with gzip, so nothing in it can be read by its place; run: gunzip --keep ",
    ),
    "named.tar": (bz2.compress(TWO), "compressed with bzip2, "),  # whatever its name says
    "packed.tar.xz": (lzma.compress(TWO), "compressed with xz, "),
    "packed.tar.zst": (b"\x28\xb5\x2f\xfd" + TWO[:600], "compressed with zstd, "),
    "twice.tar": (tar_of([*pair("a"), *pair("b"), *pair("a", b"a cat")]), "duplicate: a.png comes twice (byte "),
    "pax-size.tar": (
        tar_of(pair("a"), pax_headers={"size": "9999999"}, **PAX),
        f"two sizes for one member: {len(PICTURE)} in its header, 9999999 in PAX records (byte ",
    ),
    "pax-huge.tar": (
        tar_of(pair("a"), pax_headers={"size": str(9 * 2**30)}, **PAX),
        "cut in the middle of a.png: ",
    ),
    "pax-negative.tar": (
        tar_of(pair("a"), pax_headers={"size": "-512"}, **PAX),
        "the size in PAX records is b'-512' (byte 0)",
    ),
}
USABLE_SHARDS: dict[str, tuple[bytes, str, str]] = {  # the reason of what is left out, the warning
    "link.tar": (odd_member(tarfile.SYMTYPE), "not a regular file: a symbolic link", ""),
    "hard-link.tar": (odd_member(tarfile.LNKTYPE), "not a regular file: a hard link", ""),
    "device.tar": (odd_member(tarfile.CHRTYPE), "not a regular file: a character device", ""),
    "pipe.tar": (odd_member(tarfile.FIFOTYPE), "not a regular file: a pipe", ""),
    "sparse.tar": (
        tar_of([("odd.png", PICTURE)], pax_headers={"GNU.sparse.major": "1"}, **PAX)[: 4 * BLOCK]
        + tar_of(pair("good")),
        "not a regular file: a sparse file",
        "",
    ),
    "no-end.tar": (
        tar_of(pair("good"))[: 4 * BLOCK],
        "",
        f"no end-of-archive blocks: it may be cut (byte {4 * BLOCK})",
    ),
    "half-end.tar": (
        tar_of(pair("good"))[: 5 * BLOCK],
        "",
        f"only one end-of-archive block: it may be cut (byte {4 * BLOCK})",
    ),
    "scattered.tar": (
        tar_of([("good.png", PICTURE), *pair("other"), ("good.txt", b"a dog")]),
        "",
        "1 samples whose members do not lie together, such as good",
    ),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all these shards, a link that leads nowhere, a pipe, and one good shard."""
    folder = tmp_path_factory.mktemp("shards")
    damaged = {name: data for name, (data, _) in DAMAGED_SHARDS.items()}
    for name, data in {**damaged, **{name: data for name, (data, _, _) in USABLE_SHARDS.items()}}.items():
        (folder / name).write_bytes(data)
    (folder / "lost.tar").symlink_to(folder / "nowhere.tar")
    os.mkfifo(folder / "fifo.tar")
    (folder / "whole.tar").write_bytes(TWO)
    return folder


@pytest.fixture(scope="module")
def indexed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The index of the shards that can be used."""
    return build(shards, shards, skip_damaged=True)


@pytest.mark.parametrize("name", DAMAGED_SHARDS)
def test_a_damaged_shard_is_refused_with_its_reason(indexed: Result, name: str) -> None:
    assert indexed.report.damaged[name].startswith(DAMAGED_SHARDS[name][1])
    assert name not in [Path(shard).name for shard in indexed.index.shards]


@pytest.mark.parametrize("name", USABLE_SHARDS)
def test_what_can_be_used_of_a_shard_is_used_and_the_rest_named(indexed: Result, name: str) -> None:
    _, reason, warning = USABLE_SHARDS[name]
    place = [Path(shard).name for shard in indexed.index.shards].index(name)
    keys = [indexed.index.text("key", row) for row in range(len(indexed.index))]
    assert "good" in [key for key, shard in zip(keys, indexed.index.column("shard")) if shard == place]
    found = [(r.key, r.reason) for r in indexed.report.rejections if r.shard == name]
    assert found == ([("odd.png", reason)] if reason else [])
    assert [w for w in indexed.report.warnings if w.startswith(f"{name}: ")] == (
        [f"{name}: {warning}"] if warning else []
    )


def test_all_bad_shards_are_named_at_once(indexed: Result, shards: Path, tmp_path: Path) -> None:
    bad = {*DAMAGED_SHARDS, "lost.tar", "fifo.tar"}
    assert set(indexed.report.damaged) == bad
    assert indexed.report.damaged["lost.tar"] == "does not exist"
    assert indexed.report.damaged["fifo.tar"] == f"cannot be read: {shards / 'fifo.tar'} is not a regular file"
    assert indexed.report.counts() == {"not a regular file": 5}
    few = tmp_path / "few"
    few.mkdir()
    for name in ("empty.tar", "mid-data.tar", "pax-size.tar"):
        (few / name).write_bytes(DAMAGED_SHARDS[name][0])
    (few / "lost.tar").symlink_to("nowhere.tar")
    with pytest.raises(ValueError, match="4 of 4 shards cannot be used") as caught:
        build(few, tmp_path / "out")
    assert all(f"{path}: " in str(caught.value) for path in few.iterdir())
    lines = (tmp_path / "out" / "index" / "rejected.jsonl").read_text().splitlines()
    assert {Path(line["shard"]).name for line in map(json.loads, lines)} == {path.name for path in few.iterdir()}


def test_the_first_of_duplicates_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DAMAGED_SHARDS["twice.tar"][0])
    with pytest.raises(ValueError, match=r"a\.tar: duplicate: a\.png .* and 1 more; --allow-duplicates=first keeps"):
        build(tmp_path, tmp_path)
    result = build(tmp_path, tmp_path, CaptionRules(first_of_duplicates=True))
    assert result.captions() == {"a": ["a dog"], "b": ["a dog"]}
    assert result.report.counts() == {"duplicate": 2}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("", r"holds no shards \(\.tar files\)"),
        ("gone", r"1 of 1 shards cannot be used:\n  .*gone: does not exist"),
        ("gone-*.tar", "holds no shards"),
        ("{gone,lost}/*.tar", "holds no shards"),
        ("{tars,gone,void}/*.tar", r"no shards in '.*/gone/\*\.tar', '.*/void/\*\.tar'$"),
        ("{tars,void}", r"no shards in '.*/void'$"),
        ("tars/{a,b,c}.tar", r"2 of 3 shards cannot be used:\n  .*b\.tar: does not exist\n  .*c\.tar: does not exist"),
        ("tars/{a,a}.tar", r"names .*a\.tar twice"),
    ],
)
def test_a_pattern_that_stands_for_nothing_is_an_error_at_the_start(tmp_path: Path, pattern: str, reason: str) -> None:
    for folder in ("tars", "void"):
        (tmp_path / folder).mkdir()
    if pattern:
        (tmp_path / "tars" / "a.tar").write_bytes(TWO)
    with pytest.raises(ValueError, match=reason):
        build(f"{tmp_path}/{pattern}", tmp_path / "out")


def test_names_that_no_manifest_can_hold_are_refused_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "a.tar").write_bytes(TWO)
    (tmp_path / "b.tar").write_bytes(TWO)
    with pytest.raises(ValueError, match=r"names that are not UTF-8: '.*caf\\udce9/a\.tar'; rename these shards$"):
        build(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"SRC='.*caf\\udce9' is not UTF-8; rename it$"):
        find_sources(folder)


def test_files_of_any_name_are_prepared_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in (b"caf\xe9.png", b"b\x1b[2J.png", b"good.png", b"bare\xff.png"):
        (source / os.fsdecode(name)).write_bytes(PICTURE)
        if b"bare" not in name:
            (source / os.fsdecode(name[:-3] + b"txt")).write_text("a dog")
    (source / "lost.png").symlink_to("nowhere")
    (source / "page.png").write_bytes(b"<html>")
    (source / "page.txt").write_text("a page")
    assert cli.main(["prepare", str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert len(ClipIndex.open(tmp_path / "out")) == 3
    lines = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert {line["file"]: line["reason"].split(":")[0] for line in lines} == {
        "bare?.png": "no caption (bare?.txt is missing)",
        "lost.png": "no such file",
        "page.png": "not a readable video file",
    }
    said = " ".join(capsys.readouterr().out.split())
    assert all(part in said for part in ("no such file", "no caption", "Left out 3; the reasons are in"))
