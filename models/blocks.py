"""One transformer block of the DiT: modulated self-attention, cross-attention to the text, modulated feed-forward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .embeddings import Fp32LayerNorm, compute_dtype


class DiTBlock(nn.Module):
    """x [B, L, D] -> [B, L, D]; the residual stream, the modulation and the gates are float32 (the original's rule).

    A bf16 stream would halve the memory of checkpointed activations, but it rounds away small updates in every block.
    """

    def __init__(self, num_heads: int, head_dim: int, ffn_dim: int, eps: float) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.norm1 = Fp32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = Attention(num_heads, head_dim, eps)
        self.norm2 = Fp32LayerNorm(dim, eps)
        self.attn2 = Attention(num_heads, head_dim, eps)
        self.norm3 = Fp32LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, context: Tensor, modulation: Tensor, rope: Tensor) -> Tensor:
        """Context [B, S, D], modulation [B, 1|L, 6, D] float32, rope from `rope_table`."""
        dtype = compute_dtype(self.attn1.to_q.weight)
        table = self.scale_shift_table.float() + modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(-2)  # [B, 1|L, D] each

        normed = modulate(self.norm1(x), shift1, scale1).to(dtype)
        x = torch.addcmul(x, self.attn1(normed, normed, rope), gate1)
        x = x + self.attn2(self.norm2(x).to(dtype), context, None)
        normed = modulate(self.norm3(x), shift2, scale2).to(dtype)
        return torch.addcmul(x, self.ffn(normed), gate2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


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
        return F.gelu(self.proj(x), approximate="tanh")
