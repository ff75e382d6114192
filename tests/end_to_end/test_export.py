"""A run's export opened by diffusers: prompts to latents and frames there, and here from the same folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from muybridge.models.diffusion.conditioning import ConditioningForm, known_frames_condition
from muybridge.models.diffusion.samplers import SamplerConfig, SamplerKind
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.pipeline_folder import PipelineFiles
from muybridge.models.text import TextEncoderConfig, TextEncoderKind, Umt5TextEncoder
from muybridge.models.vae.folder import load_vae
from muybridge.models.weight_files import open_weights
from muybridge.models.weights import load_config, load_weights_from
from muybridge.scripts import export, import_weights
from muybridge.train.generate import VideoModels, generate_latents

diffusers = pytest.importorskip("diffusers", reason="the oracle is not installed")

PROMPT = "a red circle moves to the left"
SIZE = {"height": 64, "width": 64, "num_frames": 9}
SETTINGS = {
    "one transformer": [],
    "two experts": ["boundary=0.9"],
    "mask channels": ["conditioning.form=channels", "model.in_channels=36", "data.access=raw"],
    "clean first frame": ["conditioning.form=clean_frames"],
}


@pytest.fixture
def vae_with_statistics(toy_folder: Path, tmp_path: Path) -> Path:
    """The toy autoencoder with a mean and a deviation of its own in each channel."""
    folder = shutil.copytree(toy_folder / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    config["latents_mean"] = [0.1 * i - 0.5 for i in range(16)]
    config["latents_std"] = [0.5 + 0.1 * i for i in range(16)]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["one transformer", "two experts", "mask channels", "clean first frame"])
def test_diffusers_makes_the_same_video(
    kind: str,
    tiny_run: list[str],
    tiny_umt5: Path,
    vae_with_statistics: Path,
    save_random_run: Callable[[Path, list[str]], Path],
    tmp_path: Path,
) -> None:
    settings = [*tiny_run, f"vae.path={vae_with_statistics}", "text.kind=umt5", f"text.path={tiny_umt5}"]
    settings += ["sampler.shift=4", "model.num_layers=2", *SETTINGS[kind]]
    out, is_of_images = tmp_path / "out", kind in ("mask channels", "clean first frame")
    if kind == "two experts":
        high = save_random_run(tmp_path / "high", [*settings, "expert=high"])
        low = save_random_run(tmp_path / "low", [*settings, "expert=low", "seed=1"])
        assert export.main([f"run={high}", f"low_run={low}", f"out={out}"]) == 0
    else:
        assert export.main([f"run={save_random_run(tmp_path / 'run', settings)}", f"out={out}"]) == 0

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 3, 8, 8, generator=generator)
    image = torch.rand(1, 3, 64, 64, generator=generator)
    pipeline_class = diffusers.WanImageToVideoPipeline if is_of_images else diffusers.WanPipeline
    pipeline = pipeline_class.from_pretrained(out, local_files_only=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise, **SIZE}
    if kind == "two experts":
        call["guidance_scale_2"] = 3.0
    if is_of_images:
        call["image"] = image
    expected = pipeline(**call, output_type="latent").frames
    expected_frames = torch.from_numpy(pipeline(**call, output_type="np").frames)  # [1, T, H, W, 3] in [0, 1]

    source = PipelineFiles.find(out)
    vae = load_vae(out / "vae").eval()
    low_noise = load_transformer(source.transformer_2) if source.transformer_2 else None
    transformer = load_transformer(out / "transformer")
    models = VideoModels(transformer, vae, low_noise, source.boundary_ratio or 0.0)
    config = TextEncoderConfig(kind=TextEncoderKind.umt5, dim=32, max_tokens=512, path=str(out))
    text = Umt5TextEncoder(config, dtype=torch.float32).encode([PROMPT, ""])
    sampler = SamplerConfig(SamplerKind.unipc, steps=4, shift=4.0, guidance_scale=5.0, guidance_scale_low=3.0)
    condition = None
    with torch.no_grad():
        if is_of_images:
            condition = known_frames_condition(
                ConditioningForm.clean_frames if source.expand_timesteps else ConditioningForm.channels,
                lambda pixels: vae.normalise(vae.encode(pixels).mode()),
                first=2 * image.unsqueeze(2) - 1,
                frames=SIZE["num_frames"],
                temporal_stride=4,
                patch_size=[1, 2, 2],
            )
        latents = generate_latents(models, noise, text[:1], text[1:], sampler=sampler, condition=condition)
        frames = vae.decode(vae.denormalise(latents)).clamp(-1, 1).permute(0, 2, 3, 4, 1) / 2 + 0.5

    assert expected.std() > 0.1
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    assert expected_frames.std() > 0.01
    torch.testing.assert_close(frames, expected_frames, atol=2e-3, rtol=0)


def load_transformer(folder: Path) -> DiT:
    dit = DiT(DiTConfig.from_diffusers(load_config(folder))).eval().requires_grad_(False)
    load_weights_from(dit, folder)
    return dit


def test_an_export_with_the_names_of_the_release_is_imported_as_it_was(
    tiny_run: list[str], tiny_umt5: Path, save_random_run: Callable[[Path, list[str]], Path], tmp_path: Path
) -> None:
    settings = [*tiny_run, "text.kind=umt5", f"text.path={tiny_umt5}", "model.freq_dim=256"]
    run_dir = save_random_run(tmp_path / "run", settings)
    for form in ("diffusers", "original"):
        assert export.main([f"run={run_dir}", f"out={tmp_path / form}", f"format={form}"]) == 0
    original, imported = tmp_path / "original", tmp_path / "imported"
    parts = [
        *("--vae", str(original / "Wan2.2_VAE.safetensors")),
        *("--text-encoder", str(original / "models_t5_umt5-xxl-enc-bf16.safetensors")),
        *("--tokenizer", str(original / "google" / "umt5-xxl")),
    ]
    assert import_weights.main([str(original), str(imported), *parts]) == 0
    for part in ("transformer", "text_encoder"):
        with open_weights(imported / part) as found, open_weights(tmp_path / "diffusers" / part) as expected:
            assert found.shapes == expected.shapes
            for name, tensor in found:
                assert torch.equal(tensor, expected.read(name)), name
    here, there = (load_config(folder / "transformer") for folder in (tmp_path / "diffusers", imported))
    assert {name: there[name] for name in here} == here
