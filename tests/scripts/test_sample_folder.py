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
from muybridge.train.generate import prompt_noise

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
pytest.importorskip("ftfy", reason="umT5's captions are cleaned with it")

PROMPTS = ["a red circle moving left", "two blue  squares &amp; a cat"]
NEGATIVE = "blurry"
SIZE = ClipSize(frames=9, height=32, width=48, fps=8)


def write_folder(folder: Path, *, kind: str) -> Any:
    """A tiny pipeline of random weights as diffusers saves it; the pipeline."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        PreTrainedTokenizerFast,
        UMT5Config,
        UMT5EncoderModel,
    )

    torch.manual_seed(0)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for word in " ".join([*PROMPTS, NEGATIVE, "&"]).split():
        words.setdefault(word, len(words))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )
    channels = {"text": 8, "experts": 8, "image": 8 + 4 + 8, "clip": 8 + 4 + 8, "clean": 8}[kind]
    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": channels, "out_channels": 8, "text_dim": 32,
        "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    if kind == "clip":
        sizes |= {"image_dim": 48, "added_kv_proj_dim": 32}
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1 * i for i in range(8)], latents_std=[1 + 0.1 * i for i in range(8)],
        scale_factor_spatial=4, scale_factor_temporal=4,
    )  # fmt: skip
    transformers = [diffusers.WanTransformer3DModel(**sizes) for _ in range(2)]
    for model in (text_encoder, vae, *transformers):
        for name, parameter in model.named_parameters():
            # Text must weigh so much that a mistake in guidance shows.
            torch.nn.init.normal_(parameter, mean=0.02, std=1.0 if "attn2" in name or "text_embedder" in name else 0.15)
    pipeline_class = diffusers.WanImageToVideoPipeline if kind in ("image", "clip") else diffusers.WanPipeline
    parts = {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        "text_encoder": text_encoder.eval(),
        "vae": vae.eval(),
        "transformer": transformers[0].eval(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    }
    if kind == "image":
        parts |= {"image_encoder": None, "image_processor": None}
    if kind == "clip":
        clip = CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        )
        processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        parts |= {"image_encoder": CLIPVisionModel(clip).eval(), "image_processor": processor}
    if kind == "experts":
        parts |= {"transformer_2": transformers[1].eval(), "boundary_ratio": 0.8}
    pipeline = pipeline_class(**parts, expand_timesteps=kind == "clean")
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize("kind", ["text", "experts", "image", "clip", "clean"])
def test_videos_are_those_of_diffusers(kind: str, tmp_path: Path) -> None:
    pipeline = write_folder(tmp_path / "model", kind=kind)
    pipeline.set_progress_bar_config(disable=True)
    config = SampleConfig(model=str(tmp_path / "model"), negative_prompt=NEGATIVE, batch=2)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    picture.save(tmp_path / "first.png")
    image = read_pixels(tmp_path / "first.png", SIZE) if kind in ("image", "clip", "clean") else None
    source = open_source(config)
    assert (source.sampler.kind, source.sampler.shift) == ("unipc", 3.0)
    source.sampler.steps, source.sampler.guidance_scale_low = 4, 3.0
    [found] = generate_clips(
        source, PROMPTS, config, size=SIZE, sampler=source.sampler, image=image, progress=lambda done: None
    )
    noise = prompt_noise(0, [0, 1], source.vae.latent_shape(9, 32, 48))
    options: dict[str, Any] = {}
    if kind == "experts":
        options["guidance_scale_2"] = 3.0
    if kind in ("image", "clip"):
        options["image"] = picture
    if kind == "clean":
        pipeline_class = diffusers.WanImageToVideoPipeline
        pipeline = pipeline_class(
            **{**pipeline.components, "image_encoder": None, "image_processor": None}, expand_timesteps=True
        )
        options["image"] = picture
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
