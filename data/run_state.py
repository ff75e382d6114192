"""What a checkpoint keeps of the data's settings, and whether a run that resumes still has the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

STATE_VERSION = 1
MAX_STATE_BYTES = 4096  # as JSON, for six datasets of forty buckets
_HASH_TEXT = 16  # characters of a hash
_MAX_TEXT = 200  # characters of a setting that is kept as it is; of longer ones a hash is


def setting_texts(values: dict[str, Any]) -> dict[str, str]:
    """Settings, which JSON can hold, as a checkpoint keeps them."""
    texts = {name: json.dumps(value) for name, value in values.items()}
    return {name: text if len(text) <= _MAX_TEXT else _short_hash(text) for name, text in texts.items()}


def shortened(state: dict[str, Any]) -> dict[str, Any]:
    """A state whose longest settings are hashes, as far as `MAX_STATE_BYTES` ask for that."""
    settings = dict(state["settings"])
    short = {**state, "settings": settings}
    for name in sorted(settings, key=lambda name: -len(settings[name])):
        if len(json.dumps(short)) <= MAX_STATE_BYTES or len(settings[name]) <= _HASH_TEXT:
            break
        settings[name] = _short_hash(settings[name])
    return short


def changed_settings(state: dict[str, Any] | None, now: dict[str, str], *, accept_changes: bool) -> list[str]:
    """The settings that differ from those of a checkpoint's state.

    Raises ValueError, naming each of them, unless changes are accepted, and for a state of another version.
    """
    if state is None or state.get("version") != STATE_VERSION:
        raise ValueError("the checkpoint is of an older version, whose order of samples cannot be continued")
    saved = state["settings"]
    changed = [name for name in {**saved, **now} if not _is_same(saved.get(name), now.get(name))]
    if changed and not accept_changes:
        texts = [f"{name}: {saved.get(name, 'absent')} saved, {now.get(name, 'absent')} now" for name in changed]
        raise ValueError(
            f"these changed: {'; '.join(texts)} (undo it, choose another run_dir, or set data.accept_changes=true to go on "
            "with the new data from this step)"
        )
    return changed


def _is_same(saved: str | None, now: str | None) -> bool:
    return saved == now or (now is not None and saved == _short_hash(now))


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_HASH_TEXT // 2).hexdigest()
