"""Names of Wan's tensors: our table against diffusers' converters and transformers' classes, and there and back again."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from muybridge.models.wan_keys import (
    COMFY_PREFIX,
    Component,
    Layout,
    detect_layout,
    from_diffusers_keys,
    to_diffusers_keys,
)

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")

TRANSFORMER = Component.transformer
VAE = Component.vae
TEXT = Component.text_encoder
NAME_PAIRS = [
    # Read in the release's own code, one of each kind.
    (TRANSFORMER, "blocks.1.self_attn.q.weight", "blocks.1.attn1.to_q.weight"),
    (TRANSFORMER, "blocks.0.cross_attn.o.bias", "blocks.0.attn2.to_out.0.bias"),
    (TRANSFORMER, "blocks.0.norm3.weight", "blocks.0.norm2.weight"),
    (TRANSFORMER, "blocks.1.modulation", "blocks.1.scale_shift_table"),
    (TRANSFORMER, "head.modulation", "scale_shift_table"),
    (TRANSFORMER, "img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    (TRANSFORMER, "blocks.0.cross_attn.norm_k_img.weight", "blocks.0.attn2.norm_added_k.weight"),
    (TEXT, "token_embedding.weight", "shared.weight"),
    (TEXT, "blocks.1.norm1.weight", "encoder.block.1.layer.0.layer_norm.weight"),
    (TEXT, "blocks.1.attn.o.weight", "encoder.block.1.layer.0.SelfAttention.o.weight"),
    (TEXT, "blocks.1.norm2.weight", "encoder.block.1.layer.1.layer_norm.weight"),
    (TEXT, "blocks.1.ffn.gate.0.weight", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"),
    (TEXT, "blocks.1.ffn.fc1.weight", "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"),
    (TEXT, "blocks.1.ffn.fc2.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight"),
    (
        TEXT,
        "blocks.1.pos_embedding.embedding.weight",
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (TEXT, "norm.weight", "encoder.final_layer_norm.weight"),
]


def build_transformer(*, image: bool = False) -> nn.Module:
    extra = {"image_dim": 32, "added_kv_proj_dim": 32, "pos_embed_seq_len": 6} if image else {}
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=32, text_dim=16, freq_dim=16, num_layers=2, **extra
    )


def build_vae(*, residual: bool = False, blocks: int = 2) -> nn.Module:
    sizes = {"base_dim": 8, "z_dim": 4, "num_res_blocks": blocks, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    if residual:
        sizes |= {
            "decoder_base_dim": 16,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        }
    return diffusers.AutoencoderKLWan(**sizes)


def build_text_encoder() -> nn.Module:
    config = transformers.UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.UMT5EncoderModel(config)


MODELS: dict[str, tuple[Component, Callable[[], nn.Module]]] = {
    "t2v": (TRANSFORMER, build_transformer),
    "i2v": (TRANSFORMER, lambda: build_transformer(image=True)),
    "vae 2.1": (VAE, build_vae),
    "vae 2.1, three blocks": (VAE, lambda: build_vae(blocks=3)),
    "vae 2.2": (VAE, lambda: build_vae(residual=True)),
    "umt5": (TEXT, build_text_encoder),
}


def names_of(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if name != "encoder.embed_tokens.weight"]


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("model", MODELS)
def test_names_go_there_and_back_and_are_recognised(model: str, layout: Layout) -> None:
    component, build = MODELS[model]
    names = names_of(build())
    there = from_diffusers_keys(names, component, layout)
    assert list(there) == names
    assert len(set(there.values())) == len(names)
    back = to_diffusers_keys(there.values(), component, layout)
    assert list(back.values()) == names
    if layout is not Layout.comfy or component is TRANSFORMER:
        assert detect_layout(there.values(), component) is layout


@pytest.mark.parametrize(("component", "original", "ours"), NAME_PAIRS)
def test_names_of_the_release(component: Component, original: str, ours: str) -> None:
    several = {TRANSFORMER: "blocks.1.self_attn.k.weight", TEXT: "blocks.1.attn.k.weight"}
    assert to_diffusers_keys([original, several[component]], component, Layout.original)[original] == ours


def test_names_of_the_autoencoder_of_wan_2_2() -> None:
    there = from_diffusers_keys(names_of(build_vae(residual=True)), VAE, Layout.original)
    pairs = {
        "encoder.down_blocks.1.downsampler.time_conv.weight": "encoder.downsamples.1.downsamples.2.time_conv.weight",
        "encoder.down_blocks.3.resnets.1.conv2.bias": "encoder.downsamples.3.downsamples.1.residual.6.bias",
        "decoder.up_blocks.0.upsampler.resample.1.weight": "decoder.upsamples.0.upsamples.3.resample.1.weight",
        "decoder.up_blocks.2.resnets.0.conv_shortcut.bias": "decoder.upsamples.2.upsamples.0.shortcut.bias",
        "decoder.mid_block.resnets.1.norm1.gamma": "decoder.middle.2.residual.0.gamma",
        "post_quant_conv.weight": "conv2.weight",
    }
    assert {name: there[name] for name in pairs} == pairs


@pytest.mark.parametrize("model", ["t2v", "i2v", "vae 2.1"])
@pytest.mark.parametrize("layout", [Layout.original, Layout.comfy])
def test_diffusers_converter_agrees(model: str, layout: Layout) -> None:
    """Their table was written by others; a slip of ours that is undone on the way back would show here."""
    from diffusers.loaders import single_file_utils

    component, build = MODELS[model]
    convert = {
        TRANSFORMER: single_file_utils.convert_wan_transformer_to_diffusers,
        VAE: single_file_utils.convert_wan_vae_to_diffusers,
    }[component]
    # Their converter does not know the position table of FLF2V.
    names = [name for name in names_of(build()) if not name.endswith("pos_embed")]
    there = from_diffusers_keys(names, component, layout)
    theirs = convert({there[name]: torch.tensor(place) for place, name in enumerate(names)})
    assert {name: int(value) for name, value in theirs.items()} == {name: place for place, name in enumerate(names)}


def test_comfy_files_have_the_prefix_and_may_embed_a_tokenizer() -> None:
    names = names_of(build_transformer())
    assert all(name.startswith(COMFY_PREFIX) for name in from_diffusers_keys(names, TRANSFORMER, Layout.comfy).values())
    names = [*build_text_encoder().state_dict(), "spiece_model"]
    assert detect_layout(names, TEXT) is Layout.comfy
    renamed = to_diffusers_keys(names, TEXT, Layout.comfy)
    assert set(names) - set(renamed) == {"spiece_model", "encoder.embed_tokens.weight"}


@pytest.mark.parametrize("component", Component)
def test_what_is_not_wan_is_refused_by_name(component: Component) -> None:
    with pytest.raises(ValueError, match=f"not a Wan {component}: it holds double_blocks.0.img_attn"):
        detect_layout(["double_blocks.0.img_attn.qkv.weight"], component)
    with pytest.raises(ValueError, match="it holds no tensors"):
        detect_layout([], component)


def test_unknown_names_are_refused_by_name() -> None:
    names = names_of(build_transformer())
    original = list(from_diffusers_keys(names, TRANSFORMER, Layout.original).values())
    for extra in ("vace_blocks.0.before_proj.weight", "blocks.0.self_attn.q.scale_weight", "blocks.0.norm2.weight"):
        with pytest.raises(ValueError, match=f"a Wan transformer with original names: {extra}$"):
            to_diffusers_keys([*original, extra], TRANSFORMER, Layout.original)
        with pytest.raises(ValueError, match=r"with comfy names"):
            to_diffusers_keys(original, TRANSFORMER, Layout.comfy)
    with pytest.raises(ValueError, match=r"with diffusers names: head\.head\.weight"):
        from_diffusers_keys([*names, "head.head.weight"], TRANSFORMER, Layout.original)
