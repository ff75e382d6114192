"""Captions as datasets have them: text or JSON files of doubtful encoding, made into clean lines or refused with a reason."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from typing import Any

MAX_CAPTION_BYTES = 1 << 20
MAX_JSON_DEPTH = 32

# Strings, whole and unfinished, so that brackets inside them do not count; then brackets.
_JSON_TOKENS = re.compile(rb'"(?:[^"\\]|\\.?)*+"?|[\[{]|[\]}]', re.DOTALL)


class CaptionError(Exception):
    """A caption that cannot be used; the text is the reason."""


class NoCaptionError(CaptionError):
    """There is no caption, or an empty one."""


def caption_from_text(data: bytes, *, name: str) -> str:
    """The caption in a text file called `name`. Raises CaptionError."""
    caption = clean_caption(_decode(data, name))
    if not caption:
        raise NoCaptionError(f"no caption ({name} is empty)")
    return caption


def captions_from_json(data: bytes, *, field: str, name: str) -> list[str]:
    """The captions at `field` ("caption", or "a.b" for nested objects) of a JSON file: of a string one, of a list all of them.

    Of a list of objects the path goes on in each; what stands beside it, such as weights, is not read. Raises CaptionError.
    """
    values = [parse_json(data, name=name)]
    path: list[str] = []
    for part in field.split("."):
        values = _stepped(values, part, where=f"its {'.'.join(path)}" if path else "it", name=name)
        path.append(part)
    is_list = len(values) > 1 or isinstance(values[0], list)
    texts = [item for value in values for item in (value if isinstance(value, list) else [value])]
    for item in texts:
        if item is not None and not isinstance(item, str):
            inside = f"; name one of its fields: {field}.{_listed([next(iter(item))])}" if _is_object(item) else ""
            part = "a list with " if is_list else ""
            raise CaptionError(f"caption of a wrong type: {name}: its {field} is {part}{_kind(item)}, not text{inside}")
    captions = [caption for caption in (clean_caption(item) for item in texts if item) if caption]
    if not captions:
        raise NoCaptionError(f"no caption ({name}: its {field} is empty)")
    return captions


def parse_json(data: bytes, *, name: str) -> Any:
    """A JSON document of bounded size and depth, without NaN and without a name that comes twice. Raises CaptionError."""
    text = _decode(data, name)
    depth = 0
    for token in _JSON_TOKENS.finditer(data):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group()[:1], 0)
        if depth > MAX_JSON_DEPTH:
            raise CaptionError(f"caption file is not usable JSON: {name} is nested more than {MAX_JSON_DEPTH} deep")
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object_without_twins)
    except ValueError as error:
        raise CaptionError(f"caption file is not usable JSON: {name}: {error}") from error


def clean_caption(text: str) -> str:
    """One line without control characters (tabs and line breaks become spaces), in Unicode's composed form."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    return " ".join(unicodedata.normalize("NFC", text).split())


def printable(text: str) -> str:
    """A name from a file as an error can show it: without control characters and half characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _stepped(values: list[Any], part: str, *, where: str, name: str) -> list[Any]:
    # The field `part` of each object; a list of objects stands for all of them.
    found: list[Any] = []
    others: list[str] = []
    for value in values:
        for item in value if isinstance(value, list) and all(map(_is_object, value)) else [value]:
            if not isinstance(item, dict):
                raise CaptionError(
                    f"caption of a wrong type: {name}: {where} is {_kind(item)}, not an object with {part!r}"
                )
            found += [item[part]] if part in item else []
            others += item
    if not found:
        raise NoCaptionError(f"no caption ({name}: {where} has no field {part!r}; it has {_listed(others)})")
    return found


def _decode(data: bytes, name: str) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise CaptionError(f"caption file is too large: {name} has more than 1 MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError(f"caption file is not UTF-8 text: {name}, byte {error.start}") from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _object_without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {printable(twin[:200])!r} comes twice in an object")
    return found


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return printable((", ".join(names[:8]) + (", ..." if len(names) > 8 else ""))[:200]) or "none"
