"""Two experts as one export: those of two runs, or of a run and the pipeline folder that has the other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from muybridge.models.pipeline_folder import PipelineFiles
from muybridge.models.text import TextEncoderConfig
from muybridge.models.text_small import write_tokenizer
from muybridge.scripts import export
from muybridge.train.checkpoint_folder import committed_checkpoints
from muybridge.train.fragments import read_weights

SaveRun = Callable[[Path, list[str]], Path]


@pytest.fixture(scope="module")
def umt5_run(tiny_run: list[str], tiny_umt5: Path) -> list[str]:
    """Settings of a run with a frozen text encoder."""
    return [*tiny_run, "text.kind=umt5", f"text.path={tiny_umt5}"]


@pytest.fixture(scope="module")
def folder(umt5_run: list[str], save_random_run: SaveRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of two experts, beside the runs folder_high and folder_low of which it is made; nobody writes there."""
    root = tmp_path_factory.mktemp("experts")
    settings, folder = [*umt5_run, "boundary=0.8", "sampler.guidance_scale_low=3"], root / "folder"
    high = save_random_run(root / "folder_high", [*settings, "expert=high"])
    low = save_random_run(root / "folder_low", [*settings, "expert=low", "seed=1"])
    assert export.main([f"run={high}", f"low_run={low}", f"out={folder}", "dtype=fp32"]) == 0
    return folder


def trained(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_weights(committed_checkpoints(run_dir / "checkpoints")[-1], "ema")


def stored_settings(part: Path) -> dict[str, Any]:
    with safe_open(part / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        settings: dict[str, Any] = json.loads(file.metadata()["muybridge.config"])
    return settings


def test_two_experts_become_one_pipeline(folder: Path) -> None:
    assert PipelineFiles.find(folder).boundary_ratio == 0.8
    for part, run in (("transformer", "folder_high"), ("transformer_2", "folder_low")):
        stored, weights = load_file(folder / part / "diffusion_pytorch_model.safetensors"), trained(folder.parent / run)
        assert all(torch.equal(tensor, weights[f"transformer.{name}"]) for name, tensor in stored.items())
    assert "guidance_scale_2=3" in (folder / "README.md").read_text()


def test_the_expert_that_was_not_trained_is_that_of_the_folder(
    folder: Path, umt5_run: list[str], save_random_run: SaveRun, tmp_path: Path
) -> None:
    low = save_random_run(tmp_path / "low", [*umt5_run, "boundary=0.8", "expert=low", "seed=2", "sampler.steps=7"])
    out = tmp_path / "out"
    assert export.main([f"run={folder}", f"low_run={low}", f"out={out}", "dtype=fp32"]) == 0
    stored = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    weights = trained(folder.parent / "folder_high")
    assert all(torch.equal(tensor, weights[f"transformer.{name}"]) for name, tensor in stored.items())
    # The settings of the run are in both files: the sampler reads those of `transformer`, here the folder's.
    assert stored_settings(out / "transformer") == stored_settings(out / "transformer_2")
    assert stored_settings(out / "transformer")["sampler"]["steps"] == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("boundary=0.875", "boundary=0.8 of high noise, 0.875 of low noise"),
        ("conditioning.form=clean_frames", "conditioning.form=none of high noise, clean_frames of low noise"),
    ],
)
def test_a_run_that_is_no_expert_beside_the_folder_is_refused(
    change: str, words: str, folder: Path, umt5_run: list[str], save_random_run: SaveRun, tmp_path: Path
) -> None:
    low = save_random_run(tmp_path / "low", [*umt5_run, "boundary=0.8", "expert=low", change])
    with pytest.raises(ValueError, match=words):
        export.main([f"run={folder}", f"low_run={low}", f"out={tmp_path / 'out'}"])


def test_a_run_on_the_latents_of_another_autoencoder_than_the_folders_is_refused(
    folder: Path, toy_folder: Path, umt5_run: list[str], save_random_run: SaveRun, tmp_path: Path
) -> None:
    vae = shutil.copytree(toy_folder / "vae", tmp_path / "vae")
    path = vae / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, path)
    low = save_random_run(tmp_path / "low", [*umt5_run, "boundary=0.8", "expert=low", f"vae.path={vae}"])
    with pytest.raises(ValueError, match="are different autoencoders"):
        export.main([f"run={folder}", f"low_run={low}", f"out={tmp_path / 'out'}"])


def test_runs_on_the_latents_of_two_autoencoders_are_refused(
    toy_folder: Path, umt5_run: list[str], save_random_run: SaveRun, tmp_path: Path
) -> None:
    vae = shutil.copytree(toy_folder / "vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    config["latents_std"] = [2 * value for value in config["latents_std"]]
    (vae / "config.json").write_text(json.dumps(config))
    high = save_random_run(tmp_path / "high", [*umt5_run, "expert=high"])
    low = save_random_run(tmp_path / "low", [*umt5_run, "expert=low", f"vae.path={vae}"])
    with pytest.raises(ValueError, match="are different autoencoders"):
        export.main([f"run={high}", f"low_run={low}", f"out={tmp_path / 'out'}"])


def test_an_expert_that_trained_an_encoder_is_refused_beside_a_folder(
    folder: Path, tiny_run: list[str], save_random_run: SaveRun, tmp_path: Path
) -> None:
    low = tmp_path / "low"
    text = TextEncoderConfig(dim=32, num_heads=2, max_tokens=12, vocabulary=300)
    write_tokenizer(low / "tokenizer", ["a red circle"], text)
    settings = ["text.kind=umt5_small", "text.vocabulary=300", "boundary=0.8", "expert=low"]
    save_random_run(low, [*tiny_run, *settings])
    with pytest.raises(ValueError, match=r"text\.kind=umt5_small must be umt5, frozen"):
        export.main([f"run={folder}", f"low_run={low}", f"out={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    ("high", "low", "words"),
    [
        (["expert=high"], None, "trained the expert of high noise alone"),
        (["expert=low"], None, "low_run=.* and run=the other"),
        (["expert=low"], ["expert=high"], "has expert=low and must have expert=high"),
        (["expert=high"], ["expert=low", "boundary=0.5"], "boundary=0.875 of high noise, 0.5 of low noise"),
        (["expert=high"], ["expert=low", "model.num_layers=2"], "model.num_layers: 1 of high noise, 2 of low noise"),
        (
            ["expert=high"],
            ["expert=low", "conditioning.form=clean_frames"],
            "conditioning.form=none of high noise, clean_frames of low",
        ),
        (
            ["expert=high"],
            ["expert=low", "text.max_tokens=16"],
            "text.max_tokens=12 and .* with 16 make different features",
        ),
        (
            ["expert=high", "text.kind=bytes"],
            ["expert=low", "text.kind=bytes"],
            "text.kind=bytes must be umt5, frozen, for two experts",
        ),
    ],
)
def test_experts_that_are_no_model_are_refused(
    high: list[str],
    low: list[str] | None,
    words: str,
    umt5_run: list[str],
    save_random_run: SaveRun,
    tmp_path: Path,
) -> None:
    arguments = [f"run={save_random_run(tmp_path / 'high', [*umt5_run, *high])}", f"out={tmp_path / 'out'}"]
    if low is not None:
        arguments.append(f"low_run={save_random_run(tmp_path / 'low', [*umt5_run, *low])}")
    with pytest.raises(ValueError, match=words):
        export.main(arguments)
