"""Saving checkpoints: what a kill or a failing disk at any point leaves, and that all of the state comes back."""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from muybridge.tests.train.checkpoint_parts import (
    AVERAGE,
    Killed,
    fake_one_rank,
    go_on,
    kill,
    make_checkpointer,
    make_parts,
    names,
    save,
    try_to_save,
)
from muybridge.train import checkpoint, checkpoint_folder, shard_file
from muybridge.train.checkpoint import CheckpointConfig, Checkpointer
from muybridge.train.checkpoint_folder import check_checkpoint, choose_checkpoint
from muybridge.train.fragments import load_checkpoint, read_weights, weight_kind


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_one_rank(monkeypatch)


def kill_in_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, *_: Any) -> None:
        path.write_bytes(b"\0" * 100)
        raise Killed

    monkeypatch.setattr(shard_file, "_write_blocks", write_half)


def kill_in_text(module: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def arm(monkeypatch: pytest.MonkeyPatch) -> None:
        write = module.write_text

        def write_or_die(path: Path, text: str) -> Any:
            if path.name.startswith(name):
                path.write_text('{"half')
                raise Killed
            return write(path, text)

        monkeypatch.setattr(module, "write_text", write_or_die)

    return arm


KILL_POINTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before staging": lambda patch: patch.setattr(Path, "mkdir", kill),
    "in a shard": kill_in_shard,
    "in a shard's table": kill_in_text(shard_file, "shard"),
    "in run.json": kill_in_text(shard_file, "run"),
    "in the ledger": kill_in_text(shard_file, "bad_clips"),
    "in the manifest": kill_in_text(checkpoint, "MANIFEST"),
    "before the rename": lambda patch: patch.setattr(Path, "rename", kill),
}


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_kill_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    previous = save(tmp_path, 1)
    with monkeypatch.context() as patch:
        KILL_POINTS[point](patch)
        with pytest.raises(Killed):
            save(tmp_path, 2)
    assert go_on(tmp_path) == previous
    assert names(tmp_path) == [previous.name]
    # The same step can be saved by the next attempt.
    assert choose_checkpoint(tmp_path) != save(tmp_path, 2) == choose_checkpoint(tmp_path)


AFTER_THE_COMMIT: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before LATEST": lambda patch: patch.setattr(checkpoint, "write_latest", kill),
    "in LATEST": kill_in_text(checkpoint_folder, "LATEST"),
    "before an old one is moved": lambda patch: patch.setattr(checkpoint, "move_to_trash", kill),
}


@pytest.mark.parametrize("point", AFTER_THE_COMMIT)
def test_a_kill_after_the_commit_leaves_the_new_checkpoint_and_nothing_half_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        AFTER_THE_COMMIT[point](patch)
        with pytest.raises(Killed):
            save(tmp_path, 3, keep_last=2)
    newest = go_on(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000003"
    # The oldest may still be there, whole.
    assert set(names(tmp_path)) - {"step-00000001"} == {"step-00000002", "step-00000003"}
    assert all(check_checkpoint(tmp_path / name) == "" for name in names(tmp_path))


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_nothing_half_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def delete_one_file(folder: Path) -> None:  # and then the process is gone
        (folder / "run.json").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", delete_one_file)
        newest = save(tmp_path, 3, keep_last=2)
    assert len(names(tmp_path)) == 3
    assert names(tmp_path)[0].startswith(".trash-step-00000001-")
    assert go_on(tmp_path) == newest
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("content", ["", "step-000", "step-00000009\n"])
def test_the_hint_decides_nothing(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert (tmp_path / "LATEST").read_text() == "step-00000002\n"
    (tmp_path / "LATEST").write_text(content)
    assert choose_checkpoint(tmp_path) == newest


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), OSError(5, "Input/output error")], ids=["full", "broken"]
)
@pytest.mark.parametrize("name", ["shard", "run", "bad_clips", "MANIFEST"])
def test_a_failing_disk_fails_the_save_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: OSError
) -> None:
    previous = save(tmp_path, 1)
    module = checkpoint if name == "MANIFEST" else shard_file
    write = module.write_text

    def write_or_fail(path: Path, text: str) -> Any:
        if path.name.startswith(name):
            raise fault
        return write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_text", write_or_fail)
        saved = try_to_save(tmp_path, 2)
    assert f"step-00000002 was not written: rank 0: {fault}" in saved.failure
    assert names(tmp_path) == [previous.name]
    assert (tmp_path / "LATEST").read_text() == "step-00000001\n"


