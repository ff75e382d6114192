"""What `muybridge report` says of runs whose every second is known."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from muybridge.scripts import cli
from muybridge.scripts.report_times import Spent, duration, read_run_times
from muybridge.tests.scripts.run_story import RunStory
from muybridge.train.attempts import Attempts


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStory]:
    story = RunStory(tmp_path / "run", monkeypatch)
    yield story
    story.leave()


def seconds_of(story: RunStory) -> dict[str, Any]:
    """Seconds of all that took any."""
    found = read_run_times(story.run_dir).seconds
    return {spent.name: pytest.approx(seconds, abs=1e-6) for spent, seconds in found.items() if seconds > 1e-6}


def test_every_second_of_a_run_is_accounted_for(story: RunStory) -> None:
    story.start(set_up=50)
    story.train(100)
    story.save(blocking=2)
    story.validate(20)
    story.train(200)
    story.save(blocking=3)
    story.pass_time(7)  # such as an export
    story.end(0, "done")
    times = read_run_times(story.run_dir)
    assert times.wall_seconds == pytest.approx(50 + 200 + 2 + 20 + 3 + 7)
    expected = {"set_up": 50, "training": 160, "data": 40, "saving": 5, "validation": 20, "other": 7}
    assert seconds_of(story) == expected
    assert times.effective_share == pytest.approx(160 / 282)
    assert times.lost_steps == 0


def test_steps_after_the_last_checkpoint_of_a_killed_attempt_are_lost(story: RunStory) -> None:
    story.start(set_up=50)
    story.train(100)
    story.save(blocking=2)
    story.train(137)  # the last row is that of step 130
    story.pass_time(600)
    story.start(100, set_up=30)
    story.train(150)
    story.end(0, "done")
    times = read_run_times(story.run_dir)
    assert times.lost_steps == 30
    assert seconds_of(story) == {
        "set_up": 80,
        "training": 120,
        "data": 30,
        "saving": 2,
        "lost": 30,
        "down": 607,
    }
    assert [span.spent for span in times.spans if span.spent in (Spent.lost, Spent.down)] == [Spent.lost, Spent.down]
    assert [row["step"] for row in times.dropped] == [110, 120, 130]


def test_a_roll_back_and_what_it_undid(story: RunStory) -> None:
    story.start(set_up=50)
    story.train(100)
    story.save(blocking=2)
    story.train(150)
    story.validate(20)  # undone with the rest
    story.roll_back(100, "the loss is 7 times what it was")
    story.pass_time(1)
    story.train(200)
    story.end(0, "done")
    assert seconds_of(story) == {"set_up": 50, "training": 160, "data": 40, "saving": 2, "lost": 70, "other": 1}
    # Of the 200 steps that are part of the run.
    assert read_run_times(story.run_dir).training_parts == pytest.approx({"model": 120, "optimizer": 20})
    assert read_run_times(story.run_dir).lost_steps == 50


def test_going_back_to_an_older_checkpoint_undoes_more_than_one_attempt(story: RunStory) -> None:
    story.start(set_up=50)
    story.train(100)
    story.save(blocking=2)
    story.train(200)
    story.save(blocking=2)
    story.end(75, "a signal", on_request=True)
    story.start(200, set_up=30)
    story.train(250)
    story.pass_time(5)
    story.start(100, set_up=30)  # that of step 200 was damaged
    story.train(110)
    story.end(0, "done")
    times = read_run_times(story.run_dir)
    assert seconds_of(story) == {"set_up": 110, "training": 88, "data": 22, "saving": 2, "lost": 152, "down": 5}
    assert times.lost_steps == 150


def test_attempts_without_a_step_are_set_up(story: RunStory) -> None:
    story.start(set_up=50)
    story.end(1, "CUDA error [rank 3]")
    story.pass_time(10)
    story.start(set_up=50)
    story.train(100)
    assert seconds_of(story) == {"set_up": 100, "training": 80, "data": 20, "down": 10}


def test_an_attempt_that_ended_before_it_knew_where_to_go_on_undoes_nothing_itself(story: RunStory) -> None:
    story.start(set_up=50)
    story.train(100)
    story.save(blocking=2)
    story.train(150)
    story.pass_time(8)
    early = Attempts(story.run_dir)
    early.start(world_size=8, code="c0de")
    story.pass_time(5)
    early.end(step=0, exit_code=75, cause="the store does not answer")
    assert seconds_of(story) == {"set_up": 55, "training": 80, "data": 20, "saving": 2, "lost": 50, "down": 8}
    story.start(100, set_up=30)
    story.train(110)
    assert seconds_of(story) == {"set_up": 85, "training": 88, "data": 22, "saving": 2, "lost": 50, "down": 8}
    assert read_run_times(story.run_dir).lost_steps == 50


def test_a_checkpoint_written_in_the_background_keeps_what_was_done_before_it_began(story: RunStory) -> None:
    story.start(set_up=50)
    story.train(130)
    story.diary.commit(100, blocking_seconds=4, total_seconds=30, nbytes=1)
    story.train(150)
    story.start(100, set_up=50)
    # Of the second attempt, nothing but its beginning is known.
    assert seconds_of(story) == {"set_up": 50, "training": 80, "data": 20, "saving": 4, "lost": 46}
    (save,) = [span for span in read_run_times(story.run_dir).spans if span.spent is Spent.saving]
    assert (save.begin, save.end) == (1150, 1154)


def test_the_command_prints_and_writes_what_a_run_that_goes_on_is_like(
    story: RunStory, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    story.start(set_up=50)
    story.train(600)
    story.save()
    story.train(650, loss_factor=float("nan"))
    story.roll_back(600, "the loss is [nan] now")
    story.train(700)
    story.pass_time(90)
    story.start(600)
    story.end(1, "CUDA error [rank 3]")
    story.start(600)
    story.train(900)
    with open(story.run_dir / "attempts.jsonl", "a") as file:
        file.write('{"event": "com')  # that is being written
    ledger = story.run_dir / "checkpoints" / "step-00000600" / "bad_clips.jsonl"
    ledger.parent.mkdir(parents=True)
    clip = {
        "dataset": "d",
        "row": 1,
        "key": "k",
        "reason": "r",
        "step": 3,
        "position": 0,
        "substitute": 2,
        "passes": [0],
    }
    ledger.write_text(json.dumps(clip) + "\n")
    capsys.readouterr()

    assert cli.main(["report", f"run={story.run_dir}", f"out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    for words in (
        "Attempt 1: it ended without a word (killed, or its machine went down)",
        "Attempt 1 went back from step 650 to 600: the loss is [nan] now",
        "Attempt 2: CUDA error [rank 3]",
        "Attempt 3: it goes on, or was killed",
        "  forward and backward",
        f"Wrote {tmp_path / 'out' / 'report.json'} and report.png beside it.",
    ):
        assert words in said
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    counts = {
        name: facts[name] for name in ("step", "restarts", "roll_backs", "lost_steps", "bad_clips", "checkpoints")
    }
    assert counts == {"step": 900, "restarts": 2, "roll_backs": 1, "lost_steps": 150, "bad_clips": 1, "checkpoints": 1}
    assert facts["skipped_steps"] == 1
    assert facts["training_seconds"] == pytest.approx({"model": 0.6 * 900, "optimizer": 0.1 * 900})
    assert not facts["has_ended"]
    assert facts["attempts"][1]["cause"] == "CUDA error [rank 3]"
    assert sum(facts["seconds"].values()) == pytest.approx(facts["wall_seconds"], rel=1e-3)
    picture = Image.open(tmp_path / "out" / "report.png")
    assert picture.size == (1400, 1120)


def test_a_clock_that_went_back_between_attempts_makes_no_time_negative(story: RunStory) -> None:
    story.start(set_up=50)
    story.train(100)
    story.save(blocking=2)
    story.pass_time(-120)
    story.start(100, set_up=30)
    story.train(150)
    story.save(blocking=2)
    story.end(0, "done")
    assert seconds_of(story) == {"set_up": 80, "training": 120, "data": 30, "saving": 4}
    assert read_run_times(story.run_dir).wall_seconds == pytest.approx(234)


def test_a_loss_that_is_no_number_is_null(story: RunStory) -> None:
    story.start()
    story.train(10, loss_factor=float("nan"))
    assert cli.main(["report", f"run={story.run_dir}"]) == 0
    assert '"last_loss": null' in (story.run_dir / "report" / "report.json").read_text()


def test_a_folder_that_cannot_be_written_is_named(story: RunStory, capsys: pytest.CaptureFixture[str]) -> None:
    story.start()
    (story.run_dir / "report").touch()
    assert cli.main(["report", f"run={story.run_dir}"]) == 64
    assert f"out={story.run_dir / 'report'} cannot be written" in capsys.readouterr().err


def test_a_run_that_has_only_begun_has_a_report(story: RunStory, capsys: pytest.CaptureFixture[str]) -> None:
    story.start()
    assert cli.main(["report", f"run={story.run_dir}"]) == 0
    assert "Attempt 1: it goes on, or was killed" in capsys.readouterr().out
    assert (story.run_dir / "report" / "report.png").stat().st_size > 1000


def test_a_long_history_shows_its_last_attempts(story: RunStory, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(25):
        story.start()
        story.end(1, "it broke")
    assert cli.main(["report", f"run={story.run_dir}"]) == 0
    said = capsys.readouterr().out
    assert "Attempt 6: it broke" in said
    assert "Attempt 5:" not in said
    assert "The first 5 attempts are in report.json." in said


def test_a_mistake_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", f"run={tmp_path}"]) == 64
    assert f"run={tmp_path} must be the directory of a training run" in capsys.readouterr().err
    assert cli.main(["report", "out=x"]) == 64
    assert "run=RUN_DIR must be given" in capsys.readouterr().err
    assert cli.main(["report", "runs=x"]) == 64
    assert "did you mean run?" in capsys.readouterr().err


def test_the_help_says_what_effective_time_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--help"]) == 0
    assert "Effective time is the share of the wall time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.25 s"), (59, "59 s"), (61, "1 min 1 s"), (3 * 3600 + 120, "3 h 2 min"), (90000, "1 d 1 h")],
)
def test_durations_are_short(seconds: float, words: str) -> None:
    assert duration(seconds) == words
