"""Whether a node has the data of the run that is to train there: a node without its mount would end the run for wrong settings."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..data.storage import is_remote
from .health_findings import one_line


def missing_data(run_dir: Path) -> list[str]:
    """What this node does not have, or only as an empty folder, of what the run's newest submission names; none by hand."""
    faults = []
    for setting, path in _data_paths(_submitted_settings(run_dir)):
        folder = _without_pattern(path)
        try:
            is_empty = folder.is_dir() and not any(folder.iterdir())  # as a mount's place is without the mount
            folder.stat()
        except OSError as error:
            faults.append(one_line(f"{setting}={path}: {error.strerror or error}"))
        else:
            if is_empty:
                faults.append(one_line(f"{setting}={path}: {folder} is an empty folder"))
    return faults


def _submitted_settings(run_dir: Path) -> dict[str, Any]:
    """As `muybridge submit` composed them, which here would take seconds."""
    folder = run_dir / "slurm"
    try:
        name = (folder / "submission").read_text(encoding="utf-8").strip()
        settings = yaml.safe_load((folder / "submissions" / name / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _data_paths(settings: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Setting and local path of everything that training and validation read."""
    data, validation = settings.get("data") or {}, settings.get("validation") or {}
    found = {}
    if data.get("access") == "latents":  # of training and of validation
        found["data.latents"] = data.get("latents")
    else:
        datasets = data.get("datasets") or {}
        found = {
            f"data.datasets.{name}.path": part.get("path") for name, part in datasets.items() if part.get("weight")
        }
        if not datasets:
            found["data.path"] = data.get("path")
        if validation.get("every_steps"):
            found["validation.path"] = validation.get("path")
    return [(setting, path) for setting, path in found.items() if path and not is_remote(path)]


def _without_pattern(path: str) -> Path:
    """The folder in which the tars lie that braces, * and ? stand for; a path without them is what it is."""
    plain = re.split(r"[{*?]", path, maxsplit=1)[0]
    return Path(path if plain == path or os.path.lexists(path) else os.path.dirname(plain) or ".")
