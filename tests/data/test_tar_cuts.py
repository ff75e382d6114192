"""A shard that is cut anywhere is an error, or at least a warning, for the index: with or without an earlier one."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muybridge.data.index import SIDECAR_FOLDER, ClipIndex
from muybridge.data.indexing import IndexReport, IndexSettings, build_index
from muybridge.data.sources import find_sources
from muybridge.data.tar_samples import CaptionRules

BLOCK = 512
LONG = "long/" * 30  # a name that needs a header of its own


def picture(size: int = 8) -> bytes:
    noise = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def tar_of(keys: list[str], data: bytes) -> bytes:
    """Captioned pictures; no padding but the two blocks of the end."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key in keys:
            for name, content in ((f"{key}.png", data), (f"{key}.txt", f"caption of {key}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue().rstrip(b"\0").ljust(tar.offset, b"\0")


KEYS = ["a", f"{LONG}b", "c"]
WHOLE = tar_of(KEYS, picture(18))  # of two blocks each
END = len(WHOLE) - 2 * BLOCK
with tarfile.open(fileobj=io.BytesIO(WHOLE)) as whole:
    STARTS = [member.offset for member in whole]  # of each member's first header
BOUNDARIES = [*STARTS, END]
CUTS = sorted({*range(0, len(WHOLE), BLOCK), *range(37, len(WHOLE), 611)})


def build(folder: Path, out: Path, *, skip_damaged: bool = True) -> tuple[ClipIndex, IndexReport]:
    return build_index(
        str(folder),
        out,
        settings=IndexSettings(),
        workers=1,
        timeout_seconds=20.0,
        max_rejected_share=1.0,
        skip_damaged=skip_damaged,
    )


def cut_shards(folder: Path) -> dict[str, int]:
    """A shard for each cut, and a whole one; their names and sizes."""
    folder.mkdir(exist_ok=True)
    sizes = {f"{size:06d}.tar": size for size in [*CUTS, len(WHOLE)]}
    for name, size in sizes.items():
        (folder / name).write_bytes(WHOLE[:size])
    return sizes


def named_byte(text: str) -> int:
    [byte] = re.findall(r"\(byte (\d+)\)$", text)
    return int(byte)


def test_every_cut_is_an_error_or_lies_between_two_members_and_is_a_warning(tmp_path: Path) -> None:
    sizes = cut_shards(tmp_path / "tars")
    index, report = build(tmp_path / "tars", tmp_path / "tars")
    warnings = dict(warning.split(": ", 1) for warning in report.warnings)
    keys: dict[str, list[str]] = {name: [] for name in sizes}
    for clip in map(index.clip, range(len(index))):
        keys[Path(index.shards[clip.shard]).name].append(clip.key)
    for name, size in sizes.items():
        before = max(boundary for boundary in BOUNDARIES if boundary <= size)
        if size == 0:
            assert report.damaged[name] == "empty: 0 bytes (byte 0)"
        elif size in BOUNDARIES:
            assert warnings[name] == f"no end-of-archive blocks: it may be cut (byte {size})"
            whole = STARTS.index(size) // 2 if size < END else len(KEYS)
            assert keys[name] == KEYS[:whole]
            # A picture without its caption is a sample that is left out.
            lost = [(r.key, r.reason) for r in report.rejections if r.shard == name]
            has_half = size < END and STARTS.index(size) % 2
            assert lost == ([(KEYS[whole], f"no caption ({KEYS[whole]}.txt is missing)")] if has_half else [])
        elif size < END + BLOCK:
            assert re.match(r"cut (in the|between)|not a tar", report.damaged[name]), name
            assert before <= named_byte(report.damaged[name]) <= size
        elif size == END + BLOCK:
            assert warnings[name] == f"only one end-of-archive block: it may be cut (byte {END})"
        if size >= END + BLOCK:
            assert keys[name] == KEYS
            assert (name in warnings) == (size < END + 2 * BLOCK)
    assert keys[f"{len(WHOLE):06d}.tar"] == KEYS


@pytest.mark.parametrize("kept", ["sidecars", "manifest"])
def test_with_an_earlier_index_every_cut_is_an_error_that_names_shard_and_byte(tmp_path: Path, kept: str) -> None:
    folder = tmp_path / "tars"
    sizes = cut_shards(folder)
    for name in sizes:
        (folder / name).write_bytes(WHOLE)
    build(folder, folder)
    cut_shards(folder)
    with pytest.raises(ValueError, match="changed since it was indexed") as caught:  # the run that would train on it
        ClipIndex.open(folder)
    for name, size in sizes.items():
        assert (f"{name} has {size} bytes, not {len(WHOLE)}" in str(caught.value)) == (size < len(WHOLE))
    if kept == "manifest":
        shutil.rmtree(folder / SIDECAR_FOLDER)
    with pytest.raises(
        ValueError, match=rf"{len(CUTS)} of {len(CUTS) + 1} shards cannot be used:\n  000000\.tar: empty"
    ):
        build(folder, folder, skip_damaged=False)
    index, report = build(folder, folder)
    assert [Path(shard).name for shard in index.shards] == [f"{len(WHOLE):06d}.tar"]
    for name, size in sizes.items():
        if size == len(WHOLE):
            assert name not in report.damaged
            continue
        before = max(boundary for boundary in BOUNDARIES if boundary <= size)
        assert re.match(r"cut|not a tar|empty", report.damaged[name]), name
        assert before <= named_byte(report.damaged[name]) <= size
    reason = report.damaged[f"{STARTS[2]:06d}.tar"]
    assert reason == (
        f"cut: it had {len(WHOLE)} bytes and 6 members when it was indexed before, now {STARTS[2]} and 2; "
        f"if that is meant, index it into another folder (byte {STARTS[2]})"
    )
    report_lines = (folder / SIDECAR_FOLDER / "rejected.jsonl").read_text()
    assert all(name in report_lines for name in report.damaged)  # also those that the message has no room for


def test_a_shard_that_is_rewritten_shorter_is_none_that_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(WHOLE)
    build(tmp_path, tmp_path)
    (tmp_path / "a.tar").write_bytes(tar_of(KEYS[:1], picture()))
    index, report = build(tmp_path, tmp_path)
    assert (len(index), report.damaged, report.warnings) == (1, {}, [])


def test_zeros_in_place_of_the_rest_are_noticed(tmp_path: Path) -> None:
    data = tar_of(KEYS, picture(100))  # of 30 kB each
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        second = tar.getmembers()[2].offset
    torn = data[:second].ljust(len(data), b"\0")  # a download that broke off, into a file of the final size
    for folder in (tmp_path / "new", tmp_path / "known"):
        folder.mkdir()
    (tmp_path / "new" / "a.tar").write_bytes(torn)
    _, report = build(tmp_path / "new", tmp_path / "new")
    zeros = len(data) - second
    assert report.warnings == [f"a.tar: {zeros} bytes of zeros at its end: the rest may be lost (byte {second})"]
    (tmp_path / "known" / "a.tar").write_bytes(data)
    build(tmp_path / "known", tmp_path / "known")
    (tmp_path / "known" / "a.tar").write_bytes(torn)
    with pytest.raises(ValueError, match=rf"a\.tar: cut: it had .* and 6 members .* and 2; .*\(byte {second}\)"):
        build(tmp_path / "known", tmp_path / "known", skip_damaged=False)


def test_prepare_refuses_what_is_cut_and_warns_where_it_may_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.tar").write_bytes(WHOLE[: STARTS[2]])
    assert [source.name for source in find_sources(tmp_path)] == ["a.tar/a"]
    assert caplog.messages == [f"a.tar: no end-of-archive blocks: it may be cut (byte {STARTS[2]})"]
    (tmp_path / "b.tar").write_bytes(WHOLE[: STARTS[2] + 100])
    with pytest.raises(
        ValueError, match=r"1 tars cannot be used:\n  b\.tar: cut in the middle of a header: 100 of 512"
    ):
        find_sources(tmp_path, CaptionRules(default=""))
