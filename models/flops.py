"""Size and arithmetic of a DiT, counted from its config: parameters, and FLOPs of a training step for MFU."""

import math

import torch

from .dit import DiT, DiTConfig
from .token_layout import token_layout


def count_parameters(config: DiTConfig) -> int:
    """Parameters of the DiT of this config, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(config).parameters())


def count_tokens(config: DiTConfig, latent_shape: tuple[int, int, int]) -> int:
    """Video tokens L of latents of (frames, height, width)."""
    return math.prod(length // step for length, step in zip(latent_shape, config.patch_size, strict=True))


def attended_pairs(config: DiTConfig, latent_shape: tuple[int, int, int]) -> int:
    """Pairs of video tokens that self-attention computes: all, or those in the tiles that the pattern's mask lists."""
    frames, rows, columns = (n // step for n, step in zip(latent_shape, config.patch_size, strict=True))
    grid = (frames, rows, columns)
    layout = token_layout(config.self_attention, grid, config.attention_head_dim, torch.device("cpu"))
    if layout.mask is None:
        return math.prod(grid) ** 2
    return round(layout.mask.density * layout.mask.query_low.shape[-1] ** 2)


def forward_flops(config: DiTConfig, latent_shape: tuple[int, int, int], text_tokens: int) -> int:
    """FLOPs of one forward of one sample: matmuls only, a multiply-add counted as two.

    Latents of (frames, height, width), one timestep for the sample, `text_tokens` rows of text (512 in Wan, padding
    included, because it is attended); an image's rows, where the model takes one, are those of Wan (`image_tokens`).
    """
    dim, tokens = config.dim, count_tokens(config, latent_shape)
    patch = math.prod(config.patch_size)
    per_video_token = dim * patch * (config.in_channels + config.out_channels)  # patch embedding and head
    per_text_token = config.text_dim * dim + dim * dim
    per_image_token = (config.image_dim or 0) * ((config.image_dim or 0) + dim)
    per_sample = config.freq_dim * dim + dim * dim + 6 * dim * dim  # time embedding and modulation

    # Self-attention q, k, v, out; cross-attention q, out; feed-forward up, down.
    block = tokens * (4 * dim * dim + 2 * dim * dim + 2 * dim * config.ffn_dim)
    context_tokens = text_tokens + config.image_tokens
    block += context_tokens * 2 * dim * dim  # cross-attention k, v
    # Scores, and values weighted by them.
    block += 2 * dim * (attended_pairs(config, latent_shape) + tokens * context_tokens)
    per_sample += text_tokens * per_text_token + config.image_tokens * per_image_token
    return 2 * (tokens * per_video_token + per_sample + config.num_layers * block)


def training_flops(config: DiTConfig, latent_shape: tuple[int, int, int], text_tokens: int) -> int:
    """FLOPs of forward and backward of one sample, three forwards; what checkpointing recomputes is not counted (MFU)."""
    return 3 * forward_flops(config, latent_shape, text_tokens)
