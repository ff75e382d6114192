"""Folders and tables are read as users have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muybridge.data.sources import CAPTION_COLUMNS, VIDEO_COLUMNS, find_sources, listing_fingerprint


def make(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_a_folder_pairs_videos_with_captions_of_the_same_name(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "b.mp4": "x",
        "b.txt": "\ufeffa dog\n runs\t fast ",
        "a.MOV": "x",
        "a.txt": "a cat",
        "deep/c.d.webm": "x",
        "deep/c.d.txt": "a fish",
        "._b.mp4": "x",
        "notes.txt": "not a caption",
        "picture.png": "x",
    }
    sources = find_sources(make(tmp_path, files))
    assert [(s.name, s.caption, s.fault) for s in sources] == [
        ("a.MOV", "a cat", ""),
        ("b.mp4", "a dog runs fast", ""),
        ("deep/c.d.webm", "a fish", ""),
    ]


def test_a_bad_caption_is_a_fault_of_its_video_alone(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "1.mp4": "x",
        "2.mp4": "x",
        "2.txt": " \n",
        "3.mp4": "x",
        "3.txt": b"\xff\xfe\x00caf\xe9",
        "4.mp4": "x",
        "4.txt": "fine",
        "5.mp4": "x",
        "5.txt": "long " * 300_000,
    }
    faults = {s.name: s.fault for s in find_sources(make(tmp_path, files))}
    assert faults == {
        "1.mp4": "no caption (1.txt is missing)",
        "2.mp4": "no caption (2.txt is empty)",
        "3.mp4": "caption file is not UTF-8 text: 3.txt, byte 0",
        "4.mp4": "",
        "5.mp4": "caption file is too large: 5.txt has more than 1 MiB",
    }


@pytest.mark.parametrize("video", VIDEO_COLUMNS)
@pytest.mark.parametrize("caption", [*CAPTION_COLUMNS, "Caption"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_may_use_any_of_the_usual_column_names(tmp_path: Path, video: str, caption: str, kind: str) -> None:
    make(tmp_path, {"clips/a.mp4": "x", "b.mp4": "x"})
    rows = [("clips/a.mp4", 'a "red", ball'), (str(tmp_path / "b.mp4"), "zwei Bälle"), ("gone.mp4", "c"), ("b.mp4", "")]
    table = tmp_path / f"table.{kind}"
    if kind == "csv":
        lines = [f"id,{video},{caption}"] + [
            f'{i},{p},"{c.replace(chr(34), 2 * chr(34))}"' for i, (p, c) in enumerate(rows)
        ]
        table.write_text("\n".join(lines), encoding="utf-8")
    else:
        table.write_text("\n\n".join(json.dumps({"id": 1, video: p, caption: c}) for p, c in rows), encoding="utf-8")
    sources = find_sources(table)
    assert [s.caption for s in sources] == ['a "red", ball', "zwei Bälle", "", ""]
    assert [s.path for s in sources[:2]] == [tmp_path / "clips/a.mp4", tmp_path / "b.mp4"]
    assert [s.fault for s in sources] == ["", "", "no such file", f"no caption (its {caption} is empty or not text)"]


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "gone", "SRC=.*gone does not exist"),
        ({"empty/readme.md": "x"}, "empty", "holds no videos"),
        (
            {"a.mp4": "x", "b.mp4": "x"},
            ".",
            r"none of its 2 videos has a caption; put the caption of a\.mp4 into a\.txt",
        ),
        ({"t.csv": "video,caption\n"}, "t.csv", "must have one of the columns|has no rows"),
        ({"t.csv": "name,caption\na,b\n"}, "t.csv", r"one of the columns video, path, .*; it has name, caption"),
        (
            {"t.csv": "video,words\na,b\n"},
            "t.csv",
            r"one of the columns caption, prompt, text, cap; it has video, words",
        ),
        ({"t.jsonl": '{"video": "a", "cap": "b"}\n{oops\n'}, "t.jsonl", "line 2 is not JSON"),
        ({"t.jsonl": '["a", "b"]\n'}, "t.jsonl", "line 1 must be a JSON object"),
        ({"t.csv": b"video,caption\na,\xff\n"}, "t.csv", r"is not UTF-8 text \(byte 16\)"),
        ({"t.parquet": "PAR1 no more"}, "t.parquet", "is not a parquet table"),
        ({"a.tar.gz": b"\x1f\x8b\x08"}, "a.tar.gz", r"1 tars cannot be used:\n  a\.tar\.gz: compressed with gzip"),
        ({"in/a.tar": b""}, "in", r"1 tars cannot be used:\n  a\.tar: empty: 0 bytes"),
        ({"t.xlsx": "x"}, "t.xlsx", r"must be a folder, a \.csv, \.jsonl or \.parquet table, or a \.tar"),
    ],
)
def test_nothing_to_prepare_is_one_clear_error(
    tmp_path: Path, files: dict[str, str | bytes], source: str, message: str
) -> None:
    make(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        find_sources(tmp_path / source)


def test_the_listing_notices_every_change(tmp_path: Path) -> None:
    make(tmp_path, {"a.mp4": "x", "a.txt": "one"})
    seen = [listing_fingerprint(find_sources(tmp_path))]
    assert listing_fingerprint(find_sources(tmp_path)) == seen[0]
    for files in ({"a.txt": "two"}, {"a.mp4": "xy"}, {"b.mp4": "x"}):
        make(tmp_path, dict(files))
        seen.append(listing_fingerprint(find_sources(tmp_path)))
    assert len(set(seen)) == 4
