"""`muybridge prepare` takes parquet tables, tars and pictures as well, measures quality, and cuts at scene changes."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from muybridge.data.decode import read_frames
from muybridge.data.index import Clip, ClipIndex
from muybridge.data.scenes import cut_scenes
from muybridge.data.source_media import extension_of
from muybridge.data.sources import find_sources
from muybridge.data.tar_samples import CaptionRules
from muybridge.scripts.prepare import main

ONE_SECOND = [40 * i for i in range(25)]


@pytest.fixture(scope="module")
def video(numbered: Any) -> bytes:
    """One second of H.264."""
    return numbered.encode(ONE_SECOND)


def picture(level: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 48, 3), level, np.uint8)).save(file, format)
    return file.getvalue()


def prepare(*arguments: object) -> ClipIndex:
    words = [str(argument) for argument in arguments]
    main([*words, "--workers", "1"])
    return ClipIndex.open(words[1])


def clips(index: ClipIndex) -> list[Clip]:
    return [index.clip(row) for row in range(len(index))]


def media(index: ClipIndex, row: int) -> bytes:
    clip = index.clip(row)
    return index.shards[clip.shard].read_bytes()[clip.offset : clip.offset + clip.size]


def rejected(index: ClipIndex) -> dict[str, str]:
    lines = (index.folder / "rejected.jsonl").read_text().splitlines()
    return {entry["file"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_parquet_tables_hold_paths_or_bytes(video: bytes, tmp_path: Path, form: str) -> None:
    cells: list[Any] = [video, picture(9), picture(8), None, b"<html>"]
    if form == "struct":
        cells = [{"bytes": cell, "path": f"{n}.mp4"} for n, cell in enumerate(cells)]
    if form == "path":
        for n, cell in enumerate(cells):
            if cell is not None:
                (tmp_path / f"{n}.mp4").write_bytes(cell)
        cells = [f"{n}.mp4" for n in range(len(cells))]
    captions = ["a dog", "", "a grey", "none", "a page"]
    table = pa.table({"id": [1, 2, 3, 4, 5], "video": cells, "caption": captions})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    index = prepare(tmp_path / "t.parquet", tmp_path / "out")
    assert [clip.caption for clip in clips(index)] == ["a dog", "a grey"]
    assert [media(index, row) for row in range(2)] == [video, picture(8)]
    assert [clip.is_image for clip in clips(index)] == [False, True]
    with tarfile.open(index.shards[0]) as tar:
        names = [Path(member.name).suffix for member in tar]
    assert names == [".mp4", ".txt", *([".mp4", ".txt"] if form == "path" else [".png", ".txt"])]
    names = ["1.mp4", "3.mp4", "4.mp4"] if form == "path" else ["row 1", "row 3", "row 4"]
    reasons = rejected(index)
    assert sorted(reasons) == names
    assert reasons[names[0]] == "no caption (its caption is empty or not text)"
    assert reasons[names[1]] == ("no such file" if form == "path" else "the file is empty")
    assert reasons[names[2]].startswith("not a readable video file")
    assert not (tmp_path / "out" / ".spool").exists()


def test_a_parquet_table_without_the_usual_columns_says_what_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"], "blob": [b"c"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"one of the columns video, path, .*; it has url, caption, blob"):
        find_sources(tmp_path / "t.parquet")


def test_tars_are_made_into_shards_of_ours(video: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    members = {
        "../up/a.mp4": video,
        "../up/a.json": b'{"caption": ["a dog", "the dog"]}',
        "b.png": picture(50),
        "b.txt": b"grey",
        "b.json": b'{"n": 1}',
        "c.mp4": b"<html>",
        "c.txt": b"x",
        "d.mp4": video,
    }
    with tarfile.open(tmp_path / "in" / "x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = prepare(tmp_path / "in", tmp_path / "out")
    a, b = clips(index)
    assert (a.key, a.captions, b.caption, b.label_values) == ("000000_a", ["a dog", "the dog"], "grey", {"n": 1})
    assert [media(index, row) for row in range(2)] == [video, picture(50)]
    assert sorted(rejected(index)) == ["x.tar/c", "x.tar/d"]
    with_default = prepare(tmp_path / "in" / "x.tar", tmp_path / "two", "--default-caption", "a film")
    assert [clip.caption for clip in clips(with_default)] == ["a dog", "grey", "a film"]
    whole = (tmp_path / "in" / "x.tar").read_bytes()
    (tmp_path / "in" / "y.tar").write_bytes(whole[:600])
    (tmp_path / "in" / "z.tar").write_bytes(whole[:1024])
    with pytest.raises(ValueError, match=r"2 tars cannot be used:\n  y\.tar: cut in the middle.*\n  z\.tar: cut in"):
        prepare(tmp_path / "in", tmp_path / "three")


def test_folders_of_pictures_are_clips_of_one_frame(video: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in {"a.png": picture(10), "b.JPG": picture(20, "JPEG"), "c.webp": picture(30, "WEBP")}.items():
        (folder / name).write_bytes(data)
    (folder / "a.txt").write_text("ten")
    (folder / "b.json").write_text('{"caption": ["twenty", "20"]}')
    index = prepare(folder, tmp_path / "out", "--quality")
    assert [(clip.caption, clip.frames, clip.is_image, clip.width) for clip in clips(index)] == [
        ("ten", 1, True, 48),
        ("twenty", 1, True, 48),
    ]
    assert index.captions(1) == ["twenty", "20"]
    assert index.column("luma").tolist() == pytest.approx([10, 20], abs=1)
    assert rejected(index) == {"c.webp": "no caption (c.txt is missing)"}
    # Beside videos, pictures are previews unless they have a caption of their own.
    (folder / "a.mp4").write_bytes(video)
    found = find_sources(folder)
    assert [(source.name, source.fault) for source in found] == [("a.mp4", ""), ("b.JPG", "")]


def test_captions_of_folders_follow_the_same_rules(video: bytes, tmp_path: Path) -> None:
    for name, caption in {"a": '{"text": {"en": "a dog"}}', "b": '{"text": "flat"}', "c": ""}.items():
        (tmp_path / f"{name}.mp4").write_bytes(video)
        if caption:
            (tmp_path / f"{name}.json").write_text(caption)
    found = find_sources(tmp_path, CaptionRules(field="text.en"))
    assert [(source.caption, source.fault) for source in found] == [
        ("a dog", ""),
        ("", "caption of a wrong type: b.json: its text is text, not an object with 'en'"),
        ("", "no caption (c.json is missing)"),
    ]
    found = find_sources(tmp_path, CaptionRules(field="text.en", default=""))
    assert [(source.caption, source.fault) for source in found][2] == ("", "")


def test_options_that_change_the_output_are_noticed(video: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(video)
    (tmp_path / "in" / "a.txt").write_text("a dog")
    index = prepare(tmp_path / "in", tmp_path / "out")
    assert set(index.manifest["description"]) == {"source", "listing", "shard_bytes"}  # as it always was
    for option in (["--quality"], ["--default-caption", ""], ["--caption-field", "caption"]):
        with pytest.raises(ValueError, match=r"--overwrite replaces it|none of its 1 videos has a caption"):
            prepare(tmp_path / "in", tmp_path / "out", *option)


def test_scenes_are_cut_where_they_start(numbered: Any, tmp_path: Path) -> None:
    times = [0, 40, 80, 200, 240, 280, 320, 360]  # uneven: a pause after the third frame
    (tmp_path / "in.mkv").write_bytes(numbered.encode(times, container="matroska"))
    files = cut_scenes(tmp_path / "in.mkv", [0.0, 0.2, 0.32], tmp_path)
    shown = []
    for file, seconds in zip(files, ([0, 0.04, 0.08], [0, 0.04, 0.08], [0, 0.04])):
        shown.append(numbered.read(read_frames(file.read_bytes(), seconds)))
    assert shown == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.skipif(importlib.util.find_spec("scenedetect") is not None, reason="PySceneDetect is installed")
def test_scene_split_needs_its_package(video: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video)
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(ValueError, match=r"--scene-split needs PySceneDetect, .* pip install 'scenedetect\["):
        prepare(tmp_path, tmp_path / "out", "--scene-split")
    assert not (tmp_path / "out").exists()


def test_scenes_become_clips(video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A package of the same name that finds a change at 0.4 s: what PySceneDetect itself finds is its own business.
    package = tmp_path / "packages" / "scenedetect"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "class ContentDetector: pass\n"
        "class Time:\n"
        "    def __init__(self, seconds): self.seconds = seconds\n"
        "    def get_seconds(self): return self.seconds\n"
        "def detect(path, detector): return [(Time(0.0), Time(0.4)), (Time(0.4), Time(1.0))]\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in {"a.mp4": video, "bad.mp4": b"<html>"}.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a dog")
    index = prepare(folder, tmp_path / "out", "--scene-split", "--quality")
    assert [(clip.key, clip.frames, clip.caption) for clip in clips(index)] == [
        ("000000_a_scene0000", 10, "a dog"),
        ("000000_a_scene0001", 15, "a dog"),
    ]
    assert all(clip.luma is not None for clip in clips(index))
    assert list(rejected(index)) == ["bad.mp4"]
    assert not (tmp_path / "out" / ".spool").exists()


def test_media_are_named_by_their_content(video: bytes, numbered: Any) -> None:
    expected = {
        "mp4": video,
        "png": picture(1),
        "jpg": picture(1, "JPEG"),
        "webp": picture(1, "WEBP"),
        "gif": picture(1, "GIF"),
        "mkv": numbered.encode([0, 40], container="matroska"),
    }
    assert {name: extension_of(data) for name, data in expected.items()} == {name: name for name in expected}
    assert extension_of(b"nothing known") == "mp4"
