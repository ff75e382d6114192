"""What several tests of training share."""

import json
from pathlib import Path
from typing import Any

import pytest

from muybridge.tests.conftest import Command, Once


@pytest.fixture(scope="session")
def guard_runs(make_once: Once, launch: Command) -> dict[int, list[dict[str, Any]]]:
    """What guard_program.py found on each rank, by the number of processes."""

    def make(folder: Path) -> None:
        answer = launch(0, Path(__file__).with_name("guard_program.py"), folder)
        assert answer.returncode == 0, answer.stdout + answer.stderr

    root = make_once("guard_runs", make)
    return {world: json.loads((root / f"w{world}.json").read_text()) for world in (1, 2)}


@pytest.fixture
def life_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a life of a Slurm job, as the batch script makes it."""
    folder = tmp_path / "lives" / "123.0"
    folder.mkdir(parents=True)
    monkeypatch.setenv("MUYBRIDGE_LIFE_DIR", str(folder))
    return folder
