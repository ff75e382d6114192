"""`muybridge bench checkpoint`: every contestant writes, and the figures follow from their times."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from muybridge.scripts import bench_checkpoint


def test_saves_are_timed_against_a_copy_and_bare_writers(
    muybridge: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out, disk = tmp_path / "figures" / "checkpoint.json", tmp_path / "disk"
    disk.mkdir()
    answer = muybridge(*("bench", "checkpoint", "--megabytes", "67", "--repeats", "1", "--folder", disk, "--json", out))
    figures = json.loads(out.read_text())
    # One matrix of 2048 x 2048: the weights, an average and two moments, 4 bytes each, and a header.
    assert 0 < figures["bytes"] - 2048 * 2048 * 16 < 1000
    assert figures["background_over_bare_writer"] == pytest.approx(
        figures["bare_writer_seconds"] / figures["background_seconds"]
    )
    assert figures["blocking_over_memory_copy"] == pytest.approx(
        figures["blocking_seconds"] / figures["memory_copy_seconds"]
    )
    missed = [name for name in bench_checkpoint.LIMITS if bench_checkpoint._is_missed(name, figures[name])]
    assert answer.returncode == int(bool(missed)), answer.stdout + answer.stderr
    assert all(name in answer.stdout for name in missed)
    assert list(disk.iterdir()) == []


def test_a_goal_is_missed_on_its_own_side() -> None:
    assert not bench_checkpoint._is_missed("blocking_over_memory_copy", 1.1)
    assert bench_checkpoint._is_missed("blocking_over_memory_copy", 1.3)
    assert not bench_checkpoint._is_missed("background_over_bare_writer", 0.9)
    assert bench_checkpoint._is_missed("background_over_bare_writer", 0.8)
