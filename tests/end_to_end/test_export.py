"""A run's export opened by diffusers: prompts to latents and frames there, and here from the same folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from muybridge.models.diffusion.guidance import guided_velocity
from muybridge.models.diffusion.samplers import SamplerConfig, SamplerKind, sample
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.text import TextEncoderConfig, TextEncoderKind, Umt5TextEncoder
from muybridge.models.vae.folder import load_vae
from muybridge.models.weight_files import open_weights
from muybridge.models.weights import load_config, load_weights_from
from muybridge.scripts import export, import_weights

diffusers = pytest.importorskip("diffusers", reason="the oracle is not installed")

PROMPT = "a red circle moves to the left"
SIZE = {"height": 64, "width": 64, "num_frames": 9}


@pytest.fixture
def vae_with_statistics(toy_folder: Path, tmp_path: Path) -> Path:
    """The toy autoencoder with a mean and a deviation of its own in each channel."""
    folder = shutil.copytree(toy_folder / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    config["latents_mean"] = [0.1 * i - 0.5 for i in range(16)]
    config["latents_std"] = [0.5 + 0.1 * i for i in range(16)]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_diffusers_makes_the_same_video_of_a_prompt(
    tiny_run: list[str],
    tiny_umt5: Path,
    vae_with_statistics: Path,
    save_random_run: Callable[[Path, list[str]], Path],
    tmp_path: Path,
) -> None:
    settings = [*tiny_run, f"vae.path={vae_with_statistics}", "text.kind=umt5", f"text.path={tiny_umt5}"]
    run_dir = save_random_run(tmp_path / "run", [*settings, "sampler.shift=4", "model.num_layers=2"])
    out = tmp_path / "out"
    assert export.main([f"run={run_dir}", f"out={out}"]) == 0

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 3, 8, 8, generator=generator)
    pipeline = diffusers.WanPipeline.from_pretrained(out, local_files_only=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise, **SIZE}
    expected = pipeline(**call, output_type="latent").frames
    expected_frames = torch.from_numpy(pipeline(**call, output_type="np").frames)  # [1, T, H, W, 3] in [0, 1]

    dit = DiT(DiTConfig.from_diffusers(load_config(out / "transformer"))).eval().requires_grad_(False)
    load_weights_from(dit, out / "transformer")
    config = TextEncoderConfig(kind=TextEncoderKind.umt5, dim=32, max_tokens=512, path=str(out))
    text = Umt5TextEncoder(config, dtype=torch.float32).encode([PROMPT, ""])
    sampler = SamplerConfig(kind=SamplerKind.unipc, steps=4, shift=4.0, guidance_scale=5.0)
    latents = sample(guided_velocity(dit, text[:1], text[1:], sampler.guidance_scale), noise, sampler)
    vae = load_vae(out / "vae").eval()
    with torch.no_grad():
        frames = vae.decode(vae.denormalise(latents)).clamp(-1, 1).permute(0, 2, 3, 4, 1) / 2 + 0.5

    assert expected.std() > 0.1
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    assert expected_frames.std() > 0.01
    torch.testing.assert_close(frames, expected_frames, atol=2e-3, rtol=0)


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
