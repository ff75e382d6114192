"""The diffusion transformer of Wan 2.1 and 2.2: noisy latents, noise level, text and perhaps an image in, velocity out.

Modules are named as in diffusers' `WanTransformer3DModel`, so a `state_dict` moves between the two unchanged.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..kernels import modulated_norm
from .attention import HeadsRMSNorm
from .blocks import DiTBlock
from .dit_config import DiTConfig
from .embeddings import ConditionEmbedder, Fp32Linear, ImageEmbedder, PatchEmbedding
from .token_layout import AttentionPattern, TokenLayout, packed_layout, token_layout


class DiT(nn.Module):
    """Velocity [B, C_out, T, H, W] of noisy latents [B, C, T, H, W] at a timestep, given text features [B, S, text_dim].

    A config with `image_dim` also needs features of an image [B, I, image_dim], of two one after the other for a first and a
    last frame. Latents that have more channels than the velocity hold a mask and known latents behind the noisy ones.

    Weights may be float32 (plain or under autocast) or bf16. Matmuls of the blocks run in bf16 where asked; time
    embedding, modulation, residual stream, norms' statistics, rotary embedding and head are float32 always.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        pt, ph, pw = config.patch_size
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, (pt, ph, pw))
        self.condition_embedder = ConditionEmbedder(
            config.freq_dim,
            config.text_dim,
            dim,
            image_dim=config.image_dim,
            image_positions=config.pos_embed_seq_len,
        )
        self.blocks = nn.ModuleList(
            DiTBlock(
                config.num_attention_heads,
                config.attention_head_dim,
                config.ffn_dim,
                config.eps,
                image=config.image_dim is not None,
            )
            for _ in range(config.num_layers)
        )
        self.proj_out = Fp32Linear(dim, math.prod(config.patch_size) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))
        # What training may replace, from outside: the way through all blocks (tokens split over processes), and through one of
        # them (activations computed again).
        self.run_blocks: Callable[..., Tensor] = self._run_blocks
        self.run_block: Callable[..., Tensor] = _run_block
        self.reset_parameters()

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Timestep in [0, 1000], float32: one per sample [B], or [B, R] for R runs of equally many tokens in raster order, such
        as one per token (R = L, for Wan 2.2's clean first frame) or per frame of tokens.

        Raises ValueError for latents of other channels or that patches do not tile, a grid beyond `rope_max_seq_len`, a timestep
        of another shape, or in half precision, which cannot tell 999 from 1000, and image features where the model takes none,
        or none or others where it takes them.
        """
        config = self.config
        grid = self._token_grid(latents)
        self._check_image_features(image_features, len(latents))
        timestep = self._timestep_rows(timestep, math.prod(grid))  # [B, R]
        layout = token_layout(config.self_attention, grid, config.attention_head_dim, latents.device)
        x = self.patch_embedding(latents).float()  # [B, L, D]
        if layout.order is not None:
            x = layout.order.to_tiles(x)
            if timestep.shape[1] > 1:
                timestep = layout.order.to_tiles(timestep.repeat_interleave(math.prod(grid) // timestep.shape[1], 1))
        tokens = self.run_blocks(x, timestep, text, layout, image_features)
        if layout.order is not None:
            tokens = layout.order.to_raster(tokens)
        return self._unpatchify(tokens, grid)

    def forward_packed(self, clips: Sequence[Tensor], timestep: Tensor, text: Sequence[Tensor]) -> list[Tensor]:
        """Velocities of clips of any shapes [C, T, H, W], computed in one row without padding.

        Timestep [clips] in [0, 1000]; text features [S, text_dim] of each clip, S as it comes. Each token has a modulation row of
        its own here, 24 D bytes, which at large widths is what limits the row.

        Raises ValueError as `forward` does, and where self-attention has a sparse pattern or the model takes image features.
        """
        config = self.config
        if config.image_dim is not None:
            raise ValueError(f"image_dim={config.image_dim} must be null to pack clips into one row")
        if config.self_attention.pattern is not AttentionPattern.full:
            raise ValueError(
                f"self_attention.pattern={config.self_attention.pattern.name} must be full to pack clips into one row"
            )
        if not len(clips) == len(timestep) == len(text) or timestep.ndim != 1:
            raise ValueError(
                f"{len(clips)} clips need as many timesteps and texts (given: {list(timestep.shape)} and {len(text)})"
            )
        grids = [self._token_grid(clip.unsqueeze(0)) for clip in clips]
        lengths = [math.prod(grid) for grid in grids]
        device = clips[0].device
        layout = packed_layout(
            grids,
            [len(features) for features in text],
            positions=config.rope_max_seq_len,
            head_dim=config.attention_head_dim,
            device=device,
        )
        x = torch.cat([self.patch_embedding(clip.unsqueeze(0)) for clip in clips], dim=1).float()  # [1, L, D]
        row = timestep.repeat_interleave(torch.tensor(lengths, device=device)).unsqueeze(0)  # [1, L]
        context = torch.cat(list(text)).unsqueeze(0)  # [1, S, text_dim]
        tokens = self.run_blocks(x, self._timestep_rows(row, sum(lengths)), context, layout, None)
        parts = tokens.split(lengths, dim=1)
        return [self._unpatchify(part, grid).squeeze(0) for part, grid in zip(parts, grids, strict=True)]

    def _run_blocks(
        self, x: Tensor, timestep: Tensor, text: Tensor, layout: TokenLayout, image_features: Tensor | None
    ) -> Tensor:
        """Tokens [B, L, D] through the blocks and the head -> [B, L, pt*ph*pw*C]; timestep [B, R], text [B, S, text_dim]."""
        embedding, modulation, context = self.condition_embedder(timestep, text)
        image = None if image_features is None else self.condition_embedder.image_embedder(image_features)  # [B, I, D]
        for number, block in enumerate(self.blocks):
            x = self.run_block(number, block, x, context, modulation, layout, image)
        shift, scale = (self.scale_shift_table.float() + embedding.unsqueeze(-2)).unbind(-2)  # [B, R, D] each
        return self.proj_out(modulated_norm(x, shift, scale, eps=self.config.eps, dtype=torch.float32))

    @staticmethod
    def _timestep_rows(timestep: Tensor, tokens: int) -> Tensor:
        """The timestep as [B, R], R a divisor of L."""
        if timestep.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"timestep.dtype={timestep.dtype} must be float32 (half precision cannot tell 999 from 1000)"
            )
        rows = timestep.unsqueeze(1) if timestep.ndim == 1 else timestep
        if rows.ndim != 2 or tokens % rows.shape[1]:
            raise ValueError(
                f"timestep {list(timestep.shape)} must be [B], or [B, R] with R a divisor of the {tokens} tokens"
            )
        return rows

    def _check_image_features(self, features: Tensor | None, batch: int) -> None:
        """The model takes image features, all rows that have a place, or it does not."""
        config = self.config
        if (features is None) != (config.image_dim is None):
            given = "none given" if features is None else f"{list(features.shape)} given"
            raise ValueError(
                f"image features: {given}, which must go with image_dim={config.image_dim} (null: a model without them)"
            )
        if features is None:
            return
        rows = "I" if config.pos_embed_seq_len is None else str(config.pos_embed_seq_len)
        fits = features.ndim == 3 and features.shape[::2] == (batch, config.image_dim)
        if not fits or (config.pos_embed_seq_len or features.shape[1]) != features.shape[1]:
            raise ValueError(
                f"image features {list(features.shape)} must be [{batch}, {rows}, {config.image_dim}] (batch, rows, image_dim)"
            )

    def _token_grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens along frames, rows and columns."""
        if latents.shape[1] != self.config.in_channels:
            raise ValueError(
                f"latents of {latents.shape[1]} channels must have the model's in_channels={self.config.in_channels} (beside "
                "noise, image-to-video models take a mask and image latents)"
            )
        size, patch, limit = tuple(latents.shape[2:]), self.config.patch_size, self.config.rope_max_seq_len
        if any(length % step for length, step in zip(size, patch, strict=True)):
            raise ValueError(
                f"latents of (frames, height, width)={size} must be divisible by the patch size {tuple(patch)}"
            )
        frames, height, width = (length // step for length, step in zip(size, patch, strict=True))
        if max(frames, height, width) > limit:
            raise ValueError(
                f"a grid of {(frames, height, width)} tokens must fit rope_max_seq_len={limit} on every axis"
            )
        return frames, height, width

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, pt*ph*pw*C], channel fastest -> [B, C, T, H, W]."""
        frames, height, width = grid
        pt, ph, pw = self.config.patch_size
        patches = tokens.view(-1, frames, height, width, pt, ph, pw, self.config.out_channels)
        patches = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, T', pt, H', ph, W', pw]
        return patches.reshape(tokens.shape[0], -1, frames * pt, height * ph, width * pw)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights as the original does: Xavier Linears, small embeddings, and a zero head (velocity 0 at first)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                assert module.bias is not None
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                module.reset_parameters()
            elif isinstance(module, HeadsRMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, ImageEmbedder) and module.pos_embed is not None:
                nn.init.zeros_(module.pos_embed)
        for embedder in (self.condition_embedder.time_embedder, self.condition_embedder.text_embedder):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)
        for module in (self, *self.blocks):
            nn.init.normal_(module.scale_shift_table, std=self.config.dim**-0.5)


def _run_block(number: int, block: nn.Module, *inputs: object) -> Tensor:
    """One block, as it is; `number` is its place."""
    return block(*inputs)
