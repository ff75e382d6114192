"""Which keys each query may attend to, as lists of key tiles: one form for packed, causal, sliding-tile and radial masks.

A mask has two halves. The tile lists name, for each tile of 128 queries, the tiles of 128 keys that it meets: first those
where every pair is allowed (full), then those where some are (partial). Inside a partial tile, query i may attend to key j where
    query_low[i] <= key_position[j] < query_high[i].
Positions are whatever the mask needs: a document's number, a frame's number. A key at position -1 is padding and meets nobody.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TileMask:
    """Tile lists and intervals; M is 1 (all samples alike) or B. All tensors are int32 on the device of q."""

    kind: str  # "packed", "block_causal", "sliding_tile", "radial" or "tiles": the name in the dispatch table and in messages
    key_tiles: Tensor  # [M, QT, KT] key tiles of each query tile: full ones, then partial ones; the rest is not read
    key_counts: Tensor  # [M, QT, 2] how many are full, and how many are full or partial
    query_tiles: Tensor  # [M, KT, QT] the transpose: query tiles of each key tile
    query_counts: Tensor  # [M, KT, 2]
    query_low: Tensor  # [M, L]
    query_high: Tensor  # [M, L]
    key_position: Tensor  # [M, S]
