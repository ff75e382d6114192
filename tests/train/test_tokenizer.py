"""The tokenizer of a run: of the captions or the run that it starts from, until a checkpoint belongs to it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from muybridge.data.loader import VideoLoader
from muybridge.models.text import TextEncoderConfig, TextEncoderKind
from muybridge.train import ranks, tokenizer
from muybridge.train.config import TrainConfig
from muybridge.train.tokenizer import prepare_tokenizer

pytest.importorskip("transformers", reason="the extra `text` is not installed")


class Clips(VideoLoader):
    """A loader of nothing but captions."""

    def __init__(self, captions: list[str]) -> None:
        class Index(list[str]):
            def captions(self, row: int) -> Iterator[str]:
                yield self[row]

        self.indexes = [Index(captions)]  # type: ignore[list-item]


class Group:
    """A process group of which this process is one rank."""

    def __init__(self, rank: int = 0, said: str = "") -> None:
        self.rank, self.said = rank, said

    def get_rank(self) -> int:
        return self.rank

    def broadcast_object_list(self, box: list[Any], src: int) -> None:
        if self.rank == src:
            self.said = box[0]
        box[0] = self.said


@pytest.fixture(autouse=True)
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """Rank 0 of one."""
    group = Group()
    for module in (tokenizer, ranks):
        monkeypatch.setattr(module, "dist", group)
    return group


def run(folder: Path, **settings: Any) -> TrainConfig:
    text = TextEncoderConfig(kind=TextEncoderKind.umt5_small, vocabulary=settings.pop("vocabulary", 300))
    return TrainConfig(run_dir=str(folder), text=text, **settings)


def pieces(folder: Path) -> str:
    return (folder / "tokenizer" / "tokenizer.json").read_text()


def test_a_launch_without_a_checkpoint_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    first = run(tmp_path / "run")
    prepare_tokenizer(first, Clips(["a red circle"] * 9))
    of_circles = pieces(tmp_path / "run")
    prepare_tokenizer(first, Clips(["the green square"] * 9))
    of_squares = pieces(tmp_path / "run")
    assert of_squares != of_circles
    prepare_tokenizer(run(tmp_path / "run", vocabulary=262), Clips(["the green square"] * 9))
    assert len(pieces(tmp_path / "run")) < len(of_squares)
    prepare_tokenizer(run(tmp_path / "source"), Clips(["a red circle"] * 9))
    prepare_tokenizer(run(tmp_path / "run", init_from=str(tmp_path / "source")), Clips(["the green square"] * 9))
    assert pieces(tmp_path / "run") == of_circles
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer"]


def test_a_checkpoint_keeps_its_tokenizer(tmp_path: Path) -> None:
    prepare_tokenizer(run(tmp_path), Clips(["a red circle"] * 9))
    before = pieces(tmp_path)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    prepare_tokenizer(run(tmp_path), Clips(["the green square"] * 9))
    assert pieces(tmp_path) == before
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer is missing, and the weights in .*step-00000004 belong to it"):
        prepare_tokenizer(run(tmp_path), Clips(["a red circle"]))


def test_a_failure_of_rank_0_is_one_of_all_ranks(tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "write_tokenizer", fail)
        with pytest.raises(ValueError, match=r"tokenizer could not be prepared: OSError: no space left"):
            prepare_tokenizer(run(tmp_path), Clips(["a red circle"]))
    assert not (tmp_path / "tokenizer").exists()
    group.rank = 1  # and what rank 0 said to it
    with pytest.raises(ValueError, match=r"tokenizer could not be prepared: OSError: no space left"):
        prepare_tokenizer(run(tmp_path), Clips(["a red circle"]))
    group.rank = 0
    prepare_tokenizer(run(tmp_path), Clips(["a red circle"]))
    group.rank = 1
    prepare_tokenizer(run(tmp_path), Clips(["a red circle"]))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
