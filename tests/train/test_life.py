"""What the trainer and the batch script of a Slurm job say to each other by files."""

from pathlib import Path

import pytest

from muybridge.train import life
from muybridge.train.life import Asked


@pytest.fixture
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUYBRIDGE_LIFE_DIR", "MUYBRIDGE_STOP_LEAD_SECONDS", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)


def test_the_script_reads_three_lines_whatever_the_cause_looks_like(life_folder: Path) -> None:
    life.tell_end(77, Asked.nobody, "diverged:\n  the loss\tis nan\n")
    assert (life_folder / "ended").read_text() == "77\nnobody\ndiverged: the loss is nan\n"
    life.tell_end(0, Asked.nobody, "")
    assert (life_folder / "ended").read_text() == "0\nnobody\n\n"
    assert [path.name for path in life_folder.iterdir()] == ["ended"]


def test_what_a_launcher_does_after_a_failure_does_not_hide_its_cause(life_folder: Path) -> None:
    # One rank fails, and the others are ended by SIGTERM: in whatever order they come to say so.
    life.tell_end(75, Asked.scheduler, "stopped by SIGTERM before the first step")
    assert (life_folder / "ended").read_text().startswith("75\nscheduler\n")
    life.tell_end(64, Asked.nobody, "data.path=x must be a folder")
    life.tell_end(75, Asked.scheduler, "stopped by SIGTERM before the first step")
    assert (life_folder / "ended").read_text() == "64\nnobody\ndata.path=x must be a folder\n"


@pytest.mark.usefixtures("no_job")
def test_outside_of_a_job_there_is_nobody_to_talk_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    life.tell_end(0, Asked.nobody, "")
    life.tell_bad_node("a product is wrong")
    assert life.stop_file() is None
    assert life.lead_seconds() is None
    assert life.life_name() == ""
    assert not list(tmp_path.iterdir())


def test_bad_nodes_have_the_names_that_slurm_knows(life_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, reason in (("n1", "3 of 128 rows\nare wrong"), ("n2", "a product failed")):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        life.tell_bad_node(reason)
    assert (life_folder / "bad_nodes").read_text() == "n1\t3 of 128 rows are wrong\nn2\ta product failed\n"


def test_a_folder_that_went_away_ends_no_run(
    life_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    life_folder.rmdir()
    life.tell_end(0, Asked.nobody, "")
    life.tell_bad_node("a product failed")
    assert [str(life_folder) in record.getMessage() for record in caplog.records] == [True, True]


@pytest.mark.parametrize(
    ("now", "before", "is_later"),
    [
        ("123.1", "123.0", True),
        ("123.10", "123.9", True),
        ("123.1", "123.1", False),
        ("123.0", "123.1", False),
        ("124.0", "123.0", False),  # a job of its own: only Slurm's word for the end of the other one would do
        ("123.1", "", False),
        ("", "", False),
        ("", "123.0", False),
        (".1", ".0", False),
        ("123.1", "123.x", False),
    ],
)
def test_only_a_later_life_of_the_same_job_takes_over_at_once(now: str, before: str, is_later: bool) -> None:
    assert life.is_later_life_of_the_same_job(now, before) is is_later


@pytest.mark.parametrize(("text", "seconds"), [("300", 300.0), ("0", None), ("", None), ("soon", None), ("-5", None)])
def test_the_time_between_warning_and_end(text: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUYBRIDGE_STOP_LEAD_SECONDS", text)
    assert life.lead_seconds() == seconds
