"""The sizes of Wan's parts read off the shapes of their weights, for files that come without a config."""

from collections.abc import Mapping
from typing import Any

import torch

from .dit import DiT, DiTConfig
from .vae import VAEConfig, VideoVAE
from .vae.config import wan_latent_statistics
from .vae_keys import vae_structure
from .wan_keys import umt5_modules
from .weight_files import check_keys

Shapes = Mapping[str, torch.Size]

# Every public Wan model has heads of this width; ComfyUI counts on it too.
HEAD_DIM = 128
_IMAGE_NORM = "condition_embedder.image_embedder.norm1.weight"
_IMAGE_PLACES = "condition_embedder.image_embedder.pos_embed"
_ATTENTION = "layer.0.SelfAttention"


def transformer_sizes(shapes: Shapes, *, num_heads: int | None = None) -> DiTConfig:
    """The sizes of a transformer whose tensors have diffusers' names; `num_heads` None: heads are 128 wide.

    Raises ValueError where a tensor that tells a size is missing, or heads do not divide the width.
    """
    _require(
        shapes,
        {
            "patch_embedding.weight": 5,
            "proj_out.weight": 2,
            "blocks.0.ffn.net.0.proj.weight": 2,
            "condition_embedder.text_embedder.linear_1.weight": 2,
            "condition_embedder.time_embedder.linear_1.weight": 2,
        },
        "transformer",
    )
    dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
    heads = num_heads or max(dim // HEAD_DIM, 1)
    if dim % heads or (num_heads is None and dim % HEAD_DIM):
        raise ValueError(
            f"the transformer's width {dim} must be a multiple of the heads' width {HEAD_DIM}, as in every public Wan model; "
            f"for other heads a config.json must lie beside the weights"
        )
    return DiTConfig(
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0] // torch.Size(patch_size).numel(),
        num_layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        dim=dim,
        num_attention_heads=heads,
        ffn_dim=shapes["blocks.0.ffn.net.0.proj.weight"][0],
        text_dim=shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        freq_dim=shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        patch_size=patch_size,
        image_dim=shapes[_IMAGE_NORM][0] if _IMAGE_NORM in shapes else None,
        pos_embed_seq_len=shapes[_IMAGE_PLACES][1] if _IMAGE_PLACES in shapes else None,
    )


def transformer_shapes(config: DiTConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a transformer of these sizes."""
    with torch.device("meta"):
        return {name: value.shape for name, value in DiT(config).state_dict().items()}


def vae_sizes(shapes: Shapes) -> VAEConfig:
    """The sizes of an autoencoder whose tensors have diffusers' names, with Wan's latent statistics for its channels.

    Raises ValueError where a tensor that tells a size is missing, or there are no such statistics.
    """
    structure = vae_structure(shapes)
    blocks, levels = structure.num_res_blocks, structure.levels

    def sampler(level: int) -> str:
        return f"{level}.downsampler" if structure.is_residual else str(level * (blocks + 1) + blocks)

    def first_block(level: int) -> str:
        return f"{level}.resnets.0" if structure.is_residual else str(level * (blocks + 1))

    widths = [f"encoder.down_blocks.{first_block(level)}.conv1.weight" for level in range(levels)]
    _require(
        shapes,
        {"encoder.conv_in.weight": 5, "decoder.norm_out.gamma": 4, "post_quant_conv.weight": 5}
        | dict.fromkeys(widths, 5),
        "vae",
    )
    base_dim, folded = shapes["encoder.conv_in.weight"][:2]
    z_dim = shapes["post_quant_conv.weight"][0]
    mean, std = wan_latent_statistics(z_dim)
    dim_mult = [shapes[name][0] // base_dim for name in widths]
    decoder_base_dim = shapes["decoder.norm_out.gamma"][0] // dim_mult[0]
    return VAEConfig(
        base_dim=base_dim,
        decoder_base_dim=None if decoder_base_dim == base_dim else decoder_base_dim,
        z_dim=z_dim,
        dim_mult=dim_mult,
        num_res_blocks=blocks,
        temporal_downsample=[
            f"encoder.down_blocks.{sampler(level)}.time_conv.weight" in shapes for level in range(levels - 1)
        ],
        is_residual=structure.is_residual,
        patch_size=2 if folded == 12 else 1,
        in_channels=3,
        latents_mean=mean,
        latents_std=std,
    )


def vae_shapes(config: VAEConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of an autoencoder of these sizes."""
    with torch.device("meta"):
        return {name: value.shape for name, value in VideoVAE(config).state_dict().items()}


def umt5_config(shapes: Shapes) -> dict[str, Any]:
    """transformers' config.json of a umT5 encoder with transformers' names. Raises ValueError where a telling tensor is missing."""
    bias = f"encoder.block.0.{_ATTENTION}.relative_attention_bias.weight"
    query, gate = f"encoder.block.0.{_ATTENTION}.q.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    _require(shapes, dict.fromkeys(("shared.weight", bias, query, gate), 2), "text encoder")
    (vocab_size, d_model), (num_buckets, num_heads) = shapes["shared.weight"], shapes[bias]
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": shapes[query][0] // num_heads,
        "d_ff": shapes[gate][0],
        "num_layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.block.")),
        "num_heads": num_heads,
        "relative_attention_num_buckets": num_buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def umt5_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a umT5 encoder. Raises ValueError naming a size that its config.json lacks."""
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
    if missing := [name for name in names if not isinstance(config.get(name), int)]:
        raise ValueError(f"config.json: {', '.join(missing)} missing; they are needed to build the text encoder")
    vocab, dim, head_dim, hidden, layers, heads, buckets = (config[name] for name in names)
    by_end = {
        "shared": (vocab, dim),
        "layer_norm": (dim,),
        "q": (heads * head_dim, dim),
        "k": (heads * head_dim, dim),
        "v": (heads * head_dim, dim),
        "o": (dim, heads * head_dim),
        "relative_attention_bias": (buckets, heads),
        "wi_0": (hidden, dim),
        "wi_1": (hidden, dim),
        "wo": (dim, hidden),
        "final_layer_norm": (dim,),
    }
    modules = umt5_modules(layers).values()
    return {f"{module}.weight": torch.Size(by_end[module.rsplit(".", 1)[-1]]) for module in modules}


def _require(shapes: Shapes, ranks: Mapping[str, int], what: str) -> None:
    """Raises ValueError where a tensor is missing or has another number of dims."""
    check_keys([name for name in ranks if name in shapes], ranks, where=f"the {what}'s sizes cannot be told")
    for name, rank in ranks.items():
        if len(shapes[name]) != rank:
            raise ValueError(f"the {what}'s {name} {list(shapes[name])} must have {rank} dims")
