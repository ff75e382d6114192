"""Captions of doubtful files come out clean, or with a reason."""

from __future__ import annotations

import json
import time

import pytest

from muybridge.data.captions import CaptionError, NoCaptionError, caption_from_text, captions_from_json, clean_caption


def test_captions_become_one_clean_line() -> None:
    assert clean_caption("a\x00b\r\nc\u2028d  e\x1b") == "a b c d e"
    assert clean_caption("e\u0301te\u0301") == "été"
    assert clean_caption("走る猫 🐈") == "走る猫 🐈"
    assert clean_caption("bad \ud800 half") == "bad half"


def test_text_files_are_read_strictly() -> None:
    assert caption_from_text(b"\xef\xbb\xbfa dog\n runs\t fast\0", name="a.txt") == "a dog runs fast"
    for data, reason in {
        b"": r"^no caption \(a\.txt is empty\)$",
        b" \n\t\x00 ": r"^no caption \(a\.txt is empty\)$",
        b"caf\xe9 noir": r"^caption file is not UTF-8 text: a\.txt, byte 3$",
        "a dog".encode("utf-16"): "is not UTF-8 text",
        b"\xed\xa0\x80": "is not UTF-8 text",  # half of a surrogate pair
        b"long " * 300_000: r"^caption file is too large: a\.txt has more than 1 MiB$",
    }.items():
        with pytest.raises(CaptionError, match=reason):
            caption_from_text(data, name="a.txt")


@pytest.mark.parametrize(
    ("value", "field", "captions"),
    [
        ({"caption": " a\ndog "}, "caption", ["a dog"]),
        ({"caption": ["a dog", "", "the dog", None]}, "caption", ["a dog", "the dog"]),
        ({"text": {"short": "dog", "long": "a dog"}}, "text.long", ["a dog"]),
        ({"caption": "half \ud800"}, "caption", ["half"]),
    ],
)
def test_json_captions_are_found_by_their_path(value: object, field: str, captions: list[str]) -> None:
    assert captions_from_json(json.dumps(value).encode(), field=field, name="a.json") == captions


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"caption": 7}', "caption of a wrong type: a.json: its caption is a number, not text"),
        ('{"caption": {"short": "a"}}', "its caption is an object, not text; name one of its fields: caption.short"),
        (
            '{"caption": [{"text": "a", "weight": 1}]}',
            "its caption is a list with an object, not text; .*: caption.text",
        ),
        ('{"caption": ["a", 1]}', "its caption is a list with a number, not text"),
        ('["a", "b"]', "caption of a wrong type: a.json: it is a list, not an object with 'caption'"),
        ("{oops", "caption file is not usable JSON: a.json: Expecting"),
        ("", "caption file is not usable JSON"),
        ('{"caption": "a", "score": NaN}', "NaN is no JSON"),
        ('{"caption": "a", "score": -Infinity}', "-Infinity is no JSON"),
        ('{"caption": "a", "caption": "b"}', "the name 'caption' comes twice in an object"),
        ('{"caption": ' + "[" * 33 + "]" * 33 + "}", "a.json is nested more than 32 deep"),
        ("[" * 500_000, "a.json is nested more than 32 deep"),
        ('{"caption": "' + "x" * (1 << 20) + '"}', "caption file is too large"),
        ('{"caption": "caf\xe9"}', "caption file is not UTF-8 text: a.json, byte 16"),
    ],
)
def test_json_that_cannot_be_used_says_why(text: str, reason: str) -> None:
    with pytest.raises(CaptionError, match=reason) as caught:
        captions_from_json(text.encode("latin-1"), field="caption", name="a.json")
    assert not isinstance(caught.value, NoCaptionError)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"text": "a"}', r"no caption \(a\.json: it has no field 'caption'; it has text\)"),
        ('{"caption": null}', "its caption is empty"),
        ('{"caption": []}', "its caption is empty"),
        ('{"caption": ["", " "]}', "its caption is empty"),
    ],
)
def test_json_without_a_caption_counts_as_none(text: str, reason: str) -> None:
    with pytest.raises(NoCaptionError, match=reason):
        captions_from_json(text.encode(), field="caption", name="a.json")


def test_brackets_in_strings_are_not_depth() -> None:
    text = json.dumps({"caption": "[" * 100 + '\\"{' * 100}).encode()
    assert captions_from_json(text, field="caption", name="a.json")[0].startswith("[[[")


def test_hostile_quotes_take_no_time() -> None:
    started = time.process_time()
    with pytest.raises(CaptionError):
        captions_from_json(b'"' + b'\\"' * 500_000 + b"\\", field="caption", name="a.json")
    assert time.process_time() - started < 2
