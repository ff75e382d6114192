import json
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muybridge.tests.wandb_files import wait_until_written, wandb_records, wandb_rows
from muybridge.train.json_lines import JsonLines
from muybridge.train.tracking import Tracker, TrackingConfig, WandbMode

ROW = {"loss": 0.5, "grad_norm": 1.0, "lr": 1e-3, "seconds_per_step": 0.1, "samples_per_second": 80.0}


def make_tracker(run_dir: Path, *, start_step: int = 0, attempt: int = 1, wandb: WandbMode = WandbMode.off) -> Tracker:
    """A tracker of a run of 100 steps."""
    run_dir.mkdir(exist_ok=True)
    return Tracker(
        run_dir, TrackingConfig(wandb=wandb), run_config={}, total_steps=100, start_step=start_step, attempt=attempt
    )


def read_rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def steps_and_attempts(run_dir: Path, name: str = "metrics.jsonl") -> list[tuple[int, int]]:
    return [(row["step"], row["attempt"]) for row in read_rows(run_dir, name)]


def test_rows_after_the_checkpoint_and_a_cut_row_are_forgotten_on_resume(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    for step in (10, 20, 30):
        tracker.log(step, ROW)
    tracker.log(20, {"validation_loss": 0.25})
    tracker.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "lo')  # as a kill leaves it
    tracker = make_tracker(tmp_path, start_step=20)
    tracker.log(30, {**ROW, "loss": 0.75})
    tracker.close()
    rows = read_rows(tmp_path)
    assert [(row["step"], row.get("loss")) for row in rows] == [(10, 0.5), (20, 0.5), (20, None), (30, 0.75)]


def test_every_row_is_json(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    tracker.log(10, {**ROW, "grad_norm": float("inf"), "validation_loss": float("nan")})
    tracker.close()
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    (row,) = read_rows(tmp_path)
    assert row["loss"] == 0.5
    assert not {"grad_norm", "validation_loss"} & row.keys()


def test_rows_say_whose_they_are_and_dropped_ones_are_kept_apart(tmp_path: Path) -> None:
    before = time.time() - 0.001
    tracker = make_tracker(tmp_path)
    for step in (10, 20, 30):
        tracker.log(step, ROW)
    tracker.close()
    tracker = make_tracker(tmp_path, start_step=20, attempt=2)
    tracker.log(30, ROW)
    tracker.log(40, ROW)
    tracker.drop_rows_after(20)
    tracker.log(30, ROW)
    tracker.close()
    assert steps_and_attempts(tmp_path) == [(10, 1), (20, 1), (30, 2)]
    assert steps_and_attempts(tmp_path, "metrics_dropped.jsonl") == [(30, 1), (30, 2), (40, 2)]
    times = [row["unix_seconds"] for row in read_rows(tmp_path)]
    assert before <= times[0] <= times[-1] <= time.time() + 0.001  # rows have milliseconds


def test_a_full_disk_costs_no_row_and_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = make_tracker(tmp_path)
    tracker.log(10, ROW)
    write, room = JsonLines._write, [30]  # bytes of the next row

    def write_to_a_full_disk(rows: JsonLines) -> None:
        if room:
            part, rows._waiting = rows._waiting[: room[0]], rows._waiting[room.pop() :]
            rows._file.write(part)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JsonLines, "_write", write_to_a_full_disk)
    for step in (20, 30):
        tracker.log(step, ROW)
    assert capsys.readouterr().err.count("No space left on device; training goes on") == 1
    monkeypatch.setattr(JsonLines, "_write", write)
    tracker.log(40, ROW)
    tracker.close()
    assert [step for step, _ in steps_and_attempts(tmp_path)] == [10, 20, 30, 40]


def test_a_fresh_run_in_a_used_folder_has_its_own_rows_only(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    tracker.log(10, ROW)
    tracker.close()
    make_tracker(tmp_path).close()
    assert read_rows(tmp_path) == []


def test_a_log_file_gets_a_line_with_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = make_tracker(tmp_path / "shapes")
    tracker.log(10, ROW)
    tracker.log(11, ROW)  # too soon after the first
    tracker.log(100, {**ROW, "mfu": 0.4163})
    tracker.close()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("shapes  step 10/100  loss 0.5000  grad norm 1  lr 0.001  0.1 s/step  80 samples/s  eta ")
    assert last.startswith("shapes  step 100/100")
    assert "80 samples/s  MFU 41.6%  eta" in last


def test_what_the_parts_log_is_shown_while_the_run_lasts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("muybridge.kernels.dispatch")
    tracker = make_tracker(tmp_path)
    logger.info("attention: %s", "own")
    tracker.close()
    logger.info("after the run")
    assert capsys.readouterr().err.splitlines() == ["attention: own"]


class FakeRun:
    """A W&B run whose `log` fails after a while."""

    offline = True

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, row: dict[str, Any], *, step: int | None) -> None:
        if self.rows:
            raise ConnectionError("the service went away")
        self.rows.append(row)


def test_an_error_of_wandb_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FakeRun()
    errors = SimpleNamespace(Error=RuntimeError)
    fake = SimpleNamespace(init=lambda **_: run, Settings=dict, errors=errors, Video=lambda *_, **__: "video")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = make_tracker(tmp_path, wandb=WandbMode.offline)
    for step in (1, 2, 3):
        tracker.log(step, ROW)
    tracker.log_videos(3, [(tmp_path / "a.mp4", "a circle")])
    tracker.close()
    assert [row["step"] for row in run.rows] == [1]
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().err.count("the service went away") == 1


def test_wandb_that_does_not_start_leaves_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("no key")

    fake = SimpleNamespace(init=init, Settings=dict, errors=SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = make_tracker(tmp_path, wandb=WandbMode.online)
    tracker.log(1, ROW)
    tracker.close()
    assert "W&B is off for this run (no key)" in capsys.readouterr().err
    assert len(read_rows(tmp_path)) == 1


def run_id_of(run_dir: Path) -> str:
    tracker = make_tracker(run_dir)
    tracker.close()
    return tracker.run_id


def test_the_run_id_stays(tmp_path: Path) -> None:
    first = run_id_of(tmp_path)
    assert len(first) == 8
    assert run_id_of(tmp_path) == first
    assert run_id_of(tmp_path / "other") != first


def test_a_run_id_of_which_nothing_was_written_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "wandb_run_id.txt").touch()  # a kill, or a full disk
    first = run_id_of(tmp_path)
    assert len(first) == 8
    assert run_id_of(tmp_path) == first


def test_wandb_goes_on_in_the_same_run_after_a_resume_and_a_roll_back(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path, wandb=WandbMode.offline)
    for step in (10, 20, 30):
        tracker.log(step, ROW)
    tracker.close()
    tracker = make_tracker(tmp_path, start_step=20, attempt=2, wandb=WandbMode.offline)
    for step in (30, 40):
        tracker.log(step, ROW)
    tracker.drop_rows_after(30)
    tracker.log(40, {**ROW, "loss": 0.25})
    tracker.close()

    found, natives = [], []
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")):
        wait_until_written(file)
        kinds: dict[str, list[Any]] = {}
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            kinds.setdefault(kind, []).append(getattr(record, kind))
        assert {run.run_id for run in kinds["run"]} == {tracker.run_id}
        # Curves are drawn over our own step, which may go back, as W&B's may not.
        assert {metric.step_metric for metric in kinds["metric"] if metric.glob_name == "*"} == {"step"}
        natives += [row.step.num for row in kinds["history"]]
        found.append([(row["step"], row["attempt"], row["loss"]) for row in wandb_rows(file)])
    assert found == [[(10, 1, 0.5), (20, 1, 0.5), (30, 1, 0.5)], [(30, 2, 0.5), (40, 2, 0.5), (40, 2, 0.25)]]
    assert natives == sorted(set(natives))  # over both: they are put together later


def test_a_note_moves_no_cursor_and_has_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    note = "clip [/bold] is bad: \x1b[2J\x07canary-0123456789\nand more"
    tracker = make_tracker(tmp_path / "run [red]")
    tracker.note(note)
    tracker.close()
    assert capsys.readouterr().err.splitlines() == ["clip [/bold] is bad: ?[2J?[HF_TOKEN]", "and more"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # a terminal so narrow that it would cut a secret in two
    monkeypatch.setenv("COLUMNS", "30")
    tracker = make_tracker(tmp_path / "run [red]")
    tracker.log(10, ROW)
    tracker.note(note)
    tracker.close()
    shown = "".join(capsys.readouterr())
    assert "[/bold]" in shown
    assert "[HF_TOKEN]" in shown.replace("\n", "")
    assert "canary" not in shown
    assert "\x1b[2J" not in shown


def test_captions_in_wandb_are_short_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    fake = SimpleNamespace(
        init=lambda **_: FakeRun(), Settings=dict, Video=lambda *_, caption, **__: captions.append(caption)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = make_tracker(tmp_path, wandb=WandbMode.offline)
    tracker.log_videos(3, [(tmp_path / "a.mp4", "a\x1b[31m circle\n" + "x" * 9999)])
    tracker.close()
    assert captions == [("a [31m circle " + "x" * 9999)[:500]]


def test_rows_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", 'canary-"0123456789\\')
    JsonLines(tmp_path / "a.jsonl").append({"cause": 'with canary-"0123456789\\'})
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"cause": "with [HF_TOKEN]"}
