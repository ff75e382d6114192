"""A LoRA run's export: the LoRA as a file of the forms that other tools read, or the whole model with it merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muybridge.models.lora_files import read_lora
from muybridge.models.text import ByteTextEncoder, TextEncoderConfig
from muybridge.models.text_small import write_tokenizer
from muybridge.models.weights import load_weights
from muybridge.scripts import export
from muybridge.train.checkpoint_folder import committed_checkpoints
from muybridge.train.fragments import read_weights

SaveRun = Callable[[Path, list[str]], Path]
PROMPTS = ["a red circle moving left", "a blue square"]


@pytest.fixture(scope="module")
def run_dir(tiny_run: list[str], save_random_run: SaveRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_run(tmp_path_factory.mktemp("runs") / "run", tiny_run)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def trained(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_weights(committed_checkpoints(run_dir / "checkpoints")[-1], "ema")


def text_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    prefix = "text_encoder."
    return {name.removeprefix(prefix): v for name, v in trained(run_dir).items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def lora_run(run_dir: Path, tiny_run: list[str], save_random_run: SaveRun) -> Path:
    settings = [*tiny_run, f"init_from={run_dir}", "lora.rank=2", "lora.alpha=4"]
    return save_random_run(run_dir.parent / "lora", settings)


@pytest.mark.parametrize("form", ["", "comfy", "diffusers", "kohya"])
def test_the_lora_of_a_run_becomes_a_file(form: str, lora_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "style.safetensors"
    arguments = [f"run={lora_run}", f"out={out}", "dtype=fp32", *([f"format={form}"] if form else [])]
    assert export.main(arguments) == 0
    found, weights = read_lora(out), trained(lora_run)
    assert len(found) == 10
    for name, layer in found.items():
        down, up = (weights[f"transformer.{name}.lora_{half}"] for half in "AB")
        torch.testing.assert_close(layer.delta(), 2.0 * up @ down)
    marks = {"diffusers": "transformer.", "kohya": "lora_unet_"}
    assert all(name.startswith(marks.get(form, "diffusion_model.")) for name in load_file(out))


def test_a_lora_is_merged_into_the_weights_under_it(run_dir: Path, lora_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([f"run={lora_run}", f"out={out}", "merge=true", "dtype=fp32"]) == 0
    stored = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    base, lora = trained(run_dir), trained(lora_run)
    for name, tensor in stored.items():
        expected, layer = base[f"transformer.{name}"], f"transformer.{name.removesuffix('.weight')}"
        if name.endswith(".weight") and f"{layer}.lora_A" in lora:
            expected = expected + 2.0 * lora[f"{layer}.lora_B"] @ lora[f"{layer}.lora_A"]
        torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("format=original", "must be comfy, diffusers or kohya for a LoRA"),
        ("out=folder", r"must end in \.safetensors for a LoRA"),
        ("prompts=prompts.txt", "a LoRA has no text encoder"),
    ],
)
def test_what_a_lora_cannot_have_is_named(
    change: str, words: str, lora_run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prompts.parent)
    with pytest.raises(ValueError, match=words):
        export.main([f"run={lora_run}", "out=new.safetensors", change])


def test_a_merged_model_has_the_prompt_features_of_the_encoder_under_the_lora(
    run_dir: Path, lora_run: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert export.main([f"run={lora_run}", f"out={out}", "merge=true", f"prompts={prompts}"]) == 0
    encoder = ByteTextEncoder(TextEncoderConfig(dim=32, num_heads=2, max_tokens=12)).eval()
    load_weights(encoder, text_weights(run_dir), where="the run")
    with torch.no_grad():
        expected = encoder(encoder.tokenize(PROMPTS))
    torch.testing.assert_close(load_file(out / "prompt_embeds.safetensors")["prompt_embeds"], expected)


def test_a_merged_model_has_the_text_encoder_under_the_lora(
    tiny_run: list[str], save_random_run: SaveRun, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    settings = [*tiny_run, "text.kind=umt5_small", "text.max_tokens=12", "text.vocabulary=300"]
    text = TextEncoderConfig(dim=32, num_heads=2, max_tokens=12, vocabulary=300)
    base, lora, out = tmp_path / "base", tmp_path / "lora", tmp_path / "out"
    # The runs are saved in folders that have a tokenizer already, as those of the trainer have.
    write_tokenizer(base / "tokenizer", PROMPTS, text)
    save_random_run(base, settings)
    shutil.copytree(base / "tokenizer", lora / "tokenizer")
    save_random_run(lora, [*settings, f"init_from={base}", "lora.rank=2"])
    assert export.main([f"run={lora}", f"out={out}", "merge=true"]) == 0
    assert json.loads((out / "model_index.json").read_text())["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    stored, expected = load_file(out / "text_encoder" / "model.safetensors"), text_weights(base)
    found = {name: stored["shared.weight" if "embed_tokens" in name else name] for name in expected}
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
