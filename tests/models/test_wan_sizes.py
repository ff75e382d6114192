"""Sizes read off weights: every public model and odd small ones are told again, and what cannot be told is named."""

from pathlib import Path

import pytest
import torch
import yaml

from muybridge.models.dit import DiTConfig
from muybridge.models.vae import VAEConfig
from muybridge.models.vae.config import WAN_2_2_LATENTS_MEAN, WAN_2_2_LATENTS_STD
from muybridge.models.wan_sizes import (
    transformer_shapes,
    transformer_sizes,
    umt5_config,
    umt5_shapes,
    vae_shapes,
    vae_sizes,
)

MODELS = Path(__file__).parents[2] / "configs" / "model"
WAN_2_1_VAE = VAEConfig.from_diffusers({})
WAN_2_2_VAE = VAEConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    patch_size=2,
    latents_mean=WAN_2_2_LATENTS_MEAN,
    latents_std=WAN_2_2_LATENTS_STD,
    temporal_downsample=[False, True, True],
)


@pytest.mark.parametrize("name", ["wan_1_3b", "wan_14b", "wan2_2_5b", "wan2_2_a14b", "wan2_2_i2v_a14b", "wan_i2v_14b"])
def test_public_transformers_are_told_by_their_shapes(name: str) -> None:
    settings = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    config = DiTConfig(**settings)
    assert transformer_sizes(transformer_shapes(config)) == config


def test_heads_of_another_width_are_counted_by_the_caller() -> None:
    config = DiTConfig(num_layers=1, dim=96, num_attention_heads=3, ffn_dim=64, text_dim=16, patch_size=[3, 2, 2])
    shapes = transformer_shapes(config)
    assert transformer_sizes(shapes, num_heads=3) == config
    for heads in (None, 5):
        with pytest.raises(ValueError, match="width 96 must be a multiple of the heads' width 128"):
            transformer_sizes(shapes, num_heads=heads)


@pytest.mark.parametrize(
    "config",
    [
        WAN_2_1_VAE,
        WAN_2_2_VAE,
        VAEConfig(
            base_dim=8,
            dim_mult=[1, 3],
            num_res_blocks=1,
            temporal_downsample=[True],
            latents_mean=WAN_2_1_VAE.latents_mean,
            latents_std=WAN_2_1_VAE.latents_std,
        ),
    ],
    ids=["2.1", "2.2", "two levels"],
)
def test_autoencoders_are_told_by_their_shapes(config: VAEConfig) -> None:
    assert vae_sizes(vae_shapes(config)) == config


def test_an_autoencoder_of_unknown_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 latent channels is neither Wan 2\.1's"):
        vae_sizes(vae_shapes(VAEConfig(base_dim=8, z_dim=8)))


def test_a_umt5_encoder_is_told_by_its_shapes() -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    shapes = {name: value.shape for name, value in theirs.state_dict().items() if "embed_tokens" not in name}
    config = umt5_config(shapes)
    assert {name: config[name] for name in sizes} == sizes
    assert umt5_shapes(config) == shapes
    # The settings that shapes do not show are those of the class.
    known = theirs.config.to_dict()
    assert {name: known[name] for name in config if name != "architectures"} == {
        name: value for name, value in config.items() if name != "architectures"
    }


def test_a_missing_or_odd_tensor_is_named() -> None:
    shapes = transformer_shapes(DiTConfig(num_layers=1, dim=128, num_attention_heads=1, ffn_dim=64, text_dim=16))
    with pytest.raises(ValueError, match=r"sizes cannot be told: missing tensors: proj_out\.weight"):
        transformer_sizes({name: shape for name, shape in shapes.items() if name != "proj_out.weight"})
    with pytest.raises(ValueError, match=r"patch_embedding\.weight \[3\] must have 5 dims"):
        transformer_sizes(shapes | {"patch_embedding.weight": torch.Size([3])})
    with pytest.raises(ValueError, match=r"config\.json: d_kv, num_heads missing"):
        umt5_shapes(
            {
                "vocab_size": 1,
                "d_model": 1,
                "d_ff": 1,
                "num_layers": 1,
                "num_heads": None,
                "relative_attention_num_buckets": 1,
            }
        )
