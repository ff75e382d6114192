"""Static sparse masks over the tokens of a video: sliding 3-D tiles, with the token order they need, and radial bands."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .attention_mask import MASK_TILE, TileMask, build_mask

Grid = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True, eq=False)
class TileOrder:
    """Video tokens grouped by 3-D tile instead of raster order (frame, row, column).

    Each tile has a slot of equal length, a multiple of 128. Its tokens, in raster order, fill the slot from the front; tiles at
    the far borders may hold fewer. The rest of the slot is padding, which `sliding_tile_mask` hides.
    """

    places: Tensor  # [L] int64 where each raster token goes
    length: int  # L', the tokens of all slots

    def to_tiles(self, x: Tensor) -> Tensor:
        """x [B, L, ...] in raster order -> [B, L', ...] in tile order, with zeros as padding."""
        self._check("to_tiles", x, len(self.places))
        return x.new_zeros(x.shape[0], self.length, *x.shape[2:]).index_copy(1, self.places, x)

    def to_raster(self, x: Tensor) -> Tensor:
        """x [B, L', ...] in tile order -> [B, L, ...] in raster order; padding is dropped."""
        self._check("to_raster", x, self.length)
        return x.index_select(1, self.places)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.places.to(device), self.length)

    def _check(self, name: str, x: Tensor, length: int) -> None:
        if x.dim() < 2 or x.shape[1] != length or x.device != self.places.device:
            raise ValueError(
                f"TileOrder.{name}: x {list(x.shape)} on {x.device} must be [B, {length}, ...] on {self.places.device}"
            )