def test_what_fails_after_the_commit_is_reported_and_undoes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("stale handle")

    monkeypatch.setattr(checkpoint, "write_latest", fail)
    with caplog.at_level(logging.WARNING):
        folder = save(tmp_path, 1)
    assert choose_checkpoint(tmp_path) == folder
    assert "stale handle" in caplog.text


def test_an_attempt_that_lost_the_run_commits_nothing(tmp_path: Path) -> None:
    engine, ema = make_parts(1.0)
    config = CheckpointConfig(in_background=False)
    checkpointer = Checkpointer(tmp_path, config, engine, ema, still_ours=lambda: False)
    checkpointer.begin(1, {}, "", {})
    assert "another attempt" in checkpointer.commit().failure
    assert names(tmp_path) == []


def test_too_little_room_fails_the_save_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = try_to_save(tmp_path, 1).nbytes
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.1 * nbytes))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(shard_file, "_write_blocks", kill)
    saved = try_to_save(tmp_path, 2)
    assert f"{tmp_path} has {usage.free / 1e9:.3g} GB free" in saved.failure
    assert names(tmp_path) == ["step-00000001"]


def test_room_that_a_deletion_is_about_to_make_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, was_asked = shutil.disk_usage(tmp_path), threading.Event()

    def delete_once_asked(path: Path) -> None:
        assert was_asked.wait(60)
        checkpoint_folder.delete_leftover(path)

    def full_while_there_is_trash(path: Path) -> Any:
        if not list(tmp_path.glob(".trash-*")):
            return usage
        was_asked.set()
        return usage._replace(free=0)

    monkeypatch.setattr(checkpoint, "delete_leftover", delete_once_asked)
    monkeypatch.setattr(shutil, "disk_usage", full_while_there_is_trash)
    checkpointer = make_checkpointer(tmp_path, keep_last=2)
    for step in range(1, 5):
        checkpointer.begin(step, {}, "", {})
        assert checkpointer.commit().failure == ""
    assert was_asked.is_set()
    checkpointer.close()


def test_a_step_saved_twice_is_the_later_one_and_the_other_is_kept(tmp_path: Path) -> None:
    first = save(tmp_path, 3)
    checkpointer = make_checkpointer(tmp_path, 8.0)
    checkpointer.begin(3, {}, "", {})
    folder = checkpointer.commit().folder
    assert folder == first
    assert read_weights(folder, "master")["w"].unique().tolist() == [8.0]
    (kept,) = (tmp_path / "set_aside").iterdir()
    assert read_weights(kept, "master")["w"].unique().tolist() == [3.0]


def test_a_second_save_finishes_the_first(tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path)
    assert checkpointer.begin(1, {}, "", {}) is None
    before = checkpointer.begin(2, {}, "", {})
    assert before is not None
    assert (before.step, before.failure) == (1, "")
    assert checkpointer.in_flight
    after = checkpointer.finish()
    assert after is not None
    assert after.step == 2
    assert not checkpointer.in_flight
    assert checkpointer.finish() is None
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_a_save_took_is_told(tmp_path: Path) -> None:
    saved = try_to_save(tmp_path, 1)
    assert 0 < saved.blocking_seconds <= saved.total_seconds
    assert saved.nbytes == (saved.folder / "shard-00000-of-00001.safetensors").stat().st_size
    # Before the first step there is no optimizer state yet, which will be there at the first save.
    checkpointer = make_checkpointer(tmp_path)
    assert checkpointer.expected_bytes() == saved.nbytes


def test_everything_saved_comes_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    assert check_checkpoint(folder) == ""
    engine, ema = make_parts(0.0)
    engine.shards[0].optimizer_state.clear()
    for tensor in (engine.shards[0].master, ema.averages[AVERAGE][0]):
        tensor[0] = 9.0
    facts = load_checkpoint(folder, engine=engine, ema=ema)
    (shard,) = engine.shards
    assert facts["seed"] == 1
    # The first element is padding between parameters: it keeps its value, or the zero that the optimizer would give it.
    assert shard.master.tolist() == [9.0] + [4.0] * 15
    assert ema.averages[AVERAGE][0].tolist() == [9.0] + [-4.0] * 15
    assert shard.optimizer_state["exp_avg"].tolist() == [0.0] + [4.0] * 15
    assert shard.optimizer_state["step"] == 7


