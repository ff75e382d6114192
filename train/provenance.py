"""What a run directory says of how it came about: the settings, the code, the data."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from .compose import plain
from .config import TrainConfig


def write_provenance(config: TrainConfig, *, data_fingerprint: str) -> None:
    """Write config.yaml and provenance.json."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(plain(config), sort_keys=False))
    facts = {"git_commit": git_commit(), "data_fingerprint": data_fingerprint, "torch": torch.__version__}
    (run_dir / "provenance.json").write_text(json.dumps(facts, indent=1))


def setting_texts(config: TrainConfig) -> dict[str, str]:
    """Every setting by its name, as text."""
    return {name: json.dumps(value) for name, value in _flat(plain(config), "")}


def _flat(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def git_commit() -> str | None:
    """The commit of the code that runs, or None outside a git checkout."""
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None
