"""Triton kernels with their plain torch references. Public names are imported from here."""

from .attention import attention
from .attention_mask import TileMask, block_causal_mask, packed_mask, tile_mask
from .sparse_masks import TileOrder, radial_mask, sliding_tile_mask, tile_order

__all__ = [
    "TileMask",
    "TileOrder",
    "attention",
    "block_causal_mask",
    "packed_mask",
    "radial_mask",
    "sliding_tile_mask",
    "tile_mask",
    "tile_order",
]
