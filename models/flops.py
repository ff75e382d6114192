"""Size and arithmetic of a DiT, counted from its config: parameters, and FLOPs of a training step."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from .dit_config import DiTConfig
from .token_layout import AttentionPattern, SelfAttentionConfig, token_layout


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a DiT."""

    block: int  # of one block
    blocks: int  # how many blocks there are
    outside: int  # embeddings and head
    block_matrices: int  # of `block`, those in weights of Linear layers

    @property
    def total(self) -> int:
        return self.blocks * self.block + self.outside


@dataclass(frozen=True)
class DiTFlops:
    """FLOPs of one forward of one sample by what computes them: matmuls only, a multiply-add counted as two.

    Of the backward, attention takes 2.5 times its forward, because the scores are computed again (as in every flash attention).
    """

    linear: int  # Linear layers of all blocks
    self_attention: int
    cross_attention: int
    outside: int  # embeddings, modulation and head
    # Of `outside`, the layers whose inputs are data: nobody needs a gradient of those.
    first_layers: int

    @property
    def attention(self) -> int:
        return self.self_attention + self.cross_attention

    @property
    def forward(self) -> int:
        return self.linear + self.attention + self.outside

    @property
    def backward(self) -> int:
        """What the backward executes where all weights are trained; nothing that a policy computes again is in it."""
        return 2 * (self.linear + self.outside) - self.first_layers + 5 * self.attention // 2

    @property
    def blocks_again(self) -> int:
        """What it takes to compute the forward of all blocks again."""
        return self.linear + self.attention


def parameter_count(config: DiTConfig) -> ParameterCount:
    """Parameters by place, without building the model (the first tensor on the meta device takes seconds)."""
    dim, hidden = config.dim, config.ffn_dim
    patch, image = math.prod(config.patch_size), config.image_dim
    # q, k, v and out of both attentions; feed-forward.
    matrices = 2 * 4 * dim * dim + 2 * dim * hidden
    # Their biases, the scales of q and k, norm2, modulation.
    vectors = 2 * (4 * dim + 2 * dim) + hidden + dim + 2 * dim + 6 * dim
    outside = dim * (config.in_channels * patch + 1)  # patch embedding
    outside += dim * (config.freq_dim + 1) + dim * (dim + 1) + 6 * dim * (dim + 1)  # time embedding and modulation
    outside += dim * (config.text_dim + 1) + dim * (dim + 1)
    outside += patch * config.out_channels * (dim + 1) + 2 * dim  # head and its modulation
    if image is not None:
        matrices += 2 * dim * dim  # k and v of an image's tokens
        vectors += 2 * dim + dim  # and the scale of k
        outside += 2 * image + image * (image + 1) + dim * (image + 1) + 2 * dim
        outside += image * (config.pos_embed_seq_len or 0)
    return ParameterCount(matrices + vectors, config.num_layers, outside, matrices)


def count_parameters(config: DiTConfig) -> int:
    """Parameters of the DiT of this config."""
    return parameter_count(config).total


def count_tokens(config: DiTConfig, latent_shape: tuple[int, int, int]) -> int:
    """Video tokens L of latents of (frames, height, width)."""
    return math.prod(length // step for length, step in zip(latent_shape, config.patch_size, strict=True))


def attended_pairs(config: DiTConfig, latent_shape: tuple[int, int, int]) -> int:
    """Pairs of video tokens that self-attention computes: all, or those in the tiles that the pattern's mask lists."""
    frames, rows, columns = (n // step for n, step in zip(latent_shape, config.patch_size, strict=True))
    grid = (frames, rows, columns)
    if config.self_attention.pattern is AttentionPattern.full:
        return math.prod(grid) ** 2
    return _masked_pairs(json.dumps(config.self_attention.to_json()), grid, config.attention_head_dim)


@lru_cache(maxsize=256)
def _masked_pairs(pattern: str, grid: tuple[int, int, int], head_dim: int) -> int:
    # Kept, because a mask of a long clip takes a tenth of a second, and plans ask for the same ones again and again.
    config = SelfAttentionConfig.from_json(json.loads(pattern))
    mask = token_layout(config, grid, head_dim, torch.device("cpu")).mask
    assert mask is not None
    return round(mask.density * mask.query_low.shape[-1] ** 2)


def count_flops(
    config: DiTConfig, latent_shape: tuple[int, int, int], text_tokens: int, *, timestep_rows: int = 1
) -> DiTFlops:
    """FLOPs of one forward of one sample of latents of (frames, height, width).

    `timestep_rows` is how many timesteps a sample has (one, or one a token); `text_tokens` are rows of text (512 in Wan, padding
    included, because it is attended); an image's rows, where the model takes one, are those of Wan (`image_tokens`).
    """
    dim, tokens = config.dim, count_tokens(config, latent_shape)
    patch, image = math.prod(config.patch_size), config.image_dim or 0
    context_tokens = text_tokens + config.image_tokens

    # Self-attention q, k, v, out; cross-attention q, out; feed-forward up, down; cross-attention k, v.
    linear = tokens * (4 * dim * dim + 2 * dim * dim + 2 * dim * config.ffn_dim) + context_tokens * 2 * dim * dim
    first = tokens * dim * patch * config.in_channels + text_tokens * config.text_dim * dim
    first += timestep_rows * config.freq_dim * dim
    later = tokens * dim * patch * config.out_channels  # head
    later += timestep_rows * (dim * dim + 6 * dim * dim) + text_tokens * dim * dim
    later += config.image_tokens * image * (image + dim)
    return DiTFlops(
        linear=2 * config.num_layers * linear,
        # Scores, and values weighted by them.
        self_attention=2 * config.num_layers * 2 * dim * attended_pairs(config, latent_shape),
        cross_attention=2 * config.num_layers * 2 * dim * tokens * context_tokens,
        outside=2 * (first + later),
        first_layers=2 * first,
    )


def forward_flops(config: DiTConfig, latent_shape: tuple[int, int, int], text_tokens: int) -> int:
    """FLOPs of one forward of one sample, with one timestep for the sample; see `count_flops`."""
    return count_flops(config, latent_shape, text_tokens).forward


def training_flops(config: DiTConfig, latent_shape: tuple[int, int, int], text_tokens: int) -> int:
    """FLOPs of forward and backward of one sample, three forwards; what checkpointing recomputes is not counted (MFU)."""
    return 3 * forward_flops(config, latent_shape, text_tokens)
