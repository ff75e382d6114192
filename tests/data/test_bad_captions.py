"""Whatever captions a dataset may hold: each comes out clean, or its sample is left out with a reason."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from muybridge.data.captions import CaptionError, captions_from_json
from muybridge.data.index import ClipIndex
from muybridge.data.indexing import IndexReport, IndexSettings, build_index
from muybridge.data.sources import find_sources
from muybridge.data.tar_samples import CaptionRules

BLOCK = 512


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


PICTURE = picture()
Members = list[tuple[str, bytes]]


def pair(key: str, caption: bytes = b"a dog") -> Members:
    return [(f"{key}.png", PICTURE), (f"{key}.txt", caption)]


def tar_of(members: Members) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
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


def build(source: Path, out: Path, rules: CaptionRules | None = None, *, max_rejected_share: float = 1.0) -> Result:
    settings = IndexSettings(captions=rules or CaptionRules())
    options: dict[str, Any] = {"workers": 1, "timeout_seconds": 20.0, "max_rejected_share": max_rejected_share}
    return Result(*build_index(str(source), out, settings=settings, **options))


# Of each: the file beside the picture, and the reason, or the captions that come out.

TEXTS: dict[str, tuple[bytes, str | list[str]]] = {
    "empty": (b"", "no caption (empty.txt is empty)"),
    "blanks": (b" \t\r\n\xc2\xa0 ", "no caption (blanks.txt is empty)"),
    "nulls": (b"\0\0\0", "no caption (nulls.txt is empty)"),
    "latin": ("un café".encode("latin-1"), "caption file is not UTF-8 text: latin.txt, byte 6"),
    "utf16": ("a dog".encode("utf-16"), "caption file is not UTF-8 text: utf16.txt, byte 0"),
    "half": (b"a \xed\xa0\x80 dog", "caption file is not UTF-8 text: half.txt, byte 2"),
    "mark": (b"\xef\xbb\xbfa dog", ["a dog"]),
    "controls": (b"a\0dog\x1b\r\nruns\x7f", ["a dog runs"]),
}
JSONS: dict[str, tuple[bytes, str | list[str]]] = {
    "string": (b'{"caption": "a dog"}', ["a dog"]),
    "list": (b'{"caption": ["a dog", " ", null, "the dog"]}', ["a dog", "the dog"]),
    "surrogate": (b'{"caption": "a \\ud83d dog"}', ["a dog"]),
    "nested": (
        b'{"caption": {"short": "dog", "long": "a dog"}}',
        "caption of a wrong type: nested.json: its caption is an object, not text; name one of its fields: caption.short",
    ),
    "weights": (
        b'{"caption": [{"text": "a dog", "weight": 2}]}',
        "caption of a wrong type: weights.json: its caption is a list with an object, not text; name one of its fields: "
        "caption.text",
    ),
    "number": (b'{"caption": 7}', "caption of a wrong type: number.json: its caption is a number, not text"),
    "truth": (
        b'{"caption": [true]}',
        "caption of a wrong type: truth.json: its caption is a list with true or false, not text",
    ),
    "other": (b'{"text": "a dog"}', "no caption (other.json: it has no field 'caption'; it has text)"),
    "hostile": (b'{"\\ud800\\u001b": 1}', "no caption (hostile.json: it has no field 'caption'; it has ??)"),
    "top": (b'"a dog"', "caption of a wrong type: top.json: it is text, not an object with 'caption'"),
    "nan": (b'{"caption": "a dog", "score": NaN}', "caption file is not usable JSON: nan.json: NaN is no JSON"),
    "twins": (
        b'{"caption": "a dog", "caption": "a cat"}',
        "caption file is not usable JSON: twins.json: the name 'caption' comes twice in an object",
    ),
    "deep": (b'{"caption":' * 1000, "caption file is not usable JSON: deep.json is nested more than 32 deep"),
    "cut": (b'{"caption": "a d', "caption file is not usable JSON: cut.json: Unterminated string"),
    "digits": (b'{"n": ' + b"9" * 5000 + b"}", "caption file is not usable JSON: digits.json: Exceeds the limit"),
}
HUGE_BYTES = 100_000_000


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The index of a shard with all these captions, one that is missing, and two of 100 MB."""
    folder = tmp_path_factory.mktemp("captions")
    members: Members = [("missing.png", PICTURE)]
    for cases, extension in ((TEXTS, "txt"), (JSONS, "json")):
        for key, (content, _) in cases.items():
            members += [(f"{key}.png", PICTURE), (f"{key}.{extension}", content)]
    with (folder / "a.tar").open("wb") as file:
        file.write(tar_of(members).rstrip(b"\0"))
        file.seek(-(-file.tell() // BLOCK) * BLOCK)
        for name in ("huge.txt", "hugest.json"):
            file.write(tar_of([(f"{Path(name).stem}.png", PICTURE)])[: 2 * BLOCK])
            info = tarfile.TarInfo(name)
            info.size = HUGE_BYTES
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.seek(-(-HUGE_BYTES // BLOCK) * BLOCK, os.SEEK_CUR)  # a hole, which takes no room
        file.write(bytes(2 * BLOCK))
    return build(folder, folder)


@pytest.mark.parametrize("key", [*TEXTS, *JSONS])
def test_a_caption_comes_out_clean_or_is_left_out_with_its_reason(captioned: Result, key: str) -> None:
    expected = {**TEXTS, **JSONS}[key][1]
    if isinstance(expected, list):
        assert captioned.captions()[key] == expected
        assert key not in captioned.reasons()
    else:
        assert captioned.reasons()[key].startswith(expected)
        assert key not in captioned.captions()


def test_captions_without_end_are_too_large(captioned: Result) -> None:
    assert captioned.reasons()["huge"] == "caption file is too large: huge.txt has more than 1 MiB"
    assert captioned.reasons()["hugest"] == "caption file is too large: hugest.json has more than 1 MiB"


def test_the_report_counts_each_class_and_names_key_and_shard(captioned: Result) -> None:
    lines = (captioned.index.folder / "index" / "rejected.jsonl").read_text().splitlines()
    assert all(line["shard"] == "a.tar" and line["key"] + "." in line["reason"] for line in map(json.loads, lines))
    assert captioned.report.counts() == {
        "no caption": 6,
        "caption file is not UTF-8 text": 3,
        "caption of a wrong type": 5,
        "caption file is not usable JSON": 5,
        "caption file is too large": 2,
    }
    folder = captioned.index.folder
    with pytest.raises(ValueError, match=r"21 of 26 samples cannot be used: no caption \(6\)") as caught:
        build(folder, folder, max_rejected_share=0.5)
    assert all(f"{reason} ({count})" in str(caught.value) for reason, count in captioned.report.counts().items())
    assert str(caught.value).endswith("--max-rejected sets the share that may be left out (0.5)")


@pytest.mark.parametrize(
    ("default", "caption", "counts"),
    [
        (None, None, {"no caption": 3, "caption file is not UTF-8 text": 1}),
        ("", "", {"caption file is not UTF-8 text": 1}),
        (" a \n film ", "a film", {"caption file is not UTF-8 text": 1}),
    ],
)
def test_samples_without_a_caption_are_left_out_or_get_the_one_that_was_asked_for(
    tmp_path: Path, default: str | None, caption: str | None, counts: dict[str, int]
) -> None:
    members = [*pair("good"), ("none.png", PICTURE), *pair("empty", b""), *pair("blank", b" \n"), *pair("bad", b"\xff")]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    result = build(tmp_path, tmp_path, CaptionRules(default=default))
    assert result.report.counts() == counts  # a file that cannot be read is not a caption that is missing
    extra = {} if caption is None else {key: [caption] for key in ("none", "empty", "blank")}
    assert result.captions() == {"good": ["a dog"], **extra}


@pytest.mark.parametrize(
    ("value", "field", "expected"),
    [
        ({"caption": [{"text": "a", "weight": 2}, {"text": "b"}, {"weight": 1}]}, "caption.text", ["a", "b"]),
        ([{"caption": "a"}, {"caption": ["b", "c"]}], "caption", ["a", "b", "c"]),
        ({"a": [{"b": [{"c": "x"}, {"c": "y"}]}, {"b": {"c": "z"}}]}, "a.b.c", ["x", "y", "z"]),
        ({"caption": [{"weight": 1}]}, "caption.text", "no caption .*its caption has no field 'text'; it has weight"),
        ({"caption": []}, "caption.text", "no caption .*its caption has no field 'text'; it has none"),
        ({"caption": [{"text": "a"}, "b"]}, "caption.text", "its caption is a list, not an object with 'text'"),
        (
            {"caption": [{"text": 1}, {"text": "b"}]},
            "caption.text",
            "its caption.text is a list with a number, not text",
        ),
    ],
)
def test_the_path_to_a_caption_goes_on_in_each_object_of_a_list(
    value: Any, field: str, expected: str | list[str]
) -> None:
    def found() -> list[str]:
        return captions_from_json(json.dumps(value).encode(), field=field, name="a.json")

    if isinstance(expected, list):
        assert found() == expected
    else:
        with pytest.raises(CaptionError, match=expected):
            found()


def test_many_names_in_an_object_take_no_time() -> None:
    names = ",".join(f'"{number}":0' for number in range(80_000))
    with pytest.raises(CaptionError, match="the name '5' comes twice"):
        captions_from_json(f'{{{names},"5":0}}'.encode(), field="caption", name="a.json")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_captions_of_tables_have_the_same_limit(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    texts = ["a dog", "dog " * 300_000, "a \ud800dog" if kind == "jsonl" else "a\vdog"]
    table = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(json.dumps({"path": "a.png", "caption": text}) for text in texts))
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        pa = pytest.importorskip("pyarrow")
        pq.write_table(pa.table({"path": ["a.png"] * 3, "caption": texts}), table)
    found = find_sources(table)
    assert [source.caption for source in found] == ["a dog", "", "a dog"]
    assert [source.fault for source in found] == ["", "caption is too large (its caption has more than 1 MiB)", ""]


def test_hostile_lines_and_names_of_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"path": "a.png", "caption": ' + "[" * 200_000)
    with pytest.raises(ValueError, match=r"SRC=.*deep\.jsonl, line 1 is not JSON"):
        find_sources(tmp_path / "deep.jsonl")
    (tmp_path / "quote.csv").write_text('path,caption\na.png,a dog\na.png,"a cat\n' + "a.png,a fish\n" * 20_000)
    with pytest.raises(ValueError, match=r"SRC=.*quote\.csv is not a csv table: field larger .* \(after line \d+\)"):
        find_sources(tmp_path / "quote.csv")
    names = ["\ud800.mp4", "a\0.mp4", "n" * 5000, "/etc", "\x1b[2J.mp4"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"path": name, "caption": "x"}) for name in names))
    found = find_sources(tmp_path / "t.jsonl")
    assert [source.fault for source in found] == ["no such file"] * 5
    assert all(source.name.isprintable() for source in found)
