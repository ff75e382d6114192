import json
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muybridge.scripts import gpu_suite

GPU = {"gpu": "Some GPU 9000", "torch": "2", "cuda": "13", "python": "3"}


def parts_that_note(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[str]:
    """Replaces every part by one that takes `seconds` of a clock of its own, on one day, and notes its name."""
    seen: list[str] = []
    now = [0.0]

    def replaced(name: str) -> gpu_suite.Part:
        def run(out: Path, left: float) -> dict[str, Any]:
            seen.append(name)
            now[0] += seconds
            return {name: {"ok": name != "steps"}}

        return run

    monkeypatch.setattr(gpu_suite, "PARTS", {name: replaced(name) for name in gpu_suite.PARTS})
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu_suite, "datetime", SimpleNamespace(now=lambda zone: datetime(2026, 1, 2, tzinfo=zone)))
    return seen


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err


def test_correctness_comes_before_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = parts_that_note(monkeypatch)
    result, path = gpu_suite.run_parts(["steps", "bench", "kernels"], GPU, tmp_path, seconds=60)
    assert seen == ["kernels", "bench", "steps"]
    assert path.name.startswith("some-gpu-9000-2")
    assert json.loads(path.read_text()) == result


def test_commands_of_one_day_share_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts_that_note(monkeypatch)
    gpu_suite.run_parts(["kernels"], GPU, tmp_path, seconds=60)
    result, _ = gpu_suite.run_parts(["steps"], GPU, tmp_path, seconds=60)
    assert result["kernels"] == {"kernels": {"ok": True}}
    assert result["steps"] == {"steps": {"ok": False}}
    fresh, _ = gpu_suite.run_parts(["steps"], {**GPU, "torch": "3"}, tmp_path, seconds=60)
    assert "kernels" not in fresh


def test_parts_without_time_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = parts_that_note(monkeypatch, seconds=0.2)
    result, _ = gpu_suite.run_parts(["kernels", "bench"], GPU, tmp_path, seconds=0.1)
    assert seen == ["kernels"]
    assert result["bench"] == {"bench": {"ok": False, "summary": "left out for want of time"}}


def test_a_command_is_shown_timed_and_stopped_with_its_children(capsys: pytest.CaptureFixture[str]) -> None:
    entry, last = gpu_suite._run([sys.executable, "-c", "import os; print(os.environ['X'])"], 60, {"X": "seen"})
    assert (entry["ok"], last) == (True, "seen")
    entry, last = gpu_suite._run([sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60)
    assert not entry["ok"]
    assert entry["output"] == "why\n"
    # The child holds the pipe open: only ending it, too, lets the command end.
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    entry, _ = gpu_suite._run([sys.executable, "-c", child], 1.0)
    assert not entry["ok"]
    assert entry["summary"] == "stopped after 1 s"
    assert entry["seconds"] < 30


def test_the_newest_assembler_from_cuda_13_on_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    for version in ("12.8.93", "13.0.88", "13.1.80"):
        tool = tmp_path / version / "ptxas"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version[:4]}, V{version}'\n")
        tool.chmod(0o755)
    assert gpu_suite.find_ptxas([f"{tmp_path}/*/ptxas"]) == ("13.1.80", str(tmp_path / "13.1.80" / "ptxas"))
    assert gpu_suite.find_ptxas([f"{tmp_path}/12*/ptxas"]) is None
