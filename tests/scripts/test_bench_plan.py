import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from muybridge.scripts import bench_plan


def test_the_plan_of_a_large_dataset_is_measured(
    muybridge: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out = tmp_path / "figures" / "plan.json"
    answer = muybridge("bench", "plan", "--rows", "20000", "--steps", "5", "--json", out)
    assert answer.returncode in (0, 1), answer.stderr  # 1 where a goal is missed, which is no fault of the command
    figures = json.loads(out.read_text())
    assert figures["rows"] == 20_000
    assert 10_000 < figures["rows_in_buckets"] < 20_000
    assert figures["streams"] > 200
    assert figures["largest_global_batch"] > figures["samples_of_a_step"] > 0
    assert 2000 < figures["plan_state_bytes"] <= bench_plan.GOALS["plan_state_bytes"]
    assert figures["step_of_all_ranks_ms"] > figures["step_ms"] > 0
    assert "step ms" in answer.stdout
    assert "at most 10" in answer.stdout
    assert f"muybridge: wrote {out}" in answer.stdout


def test_a_missed_goal_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_plan.GOALS, "plan_state_bytes", 1)
    assert bench_plan.main(["--rows", "600", "--steps", "1"]) == 1
    assert "at most 1, missed" in capsys.readouterr().out


def test_numbers_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_plan.main(["--rows", "3"])
    assert "--rows=3 must be at least 6" in capsys.readouterr().err
