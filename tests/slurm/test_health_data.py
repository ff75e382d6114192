"""Whether a node of a job has the data that the run reads."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from muybridge.slurm import health_checks
from muybridge.slurm.health_data import missing_data
from muybridge.slurm.health_findings import NodeReport
from muybridge.slurm.health_place import find_place


def submit(run_dir: Path, name: str = "20260101T000000.000Z-abc123", **settings: Any) -> None:
    """What health reads of a submission."""
    record = run_dir / "slurm" / "submissions" / name
    record.mkdir(parents=True)
    (record / "config.yaml").write_text(yaml.safe_dump(settings))
    (run_dir / "slurm" / "submission").write_text(f"{name}\n")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder that is there."""
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "shard-000.tar").touch()
    return folder


def test_what_is_there_is_not_missed(tmp_path: Path, clips: Path) -> None:
    submit(tmp_path / "run", data={"path": str(clips)}, validation={"path": str(clips), "every_steps": 100})
    assert missing_data(tmp_path / "run") == []


def test_a_node_without_a_mount_says_which_setting_names_what_it_lacks(tmp_path: Path, clips: Path) -> None:
    datasets = {
        "a": {"path": str(clips), "weight": 1.0},
        "b": {"path": str(tmp_path / "b" / "x"), "weight": 0.5},
        "left_out": {"path": str(tmp_path / "c"), "weight": 0.0},
    }
    (tmp_path / "empty").mkdir()
    validation = {"path": str(tmp_path / "empty"), "every_steps": 100}
    submit(tmp_path / "run", data={"path": "", "datasets": datasets, "access": "raw"}, validation=validation)
    assert missing_data(tmp_path / "run") == [
        f"data.datasets.b.path={tmp_path}/b/x: No such file or directory",
        f"validation.path={tmp_path}/empty: {tmp_path}/empty is an empty folder",
    ]


def test_of_a_latent_cache_the_clips_need_not_be_there(tmp_path: Path, clips: Path) -> None:
    data = {"path": "/no", "latents": str(clips), "access": "latents"}
    submit(tmp_path / "run", data=data, validation={"path": "/no", "every_steps": 100})
    assert missing_data(tmp_path / "run") == []
    submit(tmp_path / "next", data={**data, "latents": "/no/latents"})
    assert missing_data(tmp_path / "next") == ["data.latents=/no/latents: No such file or directory"]


def test_of_tars_with_a_pattern_their_folder_is_looked_for_and_urls_are_not(tmp_path: Path, clips: Path) -> None:
    for number, path in enumerate([f"{clips}/shard-{{000..127}}.tar", "https://host/shard-{000..127}.tar"]):
        submit(tmp_path / f"{number}", data={"path": path, "access": "stream"})
        assert missing_data(tmp_path / f"{number}") == []
    submit(tmp_path / "gone", data={"path": "/no/a-*.tar", "access": "stream"})
    assert missing_data(tmp_path / "gone") == ["data.path=/no/a-*.tar: No such file or directory"]


def test_the_newest_submission_counts_and_without_one_nothing_is_missed(tmp_path: Path, clips: Path) -> None:
    assert missing_data(tmp_path) == []
    submit(tmp_path, "20260101T000000.000Z-aaaaaa", data={"path": "/no"})
    assert missing_data(tmp_path) == ["data.path=/no: No such file or directory"]
    submit(tmp_path, "20260102T000000.000Z-bbbbbb", data={"path": str(clips)})
    assert missing_data(tmp_path) == []
    (tmp_path / "slurm" / "submissions" / "20260102T000000.000Z-bbbbbb" / "config.yaml").write_text("{")
    assert missing_data(tmp_path) == []


def test_the_node_tells_rank_0(tmp_path: Path) -> None:
    submit(tmp_path, data={"path": "/no"})
    place = find_place(tmp_path, {})
    place.folder.mkdir(parents=True)
    report = NodeReport("n1", "7", [0])
    health_checks.look_at_node(place, report)
    assert report.data_faults == ["data.path=/no: No such file or directory"]
