"""Stock WebDataset tars are indexed as they are; what cannot be used is named with its place and reason."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muybridge.data import workers
from muybridge.data.config import DataConfig, build_buckets
from muybridge.data.index import Clip, ClipIndex, read_record, sidecar_path
from muybridge.data.indexing import IndexReport, IndexSettings, build_index, is_up_to_date
from muybridge.data.loader import VideoLoader
from muybridge.data.shards import DatasetWriter, remove_dataset
from muybridge.data.tar_samples import CaptionRules
from muybridge.tests.data.time_limits import time_limits_for

ONE_SECOND = [40 * i for i in range(25)]


@pytest.fixture(scope="module")
def video(numbered: Any) -> bytes:
    """One second of H.264."""
    return numbered.encode(ONE_SECOND)


def write_tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(video: bytes, keys: str) -> list[tuple[str, bytes | str]]:
    return [member for key in keys for member in ((f"{key}.mp4", video), (f"{key}.txt", f"caption of {key}"))]


def build(source: Path | str, out: Path, **options: Any) -> tuple[ClipIndex, IndexReport]:
    settings = IndexSettings(captions=options.pop("captions", CaptionRules()), quality=options.pop("quality", False))
    return build_index(str(source), out, settings=settings, workers=1, timeout_seconds=20.0, **options)


def rows(index: ClipIndex) -> dict[str, Clip]:
    return {clip.key: clip for clip in map(index.clip, range(len(index)))}


def reasons(report: IndexReport) -> dict[str, str]:
    return {rejection.key: rejection.reason for rejection in report.rejections}


def test_stock_tars_are_indexed_and_trained_on_as_they_are(video: bytes, numbered: Any, tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.fromarray(numbered.frame(5)).save(image, "PNG")
    variable = numbered.encode([0, 100, 300, 400, 700, 1200], container="matroska")
    folder = tmp_path / "tars"
    write_tar(
        folder / "a.tar",
        [
            ("one.mp4", video),
            ("one.txt", "a dog"),
            ("one.json", '{"colour": "red"}'),
            ("two.PNG", image.getvalue()),
            ("two.caption", "\ufeffa  cat"),
            ("two.json", '{"url": "http://x", "sha256": "0"}'),  # not in the order that ours have
        ],
    )
    write_tar(folder / "sub" / "b.tar", [("x/three.mkv", variable), ("x/three.json", '{"caption": ["a", "b"]}')])
    before = {path: path.read_bytes() for path in folder.rglob("*.tar")}
    index, report = build(folder, folder)
    assert {path: path.read_bytes() for path in before} == before
    assert (report.shards, report.read_shards, report.clips, report.rejections, report.warnings) == (2, 2, 3, [], [])
    clips = rows(index)
    assert list(clips) == ["one", "two", "x/three"]
    for clip, media in zip(clips.values(), (video, image.getvalue(), variable)):
        shard = index.shards[clip.shard].read_bytes()
        assert shard[clip.offset : clip.offset + clip.size] == media
        assert clip.checksum == zlib.crc32(media)
    one, two, three = clips.values()
    assert (one.frames, one.fps_numerator, one.fps_denominator, one.width, one.height) == (25, 25, 1, 96, 64)
    assert (one.pixel_format, one.bit_depth, one.duration_seconds) == ("yuv420p", 8, 1.0)
    assert (one.is_image, one.has_audio, one.is_variable_rate, one.is_hdr) == (False, False, False, False)
    assert (one.caption, one.label_values, one.caption_choices) == ("a dog", {"colour": "red"}, "")
    assert (two.is_image, two.frames, two.width, two.height, two.caption) == (True, 1, 96, 64, "a cat")
    assert two.labels == ""
    assert three.is_variable_rate
    assert (three.caption, three.captions, index.captions(2)) == ("a", ["a", "b"], ["a", "b"])
    assert index.column("caption_checksum").tolist() == [zlib.crc32(text) for text in (b"a dog", b"a cat", b"a\nb")]
    config = DataConfig(path=str(folder), frames=9, fps=9.0, workers=0)
    loader = VideoLoader(
        config,
        buckets=build_buckets(config, global_batch=1, micro_batch=1, world_size=1),
        rank=0,
        world_size=1,
        seed=0,
    )
    [batch] = next(loader.steps(0))
    assert batch.keys in (["one"], ["x/three"])
    shutil.move(folder, tmp_path / "elsewhere")
    assert rows(ClipIndex.open(tmp_path / "elsewhere")) == clips


def test_what_prepare_wrote_is_indexed_the_same(video: bytes, tmp_path: Path) -> None:
    info = {"frames": 25, "fps_numerator": 25, "fps_denominator": 1, "duration_seconds": 1.0, "width": 96, "height": 64}
    with DatasetWriter(tmp_path / "ours", kind="raw", description={"source": "x"}) as writer:
        clip = Clip(
            key="k", caption="a dog", labels='{"n": 1}', seekable=True, pixel_format="yuv420p", bit_depth=8, **info
        )
        writer.add(clip, video, extension="mp4")
        ours = writer.close()
    assert is_up_to_date(str(ours.folder), ours.folder, IndexSettings())
    copied, _ = build(ours.folder, tmp_path / "index")
    assert rows(copied) == rows(ours)
    assert copied.fingerprint == ours.fingerprint


def test_only_changed_shards_are_read_again(video: bytes, tmp_path: Path) -> None:
    folder, out = tmp_path / "tars", tmp_path / "out"
    for name in "abc":
        write_tar(folder / f"{name}.tar", pairs(video, name))
    first, report = build(folder, out)
    assert report.read_shards == 3
    assert is_up_to_date(str(folder), out, IndexSettings())
    again, report = build(folder, out)
    assert (report.read_shards, report.clips, again.fingerprint) == (0, 3, first.fingerprint)

    old = (folder / "b.tar").stat()
    write_tar(folder / "b.tar", [("b.mp4", video), ("b.txt", "caption of B")])
    assert (folder / "b.tar").stat().st_size == old.st_size
    write_tar(folder / "d.tar", pairs(video, "d"))
    (folder / "a.tar").unlink()
    assert not is_up_to_date(str(folder), out, IndexSettings())
    changed, report = build(folder, out)
    assert report.read_shards == 2
    assert [clip.caption for clip in rows(changed).values()] == ["caption of B", "caption of c", "caption of d"]
    assert changed.fingerprint != first.fingerprint
    assert build(folder, out, captions=CaptionRules(default="x"))[1].read_shards == 3

    sidecar_path(out, str(folder / "c.tar")).write_bytes(b"torn")
    assert build(folder, out, captions=CaptionRules(default="x"))[1].read_shards == 1


def test_an_interrupted_call_keeps_its_finished_shards(
    video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tars"
    for name in "ab":
        write_tar(folder / f"{name}.tar", pairs(video, name))
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[:1000])
    with pytest.raises(ValueError, match="1 of 2 shards cannot be used"):
        build(folder, folder)
    with pytest.raises(ValueError, match=r"it has no manifest\.json of ours"):
        ClipIndex.open(folder)
    write_tar(folder / "b.tar", pairs(video, "b"))
    assert build(folder, folder)[1].read_shards == 1


def test_every_damaged_shard_is_named_at_once(video: bytes, tmp_path: Path) -> None:
    folder, out = tmp_path / "tars", tmp_path / "out"
    good = write_tar(folder / "good.tar", pairs(video, "ab")).read_bytes()
    (folder / "cut.tar").write_bytes(good[: len(good) // 2 // 512 * 512])
    (folder / "empty.tar").write_bytes(b"")
    (folder / "page.tar").write_bytes(b"<html>404</html>")
    (folder / "void.tar").write_bytes(bytes(10240))
    (folder / "zipped.tar.gz").write_bytes(b"\x1f\x8b\x08\x00")
    write_tar(folder / "twice.tar", [*pairs(video, "ab"), *pairs(video, "ab")])
    with pytest.raises(ValueError, match="6 of 7 shards cannot be used") as caught:
        build(folder, out)
    said = str(caught.value)
    for line in (
        r"cut.tar: cut in the middle of",
        "empty.tar: empty: 0 bytes (byte 0)",
        "page.tar: not a tar, or its first header is damaged: it starts with b'<html>404</html>' (byte 0)",
        "void.tar: holds no samples",
        "zipped.tar.gz: compressed with gzip, so nothing in it can be read by its place; run: gunzip --keep ",
        "twice.tar: duplicate: a.mp4 comes twice (byte ",
        "and 3 more; --allow-duplicates=first keeps the first of each",
        "--skip-damaged-shards",
    ):
        assert line in said
    index, report = build(folder, out, skip_damaged=True)
    assert list(rows(index)) == ["a", "b"]
    assert len(report.damaged) == 6
    index, report = build(folder, out, skip_damaged=True, captions=CaptionRules(first_of_duplicates=True))
    assert [clip.key for clip in map(index.clip, range(4))] == ["a", "b"] * 2
    assert [(r.key, r.reason) for r in report.rejections] == [
        (key, f"duplicate: {key}.{e} comes twice") for key in "ab" for e in ("mp4", "txt")
    ]


def test_every_cut_of_a_shard_is_noticed(video: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    shard = write_tar(folder / "a.tar", pairs(video[:600], "ab"))
    data = shard.read_bytes()
    write_tar(folder / "b.tar", pairs(video, "c"))
    build(folder, folder, max_rejected_share=0.9)
    ends = len(data.rstrip(b"\0"))
    for cut in range(0, -(-ends // 512) * 512 + 1, 512):
        shard.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"a\.tar has .* bytes, not"):  # the run that trains on it
            ClipIndex.open(folder)
        with pytest.raises(ValueError, match=r"1 of 2 shards cannot be used:\s+a\.tar: (cut|empty)"):
            build(folder, folder)


def test_members_are_grouped_by_key(video: bytes, tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str]] = [
        ("a.mp4", video),
        ("./._a.mp4", b"resource fork"),
        (".DS_Store", b"x"),
        ("__MACOSX/a.mp4", b"x"),
        ("README", "no sample"),
        ("b.txt", "late"),
        ("a.txt", "early"),
        ("b.MP4", video),
        ("v1.2/c.mp4", video),
        ("v1.2/c.txt", "in a folder with a dot"),
        ("dotted.seg1.mp4", video),
        ("dotted.seg1.txt", "x"),
        ("../../etc/up.mp4", video),
        ("../../etc/up.txt", "upwards"),
        ("lonely.mp4", video),
        ("orphan.txt", "nothing to see"),
        ("both.mp4", video),
        ("both.webm", video),
        ("both.txt", "x"),
        ("film.avi", video),
        ("film.txt", "x"),
        ("features.npy", b"x"),
        ("hollow.mp4", b""),
        ("hollow.txt", "x"),
        ("k" * 1100 + ".mp4", video),
        ("k" * 1100 + ".txt", "x"),
    ]
    index, report = build(write_tar(tmp_path / "t.tar", members), tmp_path / "out", max_rejected_share=0.9)
    assert {key: clip.caption for key, clip in rows(index).items()} == {
        "a": "early",
        "b": "late",
        "v1.2/c": "in a folder with a dot",
        "../../etc/up": "upwards",
    }
    assert not (tmp_path.parent / "etc").exists()
    media = "media are mp4, mkv, webm, mov, jpg, jpeg, png, webp"
    assert reasons(report) == {
        "dotted": "unknown extension: .seg1.mp4 (a key ends at the first dot of a name)",
        "lonely": "no caption (lonely.txt is missing)",
        "orphan": f"no media (the key has txt; {media})",
        "both": "two media files: both.mp4 and both.webm",
        "film": f"no media (the key has avi, txt; {media})",
        "hollow": "the file is empty",
        "k" * 1100: "key too long: 1100 bytes, more than 1024",
    }
    assert report.warnings == [f"{tmp_path / 't.tar'}: 2 samples whose members do not lie together, such as a"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "index" / "rejected.jsonl").read_text().splitlines()]
    assert [line["offset"] for line in lines] == sorted(line["offset"] for line in lines)
    with tarfile.open(tmp_path / "t.tar") as tar:
        offsets = {member.name: member.offset for member in tar}
    assert lines[1] == {
        "shard": str(tmp_path / "t.tar"),
        "offset": offsets["lonely.mp4"],
        "key": "lonely",
        "reason": "no caption (lonely.txt is missing)",
    }


def test_captions_are_judged_one_by_one(video: bytes, tmp_path: Path) -> None:
    captions: dict[str, tuple[str, bytes | str]] = {
        "good": ("json", '{"text": {"long": ["a dog", "the dog"]}}'),
        "latin": ("json", b'{"text": {"long": "caf\xe9"}}'),
        "typed": ("json", '{"text": {"long": 7}}'),
        "flat": ("json", '{"text": "a dog"}'),
        "nan": ("json", '{"text": {"long": "a"}, "score": NaN}'),
        "deep": ("json", "[" * 100),
        "large": ("json", '"' + "x" * (1 << 20) + '"'),
        "blank": ("json", '{"text": {"long": "  "}}'),
        "none": ("txt", "the field is asked for, so this is no caption"),
    }
    members: list[tuple[str, bytes | str]] = []
    for key, (extension, content) in captions.items():
        members += [(f"{key}.mp4", video), (f"{key}.{extension}", content)]
    shard = write_tar(tmp_path / "t.tar", members)
    index, report = build(shard, tmp_path / "out", captions=CaptionRules(field="text.long"), max_rejected_share=0.9)
    assert rows(index)["good"].captions == ["a dog", "the dog"]
    assert reasons(report) == {
        "latin": "caption file is not UTF-8 text: latin.json, byte 22",
        "typed": "caption of a wrong type: typed.json: its text.long is a number, not text",
        "flat": "caption of a wrong type: flat.json: its text is text, not an object with 'long'",
        "nan": "caption file is not usable JSON: nan.json: NaN is no JSON",
        "deep": "caption file is not usable JSON: deep.json is nested more than 32 deep",
        "large": "caption file is too large: large.json has more than 1 MiB",
        "blank": "no caption (blank.json: its text.long is empty)",
        "none": "no caption (none.json is missing)",
    }
    rules = CaptionRules(field="text.long", default="")
    index, report = build(shard, tmp_path / "out", captions=rules, max_rejected_share=0.9)
    assert {key: clip.caption for key, clip in rows(index).items()} == {"good": "a dog", "blank": "", "none": ""}
    assert len(report.rejections) == 6


def test_a_decoder_that_crashes_or_hangs_costs_one_sample(
    video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, time\n"
        "from muybridge.data import worker\n"
        "inspect_range = worker.inspect_range\n"
        "def inspect(size, **rest):\n"
        "    if size == 11: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if size == 12: time.sleep(1000)\n"
        "    return inspect_range(size=size, **rest)\n"
        "worker.OPERATIONS['inspect_range'] = inspect\n"
        "worker.main()\n"
    )
    monkeypatch.setattr(workers, "_COMMAND", [sys.executable, str(program)])
    members = [
        *pairs(video, "a"),
        *pairs(b"x" * 11, "b"),
        *pairs(video, "c"),
        *pairs(b"x" * 12, "d"),
        *pairs(video, "e"),
    ]
    settings = IndexSettings()
    shard = write_tar(tmp_path / "t.tar", members)
    with time_limits_for(lambda arguments, _: arguments["size"] == 12):
        index, report = build_index(str(shard), tmp_path / "out", settings=settings, workers=1, timeout_seconds=1.0)
    assert list(rows(index)) == ["a", "c", "e"]
    assert reasons(report) == {"b": "the decoder crashed (SIGSEGV)", "d": "decoding took longer than 1 s"}


def test_too_many_rejections_are_an_error_that_names_the_commonest(video: bytes, tmp_path: Path) -> None:
    members = [*pairs(video, "ab"), *pairs(b"<html>", "cd"), *pairs(b"", "e")]
    shard = write_tar(tmp_path / "t.tar", members)
    with pytest.raises(
        ValueError, match=r"3 of 5 samples cannot be used: not a readable video file \(2\), the file is empty"
    ):
        build(shard, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len((tmp_path / "out" / "index" / "rejected.jsonl").read_text().splitlines()) == 3
    assert build(shard, tmp_path / "out", max_rejected_share=0.6)[1].read_shards == 0
    with pytest.raises(ValueError, match=r"none of its 1 samples can be used: the file is empty \(1\)"):
        build(write_tar(tmp_path / "u.tar", pairs(b"", "e")), tmp_path / "none", max_rejected_share=1.0)


def test_what_is_not_ours_is_left_alone(video: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    shard = write_tar(folder / "shard-000000.tar", pairs(video, "a"))
    (folder / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match=r"OUT=.*tars has a manifest\.json that is not ours"):
        build(folder, folder)
    assert (folder / "manifest.json").read_text() == '{"name": "an app"}'
    (folder / "manifest.json").unlink()
    build(folder, folder)
    with pytest.raises(ValueError, match="holds the index of shards that were there before"):
        remove_dataset(folder)
    assert shard.exists()
    with DatasetWriter(tmp_path / "cache", kind="latents", description={}) as writer:
        writer.add(Clip("k", "c", 1, 1, 1, 1.0, 8, 8, True), b"x", extension="latents.safetensors")
        writer.close()
    with pytest.raises(ValueError, match=r"OUT=.*cache holds latents"):
        build(folder, tmp_path / "cache")
    with DatasetWriter(tmp_path / "ours", kind="raw", description={"source": "videos"}) as writer:
        writer.add(Clip("k", "c", 1, 1, 1, 1.0, 8, 8, True), b"x", extension="mp4")
        before = writer.close()
    with pytest.raises(ValueError, match=r"OUT=.*ours holds a dataset of its own, made from videos"):
        build(folder, before.folder)
    assert rows(ClipIndex.open(before.folder)) == rows(before)


def test_a_replaced_shard_stops_the_run_with_a_remedy(video: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "tars" / "a.tar", pairs(video, "a"))
    build(tmp_path / "tars", tmp_path / "out")
    write_tar(shard, pairs(video, "abcdefghijklmnop"))
    with pytest.raises(
        ValueError, match=r"changed since it was indexed: .*; index it again with: muybridge index .*tars .*out"
    ):
        ClipIndex.open(tmp_path / "out")
    shard.unlink()
    with pytest.raises(ValueError, match=r"a\.tar is missing"):
        ClipIndex.open(tmp_path / "out")
    with pytest.raises(ValueError, match="holds no shards"):
        build(tmp_path / "tars", tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"2 of 2 shards cannot be used:\n  .*gone-1\.tar: does not exist\n  .*gone-2\.tar"
    ):
        build(tmp_path / "gone-{1..2}.tar", tmp_path / "new")


def test_indexes_of_the_first_version_are_still_read(video: bytes, tmp_path: Path) -> None:
    import pyarrow as pa

    write_tar(tmp_path / "tars" / "a.tar", pairs(video, "ab"))
    index, _ = build(tmp_path / "tars", tmp_path / "tars")
    manifest = json.loads((index.folder / "manifest.json").read_text())
    manifest["version"] = 1
    (index.folder / "manifest.json").write_text(json.dumps(manifest))
    table = pa.ipc.open_file(str(index.folder / "index.arrow")).read_all()
    first = table.select(table.schema.names[: table.schema.names.index("labels") + 1])
    with pa.OSFile(str(index.folder / "index.arrow"), "wb") as file, pa.ipc.new_file(file, first.schema) as writer:
        writer.write_table(first)
    old = ClipIndex.open(index.folder)
    assert old.fingerprint == index.fingerprint
    clip = old.clip(1)
    assert (clip.key, clip.caption, clip.frames, clip.captions) == ("b", "caption of b", 25, ["caption of b"])
    assert (clip.pixel_format, clip.is_hdr, clip.luma, clip.bit_depth) == ("", False, None, 0)
    assert old.column("is_image").tolist() == [False, False]


def test_records_say_what_the_shard_was(video: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [*pairs(video, "a"), ("b.mp4", video)])
    index, _ = build(shard, tmp_path / "out")
    record = read_record(sidecar_path(tmp_path / "out", str(shard)))
    assert record is not None
    assert (record.members, record.clips, record.facts.size) == (3, 1, shard.stat().st_size)
    [entry] = index.manifest["shards"]
    assert entry["version"] == f"mtime {shard.stat().st_mtime_ns}"
    assert (entry["members"], entry["clips"], entry["bytes"]) == (3, 1, os.path.getsize(shard))
    assert (tmp_path / "out" / entry["sidecar"]).is_file()


def test_numeric_columns_are_views_of_the_file(video: bytes, tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / "tars" / f"{name}.tar", pairs(video, name))
    index, _ = build(tmp_path / "tars", tmp_path / "tars")
    for name in ("offset", "frames", "duration_seconds", "width"):
        column = index.column(name)
        assert not column.flags.owndata
        assert not column.flags.writeable
    assert np.array_equal(index.column("shard"), [0, 1])
