"""What a run directory says of how it came about: the settings, the code, the data."""

import json
import subprocess
from pathlib import Path

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


def git_commit() -> str | None:
    """The commit of the code that runs, or None outside a git checkout."""
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None
