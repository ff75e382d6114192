"""Where the video tokens of a clip lie, and which of them attend to each other in self-attention."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any, Self

import torch

from ..kernels import (
    Rope,
    TileMask,
    TileOrder,
    block_causal_mask,
    build_packed_rope,
    build_rope,
    packed_mask,
    radial_mask,
    sliding_tile_mask,
    tile_order,
)

Grid = tuple[int, int, int]  # tokens along frames, rows and columns


class AttentionPattern(Enum):
    full = "full"  # every token attends to every token, as in Wan
    block_causal = "block_causal"  # a frame attends to itself and to earlier frames
    sliding_tile = "sliding_tile"  # 3-D tiles attend to the tiles around them (arXiv:2502.04507)
    radial = "radial"  # fewer places the further away in time (arXiv:2506.19852)


@dataclass
class SelfAttentionConfig:
    """The pattern of self-attention. All but `full` differ from the public models, which attend to everything."""

    pattern: AttentionPattern = AttentionPattern.full
    # block_causal: how many earlier token frames a frame sees; null is all of them.
    earlier_frames: int | None = None
    # sliding_tile: tokens of a tile along frames, rows and columns; little is wasted near a multiple of 128 in all.
    tile: list[int] = field(default_factory=lambda: [3, 10, 4])
    # sliding_tile: tiles of the window along each axis; odd, or at least as many as there are.
    window: list[int] = field(default_factory=lambda: [3, 3, 5])
    # radial: width of the bands, relative to the paper's.
    radial_width: float = 1.0

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules."""
        found = []
        if self.earlier_frames is not None and self.earlier_frames < 0:
            found.append(f"{field}.earlier_frames={self.earlier_frames} must be null (all) or 0 or more")
        for name in ("tile", "window"):
            sizes = getattr(self, name)
            if len(sizes) != 3 or min(sizes, default=0) < 1:
                found.append(
                    f"{field}.{name}={list(sizes)} must be three numbers of at least 1 (frames, rows, columns)"
                )
        if not 0 < self.radial_width < float("inf"):
            found.append(f"{field}.radial_width={self.radial_width} must be positive and finite")
        return found

    def to_json(self) -> dict[str, Any]:
        """What a model's config.json holds of it."""
        return {**asdict(self), "pattern": self.pattern.name}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Read what `to_json` wrote; nothing at all is full attention. ValueError for a pattern that does not exist."""
        name = content.get("pattern", AttentionPattern.full.name)
        if name not in AttentionPattern.__members__:
            raise ValueError(
                f"config.json: self_attention.pattern={name!r} must be one of {', '.join(AttentionPattern.__members__)}"
            )
        return cls(**{**content, "pattern": AttentionPattern[name]})


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Rotary positions of the tokens, which of them and which text tokens they may attend to, and their order."""

    rope: Rope
    mask: TileMask | None = None  # None: all video tokens
    text_mask: TileMask | None = None  # None: all text tokens
    order: TileOrder | None = None  # None: raster order, frame by frame


def token_layout(config: SelfAttentionConfig, grid: Grid, head_dim: int, device: torch.device) -> TokenLayout:
    """The layout of a grid of tokens. Raises ValueError for a window that does not suit the grid."""
    return _layout(
        config.pattern,
        config.earlier_frames,
        _three(config.tile),
        _three(config.window),
        config.radial_width,
        grid,
        head_dim,
        device,
    )


def packed_layout(
    grids: Sequence[Grid], text_lengths: Sequence[int], *, positions: int, head_dim: int, device: torch.device
) -> TokenLayout:
    """The layout of clips one after another in a row, each attending to itself and to its own text tokens.

    `positions` bounds the tokens along any axis, as the model's `rope_max_seq_len` does.
    """
    coordinates = torch.cat([torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3) for grid in grids])  # [L, 3]
    lengths = torch.tensor([math.prod(grid) for grid in grids])
    return TokenLayout(
        build_packed_rope(coordinates, positions=positions, head_width=head_dim, device=device),
        mask=packed_mask(lengths).to(device),
        text_mask=packed_mask(lengths, torch.tensor(text_lengths)).to(device),
    )


def _three(sizes: list[int]) -> Grid:
    frames, rows, columns = sizes
    return frames, rows, columns


# Cached, because a run sees a handful of grids and every step of every block uses the same layout.
@lru_cache(maxsize=8)
def _layout(
    pattern: AttentionPattern,
    earlier_frames: int | None,
    tile: Grid,
    window: Grid,
    radial_width: float,
    grid: Grid,
    head_dim: int,
    device: torch.device,
) -> TokenLayout:
    # Tensors born under inference mode (sampling between two training steps) could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        rope, mask, order = build_rope(*grid, head_width=head_dim, device=device), None, None
        if pattern is AttentionPattern.block_causal:
            mask = block_causal_mask(grid[0], grid[1] * grid[2], window=earlier_frames)
        elif pattern is AttentionPattern.sliding_tile:
            mask, order = sliding_tile_mask(grid, tile, window), tile_order(grid, tile).to(device)
            rope = Rope(rope.table, order.to_tiles(rope.coordinates[None])[0], rope.axis_pairs)
        elif pattern is AttentionPattern.radial:
            mask = radial_mask(grid, width=radial_width)
        return TokenLayout(rope, mask=None if mask is None else mask.to(device), order=order)