def test_the_state_of_the_run_is_that_of_the_beginning(tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path)
    state = {"data": [1, 2]}
    checkpointer.begin(1, state, "a clip\n", {})
    state["data"].append(3)
    folder = checkpointer.commit().folder
    assert json.loads((folder / "run.json").read_text())["data"] == [1, 2]
    assert (folder / "bad_clips.jsonl").read_text() == "a clip\n"


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    (shard,) = save(tmp_path, 2).glob("*.safetensors")
    found = {name: tensor.unique().tolist() for name, tensor in load_file(shard).items()}
    assert found == {"master/w": [2.0], f"{AVERAGE}/w": [-2.0], "exp_avg/w": [2.0], "exp_avg_sq/w": [2.0]}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"w": torch.Size((5, 3))}, r"w: \[3, 5\] saved, \[5, 3\] configured"),
        ({"w": torch.Size((3, 5)), "b": torch.Size((5,))}, r"b: None saved, \[5\] configured"),
        ({}, r"w: \[3, 5\] saved, None configured"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_parameter(
    tmp_path: Path, shapes: dict[str, torch.Size], words: str
) -> None:
    folder = save(tmp_path, 1)
    engine, ema = make_parts(0.0)
    engine.parameter_shapes = shapes
    with pytest.raises(ValueError, match=words):
        load_checkpoint(folder, engine=engine, ema=ema)


@pytest.mark.parametrize("version", [1, 99])
def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, version: int) -> None:
    folder = save(tmp_path, 1)
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "format_version": version}))
    with pytest.raises(ValueError, match=f"format_version={version}"):
        read_weights(folder)


def test_weights_go_by_the_names_that_a_checkpoint_has(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert weight_kind(folder, "ema") == AVERAGE
    assert weight_kind(folder, AVERAGE) == AVERAGE
    assert weight_kind(folder, "raw") == weight_kind(folder, "master") == "master"
    with pytest.raises(ValueError, match=r"weights=ema-0.5 must be raw, ema \(ema-0.9999\) or one of ema-0.9999"):
        read_weights(folder, "ema-0.5")


def test_an_average_that_the_run_did_not_keep_cannot_be_resumed(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    engine, ema = make_parts(0.0)
    ema.averages["ema-0.9"] = ema.averages[AVERAGE]
    with pytest.raises(ValueError, match=r"holds the averages ema-0.9999 and not ema-0.9"):
        load_checkpoint(folder, engine=engine, ema=ema)


@pytest.mark.parametrize(
    ("kind", "in_background"), [("master", False), (AVERAGE, False), ("exp_avg_sq", False), ("master", True)]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, kind: str, value: float, in_background: bool
) -> None:
    engine, ema = make_parts(1.0)
    (shard,) = engine.shards
    {"master": shard.master, AVERAGE: ema.averages[AVERAGE][0], **shard.optimizer_state}[kind][3] = value
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(in_background=in_background), engine, ema)
    checkpointer.begin(1, {}, "", {})
    assert f"{kind}/w holds NaN or infinite" in checkpointer.commit().failure
    assert names(tmp_path) == []
    checkpointer.close()


def test_large_weights_are_finite_though_their_sum_is_not(tmp_path: Path) -> None:
    save(tmp_path, 1)
    engine, ema = make_parts(3e38)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(in_background=False), engine, ema)
    checkpointer.begin(2, {}, "", {})
    assert checkpointer.commit().failure == ""


def test_faults_of_settings_name_field_value_and_rule() -> None:
    assert CheckpointConfig().faults("checkpoint") == []
    given = CheckpointConfig(every_steps=-1, every_minutes=0.0, keep_last=1, keep_every=-2, keep_best=-3)
    assert [fault.split()[0] for fault in given.faults("checkpoint")] == [
        *("checkpoint.every_steps=-1", "checkpoint.every_steps=-1", "checkpoint.every_minutes=0.0"),
        *("checkpoint.keep_last=1", "checkpoint.keep_every=-2", "checkpoint.keep_best=-3"),
    ]
    assert CheckpointConfig(every_steps=None, every_minutes=0.5).faults("checkpoint") == []
