"""A run keeps the features of its prompts, so that umT5 is not read again for them, and none of its captions."""

from pathlib import Path

import pytest
import torch

from muybridge.models.text import Umt5TextEncoder
from muybridge.train import tasks
from muybridge.train.config import load_train_config
from muybridge.train.tasks import TextToVideoTask

pytest.importorskip("transformers", reason="the extra `text` is not installed")
pytest.importorskip("ftfy", reason="the extra `text` is not installed")

PROMPTS = ["a red circle moves", ""]


def no_encoder(*args: object) -> Umt5TextEncoder:
    raise AssertionError("the encoder was read")


def build_task(settings: list[str]) -> TextToVideoTask:
    return TextToVideoTask(load_train_config(settings), torch.device("cpu"))


@pytest.fixture
def settings(tiny_run: list[str], tiny_umt5: Path, tmp_path: Path) -> list[str]:
    frozen = ["text.kind=umt5", f"text.path={tiny_umt5}", "text.max_tokens=12"]
    return [*tiny_run, *frozen, f"run_dir={tmp_path / 'run'}"]


def test_a_run_reads_the_encoder_once_for_its_prompts(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_task(settings)
    features = first.encode_prompts(PROMPTS)
    assert features.shape == (2, 12, 32)
    assert len(list((tmp_path / "run" / "prompt_features").iterdir())) == 2
    monkeypatch.setattr(tasks, "Umt5TextEncoder", no_encoder)
    assert torch.equal(build_task(settings).encode_prompts(PROMPTS), features)
    with pytest.raises(AssertionError, match="the encoder was read"):  # it is not held where only prompts needed it
        first.encode_text(PROMPTS)


def test_captions_are_not_kept(settings: list[str], tmp_path: Path) -> None:
    task = build_task(settings)
    captions = task.encode_text(PROMPTS)
    assert torch.equal(task.encode_prompts(PROMPTS), captions)  # with the encoder that is in memory
    assert not (tmp_path / "run" / "prompt_features").exists()


def test_prompts_of_an_encoder_that_is_trained_are_tokens(tiny_run: list[str], tmp_path: Path) -> None:
    task = build_task([*tiny_run, f"run_dir={tmp_path / 'run'}"])
    assert torch.equal(task.encode_prompts(PROMPTS), task.encode_text(PROMPTS))
    assert not (tmp_path / "run").exists()