def tile_order(grid: Grid, tile: Grid) -> TileOrder:
    """The order that groups a (frames, rows, columns) grid of tokens into 3-D tiles of at most `tile` tokens, on the CPU.

    Few slots are wasted where a tile has nearly a multiple of 128 tokens: (3, 10, 4) has 120 and divides 21 x 30 x 52.

    Raises:
        ValueError: sizes below 1.
    """
    _check_sizes("tile_order", grid=grid, tile=tile)
    tile_number = torch.zeros(grid, dtype=torch.int64)
    inside = torch.zeros(grid, dtype=torch.int64)
    for axis, (tokens, extent) in enumerate(zip(grid, tile, strict=True)):
        shape = [-1 if i == axis else 1 for i in range(3)]
        coordinate = torch.arange(tokens)
        tile_number = tile_number * -(-tokens // extent) + (coordinate // extent).view(shape)
        first = coordinate // extent * extent
        own_extent = (tokens - first).clamp(max=extent)  # a border tile may be smaller
        inside = inside * own_extent.view(shape) + (coordinate - first).view(shape)
    slot = _slot_length(tile)
    return TileOrder((tile_number * slot + inside).flatten(), math.prod(_tile_counts(grid, tile)) * slot)


def sliding_tile_mask(grid: Grid, tile: Grid, window: Grid) -> TileMask:
    """Sliding Tile Attention (Zhang et al. 2025, arXiv:2502.04507) over tokens in the order of `tile_order(grid, tile)`.

    Each 3-D tile attends to a window of `window` tiles (frames, rows, columns) around it. Near a border the window keeps its
    size and stays inside the grid, so that every tile sees equally many. A window larger than the grid covers it. M is 1, on
    the CPU, with L = S = `tile_order(grid, tile).length`.

    Raises:
        ValueError: sizes below 1, or an even window that does not cover its axis (it would have no centre).
    """
    _check_sizes("sliding_tile_mask", grid=grid, tile=tile, window=window)
    counts = _tile_counts(grid, tile)
    if any(size % 2 == 0 and size < count for size, count in zip(window, counts, strict=True)):
        raise ValueError(
            f"sliding_tile_mask: window={window} must be odd on each axis, or at least the number of tiles there {counts}"
        )
    time, row, column = (_windowed(count, min(size, count)) for count, size in zip(counts, window, strict=True))
    allowed = time[:, None, None, :, None, None] & row[:, None, None, :, None] & column[:, None, None, :]
    allowed = allowed.reshape(math.prod(counts), math.prod(counts))

    parts = _slot_length(tile) // MASK_TILE
    order = tile_order(grid, tile)
    is_token = torch.zeros(1, order.length, dtype=torch.int32)
    is_token[0, order.places] = 1
    allowed = allowed.repeat_interleave(parts, 0).repeat_interleave(parts, 1)
    return build_mask("sliding_tile", torch.zeros_like(is_token), is_token, is_token - 1, allowed[None])


def radial_mask(grid: Grid, *, width: float = 1.0) -> TileMask:
    """Radial Attention (Li et al. 2025, arXiv:2506.19852) over a (frames, rows, columns) grid in raster order, by whole tiles.

    The paper's rule for a query at place k of frame i and a key at place l of frame j, with s places in a frame, d = |i - j| and
    the band w = width * s / 2^floor(log2 d), which halves each time the distance doubles (the paper has width = 1):
        j = 0: allowed (the attention sink)
        d <= 1: allowed
        |k - l| + 1 <= w: allowed
        w < 1: allowed where k = l and d is a multiple of ceil(1 / w)
    A tile of 128 tokens takes the token's part here. Cut each tile at the frames' borders into pieces, whose place is their
    middle. A tile pair is computed, in full, where any of their pieces meet by
        j = 0, d <= 1, or w >= 128 and |k - l| + 1 <= w, or
        w < 128, the pieces have places in common, and d is a multiple of ceil(128 / w).
    M is 1, on the CPU.

    Raises:
        ValueError: sizes below 1, or a width that is not positive.
    """
    _check_sizes("radial_mask", grid=grid)
    if not 0 < width < math.inf:
        raise ValueError(f"radial_mask: width={width} must be positive and finite")
    places = grid[1] * grid[2]
    length = grid[0] * places
    first = torch.cat([torch.arange(0, length, MASK_TILE), torch.arange(0, length, places)]).unique()  # [pieces]
    last = torch.cat([first[1:], torch.tensor([length])]) - 1
    frame, tile = first // places, first // MASK_TILE
    begin, end = first - frame * places, last - frame * places
    distance = (frame[:, None] - frame).abs()  # [pieces, pieces]
    octave = torch.tensor([max(d, 1).bit_length() - 1 for d in range(grid[0])])
    band = (width * places / 2.0**octave)[distance]

    middle = (begin + end) / 2
    in_band = (band >= MASK_TILE) & ((middle[:, None] - middle).abs() + 1 <= band)
    overlaps = (begin[:, None] <= end) & (begin <= end[:, None])
    in_sample = (band < MASK_TILE) & overlaps & (distance % torch.ceil(MASK_TILE / band).long() == 0)
    meets = (frame == 0) | (distance <= 1) | in_band | in_sample

    tiles = -(-length // MASK_TILE)
    allowed = torch.zeros(tiles, tiles, dtype=torch.bool)
    query, key = meets.nonzero(as_tuple=True)
    allowed[tile[query], tile[key]] = True
    position = torch.zeros(1, length, dtype=torch.int32)
    return build_mask("radial", position, position + 1, position, allowed[None])


def _windowed(count: int, window: int) -> Tensor:
    """bool [count, count]: the tiles in a window of fixed size around each tile of one axis."""
    tile = torch.arange(count)
    start = (tile - window // 2).clamp(0, count - window)[:, None]
    return (start <= tile) & (tile < start + window)


def _tile_counts(grid: Grid, tile: Grid) -> Grid:
    frames, rows, columns = (-(-tokens // extent) for tokens, extent in zip(grid, tile, strict=True))
    return frames, rows, columns


def _slot_length(tile: Grid) -> int:
    return -(-math.prod(tile) // MASK_TILE) * MASK_TILE


def _check_sizes(function: str, **sizes: Grid) -> None:
    for name, size in sizes.items():
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"{function}: {name}={size} must be (frames, rows, columns), each at least 1")
