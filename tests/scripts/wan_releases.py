"""Tiny models of random weights in the forms of Wan's releases, made with diffusers' and transformers' models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from muybridge.models.wan_keys import Component, Layout, from_diffusers_keys

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")

STATE = dict[str, Tensor]
SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 1024,
}  # fmt: skip
RELEASE_CONFIG = {
    "_class_name": "WanModel", "model_type": "t2v", "dim": 128, "ffn_dim": 48, "freq_dim": 32, "in_dim": 16, "out_dim": 16,
    "num_heads": 2, "num_layers": 2, "text_len": 512, "eps": 1e-6,
}  # fmt: skip


def random_weights(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def build_transformer(seed: int = 0, **sizes: Any) -> nn.Module:
    return random_weights(diffusers.WanTransformer3DModel(**SIZES | sizes), seed)


def build_vae(**sizes: Any) -> nn.Module:
    return random_weights(diffusers.AutoencoderKLWan(**{"base_dim": 8, "z_dim": 16} | sizes), 3)


def build_vae_2_2() -> nn.Module:
    from muybridge.models.vae.config import WAN_2_2_LATENTS_MEAN, WAN_2_2_LATENTS_STD

    return build_vae(
        z_dim=48, decoder_base_dim=16, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        scale_factor_spatial=16, latents_mean=WAN_2_2_LATENTS_MEAN, latents_std=WAN_2_2_LATENTS_STD,
    )  # fmt: skip


def renamed(model: nn.Module, component: Component, layout: Layout) -> STATE:
    state = model.state_dict()
    return {new: state[name].clone() for name, new in from_diffusers_keys(state, component, layout).items()}


def write_expert(folder: Path, model: nn.Module, **claims: Any) -> None:
    """A transformer as the release has it: config.json, and weights in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RELEASE_CONFIG | claims))
    state = renamed(model, Component.transformer, Layout.original)
    names = sorted(state)
    files = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_release(folder: Path, transformer: nn.Module, vae: nn.Module, umt5: Path, **claims: Any) -> Path:
    """Wan 2.1's folder, or Wan 2.2's 5B one where the autoencoder has 48 channels."""
    write_expert(folder, transformer, **claims)
    version = "2.2" if vae.config.z_dim == 48 else "2.1"
    torch.save(renamed(vae, Component.vae, Layout.original), folder / f"Wan{version}_VAE.pth")
    encoder = transformers.UMT5EncoderModel.from_pretrained(umt5 / "text_encoder")
    torch.save(renamed(encoder, Component.text_encoder, Layout.original), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(umt5 / "tokenizer", folder / "google" / "umt5-xxl")
    return folder
