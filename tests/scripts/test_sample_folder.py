"""Videos of a pipeline folder are those that diffusers makes of it from the same noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from muybridge.scripts import sample_sources
from muybridge.scripts.sample import ClipSize, SampleConfig, generate_clips, read_pixels
from muybridge.scripts.sample_sources import open_source
from muybridge.tests.scripts.pipeline_folders import IMAGE_KINDS, NEGATIVE, PROMPTS, diffusers, write_folder
from muybridge.train.generate import prompt_noise

SIZE = ClipSize(frames=9, height=32, width=48, fps=8)


@pytest.mark.parametrize(
    ("kind", "images"),
    [("text", 0), ("experts", 0), ("image", 1), ("image", 2), ("clip", 1), ("between", 2), ("clean", 1)],
)
def test_videos_are_those_of_diffusers(kind: str, images: int, tmp_path: Path) -> None:
    pipeline = write_folder(tmp_path / "model", kind=kind)
    pipeline.set_progress_bar_config(disable=True)
    config = SampleConfig(model=str(tmp_path / "model"), negative_prompt=NEGATIVE, batch=2)
    pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 48, 3), dtype=np.uint8)
    pictures = [Image.fromarray(values) for values in pixels]
    given = {}
    for name, picture in zip(("image", "last_image"), pictures, strict=False):
        picture.save(tmp_path / f"{name}.png")
        given[name] = read_pixels(tmp_path / f"{name}.png", SIZE)
    source = open_source(config)
    assert (source.sampler.kind, source.sampler.shift) == ("unipc", 3.0)
    source.sampler.steps, source.sampler.guidance_scale_low = 4, 3.0
    [found] = generate_clips(
        source, PROMPTS, config, size=SIZE, sampler=source.sampler, progress=lambda done: None, **given
    )
    noise = prompt_noise(0, [0, 1], source.vae.latent_shape(9, 32, 48))
    options: dict[str, Any] = {}
    if kind == "experts":
        options["guidance_scale_2"] = 3.0
    if kind in IMAGE_KINDS:
        options |= dict(zip(given, pictures, strict=True))
    if kind == "clean":
        pipeline_class = diffusers.WanImageToVideoPipeline
        pipeline = pipeline_class(
            **{**pipeline.components, "image_encoder": None, "image_processor": None}, expand_timesteps=True
        )
        options["image"] = pictures[0]
    [wanted] = [
        pipeline(
            prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, height=32, width=48, num_frames=9, num_inference_steps=4,
            guidance_scale=5.0, latents=noise, output_type="np", **options,
        ).frames
    ]  # fmt: skip
    assert found.shape == (2, 9, 32, 48, 3)
    assert np.abs(found / 255 - wanted).max() < 1 / 255 / 2 + 2e-3
    assert found.std() > 5  # and not grey


def test_prompts_of_a_folder_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_encoder(*args: object, **options: object) -> None:
        raise AssertionError("the encoder was read")

    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "model", kind="text")
    config = SampleConfig(model=str(tmp_path / "model"))
    features = open_source(config).encode_text([*PROMPTS, NEGATIVE])
    assert features.shape == (3, 512, 32)
    monkeypatch.setattr(sample_sources, "Umt5TextEncoder", no_encoder)
    assert torch.equal(open_source(config).encode_text([NEGATIVE, *PROMPTS]), features.roll(1, 0))
    with pytest.raises(AssertionError, match="the encoder was read"):
        open_source(config).encode_text(["another"])
