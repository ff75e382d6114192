"""Tiny pipeline folders of random weights, written by diffusers, of every kind that can be sampled."""

from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
pytest.importorskip("ftfy", reason="umT5's captions are cleaned with it")

PROMPTS = ["a red circle moving left", "two blue  squares &amp; a cat"]
NEGATIVE = "blurry"
# Given a first frame as channels, alone, with features of it, and with those of a last frame too.
IMAGE_KINDS = ("image", "clip", "between")
KINDS = ("text", "experts", *IMAGE_KINDS, "clean")


def write_folder(folder: Path, *, kind: str) -> Any:
    """A tiny pipeline of random weights of one of `KINDS` as diffusers saves it; the pipeline."""
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
    channels = {"text": 8, "experts": 8, "image": 8 + 4 + 8, "clip": 8 + 4 + 8, "between": 8 + 4 + 8, "clean": 8}[kind]
    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": channels, "out_channels": 8, "text_dim": 32,
        "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    if kind in ("clip", "between"):
        sizes |= {"image_dim": 48, "added_kv_proj_dim": 32}
    if kind == "between":
        sizes["pos_embed_seq_len"] = 2 * 5
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
    pipeline_class = diffusers.WanImageToVideoPipeline if kind in IMAGE_KINDS else diffusers.WanPipeline
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
    if kind in ("clip", "between"):
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
