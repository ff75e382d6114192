"""Checkpoints under faults: what a kill at any point leaves, what a damaged file does, and what is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muybridge.train import checkpoint
from muybridge.train.checkpoint import (
    CheckpointConfig,
    check_checkpoint,
    committed_checkpoints,
    find_checkpoint,
    load_checkpoint,
    read_weights,
    remove_old_checkpoints,
    save_checkpoint,
)
from muybridge.train.engine import FlatShard, Fragment

AVERAGES = ("ema-0.9", "ema-0.5")


class Killed(BaseException):
    """Stands for kill -9: nothing of the program runs after it."""


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of one, without the threads of a real one."""

    def gather(box: list[Any], value: Any) -> None:
        box[0] = value

    fake = SimpleNamespace(
        get_rank=lambda: 0,
        get_world_size=lambda: 1,
        broadcast_object_list=lambda box, src: None,
        all_gather_object=gather,
    )
    monkeypatch.setattr(checkpoint, "dist", fake)


def make_parts(value: float, *, shape: tuple[int, int] = (3, 5)) -> tuple[Any, Any]:
    """An engine and an average with one parameter `w` full of a value, as far as checkpoints look."""
    numel = shape[0] * shape[1]
    state = {name: torch.full((numel + 1,), value) for name in checkpoint.OPTIMIZER_STATES}
    shard = FlatShard(
        torch.full((numel + 1,), value), [Fragment("w", 0, numel, offset=1)], {**state, "step": torch.tensor(7.0)}
    )
    engine = SimpleNamespace(
        config=SimpleNamespace(zero=1),
        parameter_shapes={"w": torch.Size(shape)},
        shards=[shard],
        optimizer_step_count=lambda: 7.0,
        refresh_weights=lambda: None,
    )
    return engine, SimpleNamespace(averages={name: [torch.full((numel + 1,), -value)] for name in AVERAGES})


def save(folder: Path, step: int) -> Path:
    """A checkpoint whose weights are the step's number."""
    engine, ema = make_parts(float(step))
    return save_checkpoint(folder, step=step, engine=engine, ema=ema, run_state={"seed": 1})


def kill(*_: Any, **__: Any) -> None:
    raise Killed


def kill_in_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(tensors: dict[str, Any], path: Path) -> None:
        path.write_bytes(b"\0" * 100)
        raise Killed

    monkeypatch.setattr(checkpoint, "save_file", save_half)


def kill_before_json(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def arm(monkeypatch: pytest.MonkeyPatch) -> None:
        write = checkpoint._write_json

        def write_or_die(path: Path, content: object) -> None:
            if path.name.startswith(name):
                path.write_text('{"half')
                raise Killed
            write(path, content)

        monkeypatch.setattr(checkpoint, "_write_json", write_or_die)

    return arm


KILL_POINTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before staging": lambda patch: patch.setattr(checkpoint.Path, "mkdir", kill),
    "in a shard": kill_in_shard,
    "in a shard's table": kill_before_json("shard"),
    "in run.json": kill_before_json("run"),
    "in the manifest": kill_before_json("MANIFEST"),
    "before the rename": lambda patch: patch.setattr(checkpoint.Path, "rename", kill),
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
    assert find_checkpoint(tmp_path) == previous
    assert [path.name for path in tmp_path.iterdir()] == [previous.name]
    # The same step can be saved by the next attempt.
    assert find_checkpoint(tmp_path) != save(tmp_path, 2) == find_checkpoint(tmp_path)


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_nothing_half_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = [save(tmp_path, step) for step in (1, 2, 3)]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            remove_old_checkpoints(tmp_path, keep_last=2)
    assert committed_checkpoints(tmp_path) == saved[1:]
    assert find_checkpoint(tmp_path) == saved[2]
    assert sorted(tmp_path.iterdir()) == saved[1:]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    saved = [save(tmp_path, step) for step in (2, 10, 9, 100)]
    remove_old_checkpoints(tmp_path, keep_last=2)
    assert committed_checkpoints(tmp_path) == [saved[1], saved[3]]


def test_a_step_saved_twice_is_the_later_one(tmp_path: Path) -> None:
    save(tmp_path, 3)
    engine, ema = make_parts(8.0)
    folder = save_checkpoint(tmp_path, step=3, engine=engine, ema=ema, run_state={})
    assert read_weights(folder, "master")["w"].unique().tolist() == [8.0]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_bit,
    "a cut end": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "an empty file": lambda path: path.write_bytes(b""),
    "a missing file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ["shard-00000-of-00001.safetensors", "shard-00000-of-00001.json", "run.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, name: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGES[damage](newer / name)
    assert find_checkpoint(tmp_path) == older
    assert str(newer / name) in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"run.json": 3}'])
