"""The diary of a run, and when a run is not tried again."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from muybridge.train import attempts
from muybridge.train.attempts import (
    KILLED,
    Attempts,
    code_fingerprint,
    fruitless_attempts,
    no_progress_message,
    read_attempts,
    resume_in_force,
)


def start(run_dir: Path, *, step: int = 400, code: str = "c0de") -> Attempts:
    diary = Attempts(run_dir)
    diary.start(world_size=2, code=code)
    diary.begin(step, run_dir / f"checkpoints/step-{step:08d}")
    return diary


def fail(run_dir: Path, *, step: int = 400, code: str = "c0de", **end: Any) -> None:
    start(run_dir, step=step, code=code).end(**{"step": 430, "exit_code": 1, "cause": "it broke", **end})


def commit(diary: Attempts, step: int) -> None:
    diary.commit(step, blocking_seconds=0.25, total_seconds=1.5, nbytes=1000)


def test_the_diary_says_what_happened_and_when(tmp_path: Path) -> None:
    before = time.time() - 0.001
    fresh = Attempts(tmp_path / "run")
    fresh.start(world_size=8, code="c0de")
    fresh.begin(0, None)
    commit(fresh, 400)
    fresh.save_failed(420, blocking_seconds=0.25, cause="No space left on device")
    fresh.roll_back(from_step=450, to_step=400, cause="the loss is 7 times what it was")
    second = start(tmp_path / "run")
    second.end(step=600, exit_code=75, cause="a signal", on_request=True)

    first_read, second_read = read_attempts(tmp_path / "run")
    assert (first_read.number, second_read.number) == (1, 2)
    assert (first_read.start["world_size"], first_read.start["code"]) == (8, "c0de")
    assert first_read.begin is not None
    assert (first_read.start_step, first_read.begin["from"]) == (0, None)
    assert first_read.commits[0]["step"] == 400
    assert first_read.failed_saves[0]["cause"] == "No space left on device"
    assert first_read.roll_backs[0]["cause"] == "the loss is 7 times what it was"
    assert first_read.cause == KILLED
    assert second_read.begin is not None
    assert (second_read.begin["from"], second_read.start_step, second_read.cause) == ("step-00000400", 400, "a signal")
    times = [json.loads(line)["unix_seconds"] for line in (tmp_path / "run" / "attempts.jsonl").open()]
    assert before <= times[0] <= times[-1] <= time.time()
    assert times == sorted(times)


def test_a_diary_that_a_kill_cut_short_goes_on(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    commit(start(tmp_path), 600)
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"event": "end", "attempt": 1, "st')
    assert read_attempts(tmp_path)[0].end is None
    start(tmp_path, step=600)
    assert [attempt.number for attempt in read_attempts(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("resume", "after_begin"), [("200", "200"), ("never", "auto"), ("must", "must"), ("auto", "auto")]
)
def test_a_request_to_go_back_or_to_start_anew_is_done_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: str, after_begin: str
) -> None:
    assert resume_in_force(tmp_path, resume) == resume
    diary = Attempts(tmp_path)
    diary.start(world_size=2, code="c0de")
    assert resume_in_force(tmp_path, resume) == resume
    diary.begin(200, None, resume=resume)
    # Killed before its first save, the run is where it was, and newer checkpoints may still be there.
    assert resume_in_force(tmp_path, resume) == after_begin
    commit(diary, 400)
    assert resume_in_force(tmp_path, resume) == ("must" if resume == "must" else "auto")
    is_said = f"resume={resume} was done by attempt 1" in capsys.readouterr().out
    assert is_said == (resume in ("200", "never"))
    assert resume_in_force(tmp_path, "400") == "400"


def test_attempts_that_get_nowhere_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fruitless_attempts(tmp_path, "c0de") == []
    fail(tmp_path, step=200)
    for _ in range(2):
        fail(tmp_path)
    start(tmp_path)  # killed
    fail(tmp_path, exit_code=75, cause="a rank hung")
    assert [attempt.number for attempt in fruitless_attempts(tmp_path, "c0de")] == [2, 3, 4, 5]
    assert fruitless_attempts(tmp_path, "other") == []
    message = no_progress_message(tmp_path, "c0de", 4)
    assert "4 attempts in a row left no new checkpoint" in message
    for words in ("attempt 2: it broke", f"attempt 4: {KILLED}", "attempt 5: a rank hung", "restart_limit=0"):
        assert words in message
    assert no_progress_message(tmp_path, "c0de", 5) == ""
    assert no_progress_message(tmp_path, "c0de", 0) == ""
    # Who submits a run again, to Slurm, has mended what is not to be seen here.
    monkeypatch.setenv("MUYBRIDGE_LIFE_DIR", str(tmp_path / "123.0"))
    assert no_progress_message(tmp_path, "c0de", 4) == ""


@pytest.mark.parametrize(
    "end",
    [
        {"exit_code": 0},
        {"exit_code": 64},
        {"exit_code": 75, "on_request": True},
        {"exit_code": 75, "failed_probe": True},
    ],
)
def test_a_run_that_was_stopped_set_wrong_or_on_a_broken_machine_may_begin_again(
    end: dict[str, Any], tmp_path: Path
) -> None:
    for _ in range(3):
        fail(tmp_path)
    fail(tmp_path, **end)
    assert fruitless_attempts(tmp_path, "c0de") == []
    fail(tmp_path)
    assert len(fruitless_attempts(tmp_path, "c0de")) == 1


def test_attempts_that_fail_in_their_set_up_count_with_the_others(tmp_path: Path) -> None:
    fail(tmp_path, step=400)
    for _ in range(2):
        diary = Attempts(tmp_path)
        diary.start(world_size=2, code="c0de")
        diary.end(step=0, exit_code=75, cause="the store does not answer")
    assert len(fruitless_attempts(tmp_path, "c0de")) == 3
    fail(tmp_path, step=500)
    assert [attempt.number for attempt in fruitless_attempts(tmp_path, "c0de")] == [2, 3, 4]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"exit_code": 0}, "all steps are done"),
        ({"exit_code": 75, "on_request": True}, "stopped on request"),
        ({"exit_code": 1}, "exit code 1"),
    ],
)
def test_an_end_without_a_cause_is_told_by_its_code(end: dict[str, Any], words: str, tmp_path: Path) -> None:
    fail(tmp_path, **{"cause": "", **end})
    assert read_attempts(tmp_path)[0].cause == words


def test_a_new_checkpoint_is_progress(tmp_path: Path) -> None:
    for _ in range(3):
        fail(tmp_path)
    diary = start(tmp_path)
    commit(diary, 500)
    diary.end(step=520, exit_code=1, cause="it broke")
    assert fruitless_attempts(tmp_path, "c0de") == []
    fail(tmp_path, step=500)
    assert [attempt.number for attempt in fruitless_attempts(tmp_path, "c0de")] == [5]


@pytest.mark.parametrize("exit_code", [1, 75, 76, 77, 78])
def test_other_ends_count(exit_code: int, tmp_path: Path) -> None:
    fail(tmp_path, exit_code=exit_code)
    assert len(fruitless_attempts(tmp_path, "c0de")) == 1


def test_code_that_changed_gets_new_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.py"
    source.write_text("step = 1")
    assert attempts._sources()
    assert all(path.is_file() for path in attempts._sources())
    monkeypatch.setattr(attempts, "_sources", lambda: [source])
    manifest, missing = tmp_path / "manifest.json", tmp_path / "missing.json"
    manifest.write_text("{}")

    def found(lr: float = 1e-3, world_size: int = 2) -> str:
        return code_fingerprint({"lr": lr}, world_size=world_size, manifests=[missing, manifest])

    fingerprints = [found(), found(lr=2e-3), found(world_size=1)]
    source.write_text("step = 2")
    fingerprints.append(found())
    manifest.write_text('{"clips": 9}')
    fingerprints.append(found())
    assert len(set(fingerprints)) == 5
    assert found() == fingerprints[-1]
