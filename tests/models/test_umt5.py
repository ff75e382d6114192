"""The frozen umT5 encoder against what diffusers' Wan pipeline does with the same folder."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from muybridge.models.text import (
    TextEncoderConfig,
    TextEncoderKind,
    Umt5TextEncoder,
    clean_caption,
    pad_features,
    text_fingerprint,
)

pytest.importorskip("transformers", reason="the extra `text` is not installed")
pytest.importorskip("ftfy", reason="the extra `text` is not installed")

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tiny_umt5: Path) -> Path:
    """A folder as diffusers writes it, with a tiny umT5 of random weights and a word tokenizer."""
    return tiny_umt5


def build(folder: Path, **overrides: object) -> Umt5TextEncoder:
    settings: dict = {"kind": TextEncoderKind.umt5, "dim": 32, "max_tokens": MAX_TOKENS, "path": str(folder)}
    return Umt5TextEncoder(TextEncoderConfig(**settings | overrides), dtype=torch.float32)


def test_features_are_those_of_the_diffusers_pipeline(folder: Path) -> None:
    pipelines = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan", reason="diffusers is not installed")
    captions = ["a red circle moves", "", "  the &amp;lt; green\n square ", "left " * 40]
    encoder = build(folder)
    pipeline = SimpleNamespace(tokenizer=encoder.tokenizer, text_encoder=encoder.model)
    expected = pipelines.WanPipeline._get_t5_prompt_embeds(
        pipeline, captions, max_sequence_length=MAX_TOKENS, device=torch.device("cpu"), dtype=torch.float32
    )
    found = encoder.encode(captions)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    rows = (found.abs().amax(-1) > 0).sum(1)
    assert rows.tolist() == [5, 1, 5, 12]  # words and the end token; an empty caption is the end token alone


def test_captions_are_cleaned() -> None:
    assert clean_caption("  a &amp;lt;b&amp;gt;\n\t circle ") == "a <b> circle"
    assert clean_caption("<b> &amp;lt;") == "<b> <"  # ftfy leaves entities alone beside a bracket
    assert clean_caption("cafÃ©") == "café"


def test_it_is_frozen_and_stays_in_evaluation_mode(folder: Path) -> None:
    encoder = build(folder)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.train()
    assert torch.equal(encoder.encode(["a red circle"]), encoder.encode(["a red circle"]))
    assert not encoder.model.training


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.path=.*nowhere.*text_encoder/ is missing"):
        build(tmp_path / "nowhere")


def test_a_width_that_differs_from_the_config_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.dim=64 must be the width of .*32"):
        build(folder, dim=64)


def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'muybridge\[text\]'"):
        build(folder)


def test_missing_tensors_are_refused_rather_than_drawn_at_random(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    gone = "encoder.block.1.layer.0.SelfAttention.q.weight"
    del weights[gone]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"text_encoder: 1 tensors missing, among them {gone}"):
        build(copy)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("text_encoder/model.safetensors", None, "text_encoder: not a readable UMT5EncoderModel"),
        ("text_encoder/model.safetensors", "cut", "text_encoder: not a readable UMT5EncoderModel"),
        ("text_encoder/config.json", "{", "text_encoder: not a readable UMT5EncoderModel"),
        ("tokenizer/tokenizer.json", None, "tokenizer: not a readable tokenizer"),
        ("tokenizer/tokenizer.json", "{", "tokenizer: not a readable tokenizer"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(
    folder: Path, tmp_path: Path, file: str, content: str | None, words: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / file).unlink() if content is None else (copy / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        build(copy)


def test_unpadded_features_become_those_of_a_batch(folder: Path) -> None:
    captions = ["a red circle moves", "", "left " * 40, "a"]
    encoder = build(folder)
    unpadded = encoder.encode_unpadded(captions)
    assert [len(rows) for rows in unpadded] == [5, 1, MAX_TOKENS, 2]
    padded = pad_features(unpadded, MAX_TOKENS)
    assert torch.equal(padded, encoder.encode(captions))
    assert not padded[1, 1:].any()
    alone = [encoder.encode_unpadded([caption])[0] for caption in captions]
    for one, among_others in zip(alone, unpadded, strict=True):  # another matrix product may be taken for another batch
        torch.testing.assert_close(one, among_others, rtol=0, atol=1e-6)


def test_the_fingerprint_follows_what_the_features_depend_on(folder: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path, **overrides: object) -> str | None:
        settings: dict = {"kind": TextEncoderKind.umt5, "dim": 32, "max_tokens": MAX_TOKENS, "path": str(path)}
        return text_fingerprint(TextEncoderConfig(**settings | overrides))

    copy = shutil.copytree(folder, tmp_path / "copy")
    before = fingerprint(copy)
    assert before == fingerprint(folder)
    assert fingerprint(copy, max_tokens=MAX_TOKENS + 1) != before
    assert fingerprint(copy, kind=TextEncoderKind.bytes) is None
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        assert fingerprint(copy) != before
        (copy / name).write_bytes(data)
    assert fingerprint(copy) == before
    with pytest.raises(ValueError, match=r"text\.path=.*nowhere must be a folder with text_encoder/"):
        fingerprint(tmp_path / "nowhere")


def test_no_progress_bar_is_shown_and_the_users_own_setting_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    shown: list[str] = []

    def users_hook(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        shown.append(options.get("desc", ""))
        return make(*args, **options)

    former = logging.set_tqdm_hook(users_hook)
    try:
        build(folder)
        assert not shown
        assert "Loading weights" not in capsys.readouterr().err
        assert list(logging.tqdm([1, 2], desc="the user's")) == [1, 2]
        assert shown == ["the user's"]
    finally:
        assert logging.set_tqdm_hook(former) is users_hook
