"""What the tests of checkpoints share: an engine and averages of one small parameter, and ways to damage files."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muybridge.train.checkpoint import CheckpointConfig, Checkpointer, Saved
from muybridge.train.checkpoint_folder import choose_checkpoint, delete_leftovers, set_aside_newer
from muybridge.train.flat_shards import ADAMW_STATES, FlatShard, Fragment

AVERAGE = "ema-0.9999"


class Killed(BaseException):
    """Stands for kill -9: nothing of the program runs after it."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


def fake_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of one, without the threads of a real one."""

    def gather(box: list[Any], value: Any) -> None:
        box[0] = value

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, src: None)
    monkeypatch.setattr(dist, "all_gather_object", gather)


def make_parts(value: float, *, shape: tuple[int, int] = (3, 5)) -> tuple[Any, Any]:
    """An engine and an average with one parameter `w` full of a value, as far as checkpoints look."""
    numel = shape[0] * shape[1]
    # One element of padding, which no checkpoint may keep nor look at.
    padding = torch.tensor([float("nan")])

    def flat(content: float) -> torch.Tensor:
        return torch.cat([padding, torch.full((numel,), content)])

    state = {name: flat(value) for name in ADAMW_STATES}
    shard = FlatShard(flat(value), [Fragment("w", 0, numel, offset=1)], {**state, "step": torch.tensor(7.0)})
    engine = SimpleNamespace(
        config=SimpleNamespace(zero=1),
        parameter_shapes={"w": torch.Size(shape)},
        shards=[shard],
        optimizer_step_count=lambda: 7.0,
        refresh_weights=lambda: None,
    )
    return engine, SimpleNamespace(averages={AVERAGE: [flat(-value)]})


def make_checkpointer(folder: Path, value: float = 1.0, **settings: Any) -> Checkpointer:
    """One that writes at once, unless told otherwise, what is full of a value."""
    engine, ema = make_parts(value)
    return Checkpointer(folder, CheckpointConfig(**{"in_background": False, **settings}), engine, ema)


def save(folder: Path, step: int, **settings: Any) -> Path:
    """A checkpoint whose weights are the step's number."""
    saved = try_to_save(folder, step, **settings)
    assert not saved.failure
    return saved.folder


def try_to_save(folder: Path, step: int, **settings: Any) -> Saved:
    """What became of such a save."""
    checkpointer = make_checkpointer(folder, float(step), **{"keep_last": 9, **settings})
    try:
        checkpointer.begin(step, {"seed": 1}, "", {})
        return checkpointer.commit()
    finally:
        checkpointer.close()


def save_at_once(folder: Path, *, step: int, engine: Any, ema: Any, run_state: dict[str, Any] | None = None) -> Path:
    """A checkpoint of any engine, written while everything waits. Raises OSError where that fails. Collective."""
    checkpointer = Checkpointer(folder, CheckpointConfig(in_background=False), engine, ema)
    checkpointer.begin(step, run_state or {}, "", {})
    saved = checkpointer.commit()
    if saved.failure:
        raise OSError(saved.failure)
    return saved.folder


def go_on(folder: Path, resume: str = "auto") -> Path | None:
    """What a run goes on from, the folder left as a start leaves it."""
    chosen = choose_checkpoint(folder, resume)
    delete_leftovers(folder)
    if chosen is not None:
        set_aside_newer(folder, chosen)
    return chosen


def names(folder: Path) -> list[str]:
    """What is in a folder of checkpoints, the hint left out."""
    return sorted(path.name for path in folder.iterdir() if path.name != "LATEST")


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