def test_a_damaged_manifest_is_named_and_the_older_checkpoint_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (newer / "MANIFEST.json").write_text(content)
    assert find_checkpoint(tmp_path) == older
    assert str(newer) in capsys.readouterr().out


def test_no_valid_checkpoint_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step) / "run.json")
    with pytest.raises(ValueError, match=r"no checkpoint under .* is valid.*step-00000002/run.json.*step-00000001/run"):
        find_checkpoint(tmp_path)


def test_an_empty_folder_is_a_fresh_start(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nowhere") is None
    assert find_checkpoint(tmp_path) is None


def test_everything_saved_comes_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    assert check_checkpoint(folder) == ""
    engine, ema = make_parts(0.0)
    engine.shards[0].optimizer_state.clear()
    facts = load_checkpoint(folder, engine=engine, ema=ema)
    (shard,) = engine.shards
    assert facts["seed"] == 1
    # The first element is padding between parameters: it keeps its value, or the zero that the optimizer would give it.
    assert shard.master.tolist() == [0.0] + [4.0] * 15
    for name in AVERAGES:
        assert ema.averages[name][0].tolist() == [0.0] + [-4.0] * 15
    assert shard.optimizer_state["exp_avg"].tolist() == [0.0] + [4.0] * 15
    assert shard.optimizer_state["step"] == 7


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


def test_weights_are_found_by_the_names_that_a_checkpoint_lists(tmp_path: Path) -> None:
    engine, ema = make_parts(2.0)
    ema.averages["ema-0.5"][0] *= 10
    folder = save_checkpoint(tmp_path, step=1, engine=engine, ema=ema, run_state={})
    values = {kind: read_weights(folder, kind)["w"].unique().tolist() for kind in ("master", "ema", *AVERAGES)}
    assert values == {"master": [2.0], "ema": [-2.0], "ema-0.9": [-2.0], "ema-0.5": [-20.0]}
    words = r"has no weights 'ema-0.7'; it has ema \(which is ema-0.9\), master, ema-0.9, ema-0.5"
    with pytest.raises(ValueError, match=words):
        read_weights(folder, "ema-0.7")


def test_an_average_that_the_checkpoint_lacks_is_refused_and_one_too_many_is_left_out(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    engine, ema = make_parts(0.0)
    del ema.averages["ema-0.9"]
    load_checkpoint(folder, engine=engine, ema=ema)
    assert ema.averages["ema-0.5"][0].tolist() == [0.0] + [-4.0] * 15
    ema.averages["ema-0.7"] = ema.averages["ema-0.5"]
    with pytest.raises(ValueError, match=r"holds the averages ema-0.9, ema-0.5 and not ema-0.7: ema.decays must be"):
        load_checkpoint(folder, engine=engine, ema=ema)


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version=99"):
        read_weights(folder)


@pytest.mark.parametrize("kind", ["master", "ema-0.9", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, kind: str, value: float) -> None:
    engine, ema = make_parts(1.0)
    (shard,) = engine.shards
    {"master": shard.master, "ema-0.9": ema.averages["ema-0.9"][0], **shard.optimizer_state}[kind][3] = value
    with pytest.raises(OSError, match=f"{kind}/w holds NaN or infinite"):
        save_checkpoint(tmp_path, step=1, engine=engine, ema=ema, run_state={})
    assert list(tmp_path.iterdir()) == []


def test_keeping_a_single_checkpoint_is_refused() -> None:
    assert CheckpointConfig().faults("checkpoint") == []
    faults = CheckpointConfig(every_steps=-1, keep_last=1).faults("checkpoint")
    assert [fault.split()[0] for fault in faults] == ["checkpoint.every_steps=-1", "checkpoint.keep_last=1"]
