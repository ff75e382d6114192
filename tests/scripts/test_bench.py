import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from muybridge.scripts import cli


def test_overhead_is_measured_in_paired_runs(
    muybridge: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out = tmp_path / "figures" / "overhead.json"
    answer = muybridge("bench", "overhead", "--pairs", "1", "--steps", "3", "--json", out)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    figures = json.loads(out.read_text())
    assert (figures["pairs"], figures["steps"]) == (1, 3)
    assert len(figures["overhead_percent_of_each_pair"]) == 1
    assert isinstance(figures["overhead_percent"], float)
    assert "overhead percent" in answer.stdout


@pytest.mark.parametrize(
    "more", [[], ["conditioning.form=channels", "model.in_channels=36", "data.access=raw"]], ids=["text", "image"]
)
def test_steps_of_a_model_are_timed(
    more: list[str], muybridge: Callable[..., subprocess.CompletedProcess[str]], tiny_run: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "step.json"
    answer = muybridge("bench", "step", "--steps", "3", "--json", out, *tiny_run, "run_dir=runs/none", *more)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    figures = json.loads(out.read_text())
    # 9 frames of 64 x 64 are 3 x 8 x 8 latents, in patches of 1 x 2 x 2.
    assert figures["tokens_per_step"] == 4 * 3 * 4 * 4
    assert figures["tokens_per_second"] == pytest.approx(figures["tokens_per_step"] / figures["seconds_per_step"])
    assert len(figures["seconds_of_each_step"]) == 3
    assert figures["mfu"] is None  # the peak of this machine is not known


def test_a_misspelt_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "overhed"]) == 64
    assert "invalid choice" in capsys.readouterr().err
