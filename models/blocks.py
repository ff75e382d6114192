"""One transformer block of the DiT: modulated self-attention, cross-attention to text and image, modulated feed-forward."""

import torch
from torch import Tensor, nn

from ..kernels import gated_residual, gelu_tanh, modulated_norm, residual_affine_norm, residual_modulated_norm
from .attention import Attention
from .embeddings import compute_dtype
from .token_layout import TokenLayout


class DiTBlock(nn.Module):
    """x [B, L, D] -> [B, L, D]; the residual stream, the modulation and the gates are float32 (the original's rule).

    A bf16 stream would halve the memory of checkpointed activations, but it rounds away small updates in every block.
    """

    def __init__(self, num_heads: int, head_dim: int, ffn_dim: int, eps: float, *, image: bool = False) -> None:
        """With `image`, cross-attention has keys and values for the tokens of an image."""
        super().__init__()
        dim = num_heads * head_dim
        self.eps = eps
        self.attn1 = Attention(num_heads, head_dim, eps)
        self.norm2 = ResidualLayerNorm(dim, eps)
        self.attn2 = Attention(num_heads, head_dim, eps, image=image)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, x: Tensor, context: Tensor, modulation: Tensor, layout: TokenLayout, image: Tensor | None = None
    ) -> Tensor:
        """Context [B, S, D], modulation [B, R, 6, D] float32: R is 1 (a row a sample), frames or L, and divides L; the tokens of
        an image [B, I, D] where the block was made for them.
        """
        dtype = compute_dtype(self.attn1.to_q.weight)
        table = self.scale_shift_table.float() + modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(-2)  # [B, R, D] each

        normed = modulated_norm(x, shift1, scale1, eps=self.eps, dtype=dtype)
        attended = self.attn1(normed, normed, rope=layout.rope, mask=layout.mask)
        x, normed = self.norm2(x, attended, gate1, dtype)
        attended = self.attn2(normed, context, mask=layout.text_mask, image=image)
        x, normed = residual_modulated_norm(x, attended, shift2, scale2, eps=self.eps, dtype=dtype)
        return gated_residual(x, self.ffn(normed), gate2)


class ResidualLayerNorm(nn.LayerNorm):
    """Adds a gated branch to the residual stream, and takes the LayerNorm of the sum in the dtype of the next matmul."""

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return residual_affine_norm(x, branch, self.weight, self.bias, gate=gate, eps=self.eps, dtype=dtype)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear; named `net.0.proj` and `net.2` as in public checkpoints."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class GELUProjection(nn.Module):
    """Linear, then GELU in its tanh form."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(self.proj(x))
