"""What several tests of training share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def guard_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What guard_program.py found on each rank, by the number of processes."""
    root = tmp_path_factory.mktemp("guard_runs")
    program = [sys.executable, str(Path(__file__).with_name("guard_program.py")), str(root)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(program, capture_output=True, text=True, check=False, env=env)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return {world: json.loads((root / f"w{world}.json").read_text()) for world in (1, 2)}


@pytest.fixture
def life_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a life of a Slurm job, as the batch script makes it."""
    folder = tmp_path / "lives" / "123.0"
    folder.mkdir(parents=True)
    monkeypatch.setenv("MUYBRIDGE_LIFE_DIR", str(folder))
    return folder
