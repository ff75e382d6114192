"""The attention layer of a block: q, k, v projections, RMSNorm over all heads together, rotary positions, the kernel."""

import torch
from torch import Tensor, nn

from ..kernels import attention
from .embeddings import Fp32RMSNorm
from .rope import apply_rope


class Attention(nn.Module):
    """Unmasked attention of x [B, L, D] over a context [B, S, D] (x itself in self-attention)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        # A list of one, because the public checkpoints call this layer `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = Fp32RMSNorm(dim, eps)
        self.norm_k = Fp32RMSNorm(dim, eps)

    def forward(self, x: Tensor, context: Tensor, rope: Tensor | None) -> Tensor:
        """`rope` is the table of `rope_table` for self-attention and None for cross-attention, which has no positions."""
        value = self._split_heads(self.to_v(context))  # [B, S, N, K]
        query = self._split_heads(self.norm_q(self.to_q(x)))  # [B, L, N, K], float32
        key = self._split_heads(self.norm_k(self.to_k(context)))
        if rope is not None:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        # Norm and rotation gave float32; the product runs in the dtype of the matmuls, save on the CPU, where the backward
        # of bf16 attention takes five times as long as that of float32.
        matmul_dtype = value.dtype
        product_dtype = torch.float32 if value.device.type == "cpu" else matmul_dtype
        heads = (states.to(product_dtype).transpose(1, 2) for states in (query, key, value))
        out = attention(*heads).to(matmul_dtype)  # [B, N, L, K]
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # [B, L, D]

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
