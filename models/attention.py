"""The attention layer of a block: q, k, v projections, RMSNorm over all heads together, rotary positions, the kernel."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels import Rope, TileMask, attention, rms_norm_heads, rms_norm_rope


class Attention(nn.Module):
    """Attention of x [B, L, D] over a context [B, S, D] (x itself in self-attention), and over an image's tokens where asked."""

    def __init__(self, num_heads: int, head_dim: int, eps: float, *, image: bool = False) -> None:
        """`image` adds keys and values for the tokens of an image, which the same queries read apart from the text."""
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        # A list of one, because the public checkpoints call this layer `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = HeadsRMSNorm(dim, num_heads, eps)
        self.norm_k = HeadsRMSNorm(dim, num_heads, eps)
        # What training may replace, from outside: self-attention over tokens that are split over processes.
        self.attend: Callable[..., Tensor] = attention
        if image:
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.norm_added_k = HeadsRMSNorm(dim, num_heads, eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        rope: Rope | None = None,
        mask: TileMask | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """`rope` is None in cross-attention, which has no positions; without a mask every query meets every key.

        What the queries read from the tokens of an image [B, I, D] is added to what they read from the context: two softmaxes,
        so that 257 image tokens take no weight from the text.
        """
        value = self.to_v(context).unflatten(-1, (self.num_heads, -1))  # [B, S, N, K]
        # The product runs in the dtype of the matmuls, save on the CPU, where the backward of bf16 attention takes five times
        # as long as that of float32.
        matmul_dtype = value.dtype
        product_dtype = torch.float32 if value.device.type == "cpu" else matmul_dtype
        query = self.norm_q(self.to_q(x), rope, product_dtype)  # [B, L, N, K]
        key = self.norm_k(self.to_k(context), rope, product_dtype)
        heads = (states.transpose(1, 2) for states in (query, key, value.to(product_dtype)))
        out = self.attend(*heads, mask=mask).to(matmul_dtype)  # [B, N, L, K]
        if image is not None:
            key = self.norm_added_k(self.add_k_proj(image), None, product_dtype)  # [B, I, N, K]
            value = self.add_v_proj(image).unflatten(-1, (self.num_heads, -1))
            heads = (states.transpose(1, 2) for states in (query, key, value.to(product_dtype)))
            out = out + attention(*heads, mask=None).to(matmul_dtype)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # [B, L, D]


class HeadsRMSNorm(nn.Module):
    """x / rms(x) * weight over all heads together, split into heads and turned by their positions; float32 inside."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, rope: Rope | None, dtype: torch.dtype) -> Tensor:
        """x [B, L, D] -> heads [B, L, N, K] in `dtype`."""
        if rope is None:
            return rms_norm_heads(x, self.weight, heads=self.num_heads, eps=self.eps, dtype=dtype)
        return rms_norm_rope(x, self.weight, rope, heads=self.num_heads, eps=self.eps, dtype=dtype)
