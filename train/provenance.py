"""What a run directory says of how it came about: the settings, the code, the data."""

import json
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from .compose import plain
from .config import TrainConfig
from .outputs import replace_text

# Beside a copy of the package: the commit that it was copied from.
COPIED_COMMIT = "muybridge_commit.txt"


def write_provenance(config: TrainConfig, *, data_fingerprint: str) -> None:
    """Write config.yaml and provenance.json."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
    facts = {"git_commit": git_commit(), "data_fingerprint": data_fingerprint, "versions": versions()}
    replace_text(run_dir / "provenance.json", json.dumps(facts, indent=1))


def setting_texts(config: TrainConfig) -> dict[str, str]:
    """Every setting by its name, as text."""
    return {name: json.dumps(value) for name, value in _flat(plain(config), "")}


def changed_settings_note(config: TrainConfig) -> str:
    """What differs from the settings that the last attempt wrote, or an empty string, also where they cannot be read."""
    path = Path(config.run_dir) / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    if not isinstance(settings, dict):
        return ""
    before = dict(_flat(settings, ""))
    now = dict(_flat(plain(config), ""))
    names = [name for name in {**before, **now} if name != "run_dir" and before.get(name) != now.get(name)]
    changes = [f"{name}: {before.get(name)} before, {now.get(name)} now" for name in names]
    return f"settings changed since the last attempt: {'; '.join(changes)}" if changes else ""


def versions() -> dict[str, str]:
    """Of what a run's numbers may depend on."""
    packages = {name: version(name) for name in ("torch", "deepspeed", "triton", "numpy") if find_spec(name)}
    return {"muybridge": __version__, "python": platform.python_version(), **packages}


def changed_versions_note(saved: dict[str, str]) -> str:
    """What differs from the versions that a checkpoint was made with, or an empty string."""
    now = versions()
    changes = [
        f"{name} {saved[name]} before, {now[name]} now" for name in now if name in saved and saved[name] != now[name]
    ]
    return (
        f"versions changed since the checkpoint: {'; '.join(changes)}: results may differ in the last digits"
        if changes
        else ""
    )


def _flat(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def git_commit() -> str | None:
    """The commit of the code that runs, or None outside a git checkout and where there is no git."""
    copied = Path(__file__).parents[2] / COPIED_COMMIT
    if copied.is_file():  # before git is asked: a copy may lie below some checkout, whose commit is another by now
        return copied.read_text(encoding="utf-8").strip() or None
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return answer.stdout.strip() or None
