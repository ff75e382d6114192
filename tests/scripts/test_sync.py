"""`muybridge sync`, with W&B's real client and a server on this machine that answers as W&B's does."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from muybridge.scripts import sync
from muybridge.scripts.sync import main, offline_attempts
from muybridge.tests.scripts.wandb_server import WandbServer, serve_wandb
from muybridge.tests.wandb_files import wait_until_written
from muybridge.train.tracking import Tracker, TrackingConfig, WandbMode

ROW = {"loss": 0.5, "grad_norm": 1.0, "lr": 1e-4, "seconds_per_step": 0.1, "samples_per_second": 80.0}
KEY = "0123456789" * 4


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setenv("HOME", str(tmp_path))  # whose .netrc may hold a key
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")  # as on the nodes
    monkeypatch.chdir(tmp_path)
    for name in sync._RETRIES:
        monkeypatch.setenv(name, "1")
    with serve_wandb() as started:
        monkeypatch.setenv("WANDB_BASE_URL", started.url)
        yield started


def train_offline(run_dir: Path, steps: range, *, attempt: int) -> None:
    run_dir.mkdir(exist_ok=True)
    time.sleep(max(0.0, 1.1 - time.time() % 1))  # W&B's folders are named by the second
    tracker = Tracker(
        run_dir,
        TrackingConfig(wandb=WandbMode.offline),
        run_config={},
        total_steps=100,
        start_step=steps.start - steps.step,
        attempt=attempt,
    )
    for step in steps:
        tracker.log(step, ROW)
    tracker.close()
    wait_until_written(offline_attempts(run_dir)[-1].file)


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with one attempt of one row."""
    run_dir = tmp_path_factory.mktemp("offline") / "run"
    train_offline(run_dir, range(10, 20, 10), attempt=1)
    return run_dir


def rows_of(server: WandbServer, run_dir: Path) -> list[tuple[Any, ...]]:
    history = server.history((run_dir / "wandb_run_id.txt").read_text())
    assert [row["_step"] for row in history] == sorted({row["_step"] for row in history})
    return [(row["step"], row["attempt"]) for row in history]


def test_all_attempts_become_one_run_and_none_goes_twice(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    train_offline(run_dir, range(10, 40, 10), attempt=1)
    train_offline(run_dir, range(30, 60, 10), attempt=2)
    assert main([str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "W&B has taken 2 of 2 attempts." in printed
    address = (run_dir / "wandb_url.txt").read_text()
    assert address.startswith(f"{server.url}/someone/muybridge/runs/")
    assert f"Next: look at {address}" in printed
    first = [(10, 1), (20, 1), (30, 1), (30, 2), (40, 2), (50, 2)]
    assert rows_of(server, run_dir) == first

    assert main([str(run_dir)]) == 0
    assert "nothing to do, W&B has 2 of 2 attempts" in capsys.readouterr().out
    train_offline(run_dir, range(60, 80, 10), attempt=3)
    assert main([str(run_dir)]) == 0
    assert "W&B has taken 1 of 3 attempts, and had 2." in capsys.readouterr().out
    assert rows_of(server, run_dir) == [*first, (60, 3), (70, 3)]


def test_what_goes_on_is_left_for_later(
    server: WandbServer, offline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(offline_run, tmp_path / "run")
    (run_dir / "lock.json").write_text("{}")  # somebody is at work
    assert main([str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "is left for later: its attempt goes on." in printed
    assert "W&B has 0 of 1 attempts" in printed
    assert server.files == {}
    os.utime(run_dir / "lock.json", (0, 0))  # it was killed long ago
    assert main([str(run_dir)]) == 0
    assert rows_of(server, run_dir) == [(10, 1)]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no key", "No API key configured"),
        ("a wrong key", "returned error 401"),
        ("no network", "call this again on a machine that reaches W&B"),
    ],
)
def test_what_w_and_b_does_not_take_is_said_and_taken_later(
    fault: str,
    says: str,
    server: WandbServer,
    offline_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = shutil.copytree(offline_run, tmp_path / "run")
    with monkeypatch.context() as broken:
        server.refuses = fault == "a wrong key"
        if fault == "no key":
            broken.delenv("WANDB_API_KEY")
        if fault == "no network":
            broken.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        assert main([str(run_dir)]) == 75
    answer = capsys.readouterr()
    assert "W&B did not take 1 of 1 attempts" in answer.err
    assert says in answer.err
    if "network" not in fault:
        assert "wandb login" in answer.err
    if fault == "a wrong key":
        server.refuses = False
        assert main([str(run_dir)]) == 0
        assert rows_of(server, run_dir) == [(10, 1)]


def test_what_w_and_b_says_is_shown_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "ERROR key {KEY} \\033[2Jis not known"\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    folder = tmp_path / "run" / "wandb" / "offline-run-20261101_000000-abcd1234"
    folder.mkdir(parents=True)
    (folder / "run-abcd1234.wandb").write_bytes(b"rows")
    assert main([str(tmp_path / "run")]) == 75
    shown = "".join(capsys.readouterr())
    assert "[WANDB_API_KEY]" in shown
    assert KEY not in shown
    assert "\x1b[2J" not in shown


def test_folders_without_anything_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"RUN={tmp_path} must be the directory of a training run"):
        main([str(tmp_path)])
    with pytest.raises(ValueError, match="unknown option --force"):
        main([str(tmp_path), "--force"])
    (tmp_path / "attempts.jsonl").touch()
    assert main([str(tmp_path)]) == 0
    assert "it was not tracked by W&B" in capsys.readouterr().out
    (tmp_path / "wandb" / "run-20261101_000000-abcd1234").mkdir(parents=True)
    empty = tmp_path / "wandb" / "offline-run-20261101_000000-abcd1234"
    empty.mkdir()
    (empty / "run-abcd1234.wandb").touch()
    assert offline_attempts(tmp_path) == []
    assert main([str(tmp_path)]) == 0
    assert "W&B was online" in capsys.readouterr().out
    assert main([]) == 0
    assert "usage: muybridge sync RUN" in capsys.readouterr().out
