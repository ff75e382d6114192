"""Captions as datasets have them: text or JSON files of doubtful encoding, made into clean lines or refused with a reason."""

from __future__ import annotations

import json
import re
import unicodedata
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

    Raises CaptionError.
    """
    value = parse_json(data, name=name)
    path: list[str] = []
    for part in field.split("."):
        where = f"its {'.'.join(path)}" if path else "it"
        if not isinstance(value, dict):
            raise CaptionError(
                f"caption of a wrong type: {name}: {where} is {_kind(value)}, not an object with {part!r}"
            )
        if part not in value:
            raise NoCaptionError(f"no caption ({name}: {where} has no field {part!r}; it has {_listed(value)})")
        value = value[part]
        path.append(part)
    values = value if isinstance(value, list) else [value]
    for item in values:
        if item is not None and not isinstance(item, str):
            inside = f"; name one of its fields: {field}.{next(iter(item))}" if isinstance(item, dict) and item else ""
            part = "a list with " if isinstance(value, list) else ""
            raise CaptionError(f"caption of a wrong type: {name}: its {field} is {part}{_kind(item)}, not text{inside}")
    captions = [caption for caption in (clean_caption(item) for item in values if item) if caption]
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
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} comes twice in an object")
    return found


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _listed(value: dict[str, Any]) -> str:
    names = list(value)
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else ""))[:200] or "none"
