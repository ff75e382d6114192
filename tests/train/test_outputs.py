"""A run writes into its directory and nowhere else."""

from pathlib import Path

import pytest

from muybridge.scripts import cli
from muybridge.train.outputs import OUTPUTS, link_fault


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("name", [*OUTPUTS, "checkpoints/step-00000010", "validation/step-00000010", "model/vae"])
def test_a_link_that_leads_out_is_refused(run_dir: Path, name: str) -> None:
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).symlink_to("../elsewhere" if "/" not in name else "../../elsewhere")
    fault = link_fault(run_dir)
    assert f"{run_dir / name} is one to {run_dir.parent / 'elsewhere'}" in fault


def test_links_that_lead_nowhere_or_in_circles_are_no_way_out(run_dir: Path) -> None:
    (run_dir / "wandb").symlink_to("wandb")
    assert not link_fault(run_dir)
    (run_dir / "model").symlink_to("/nowhere/at/all")
    assert "leads out of it" in link_fault(run_dir)


def test_other_links_are_fine(run_dir: Path, tmp_path: Path) -> None:
    assert not link_fault(tmp_path / "not yet there")
    (run_dir / "data").symlink_to("../elsewhere")  # the user's
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "best").symlink_to("step-00000010")
    (tmp_path / "link").symlink_to("run")
    assert not link_fault(run_dir)
    assert not link_fault(tmp_path / "link")


def test_a_run_does_not_start_there(run_dir: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints").symlink_to("../elsewhere")
    assert cli.main(["train", *tiny_run, f"run_dir={run_dir}"]) == 64
    assert "must not hold a link that leads out of it" in capsys.readouterr().err
    assert [path.name for path in run_dir.iterdir()] == ["checkpoints"]
    assert not list((run_dir.parent / "elsewhere").iterdir())
