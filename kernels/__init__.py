"""Triton kernels with their plain torch references. Public names are imported from here."""

from .attention import attention
from .attention_mask import TileMask, block_causal_mask, packed_mask, tile_mask
from .gated_residual import gated_residual
from .gelu import gelu_tanh
from .modulated_norm import modulated_norm, residual_affine_norm, residual_modulated_norm
from .norm_rope import Rope, build_packed_rope, build_rope, rms_norm_heads, rms_norm_rope
from .sparse_masks import TileOrder, radial_mask, sliding_tile_mask, tile_order

__all__ = [
    "Rope",
    "TileMask",
    "TileOrder",
    "attention",
    "block_causal_mask",
    "build_packed_rope",
    "build_rope",
    "gated_residual",
    "gelu_tanh",
    "modulated_norm",
    "packed_mask",
    "radial_mask",
    "residual_affine_norm",
    "residual_modulated_norm",
    "rms_norm_heads",
    "rms_norm_rope",
    "sliding_tile_mask",
    "tile_mask",
    "tile_order",
]
