"""Which keys each query may attend to, as lists of key tiles: one form for packed, causal, sliding-tile and radial masks.

A mask has two halves. The tile lists name, for each tile of 128 queries, the tiles of 128 keys that it meets: first those
where every pair is allowed (full), then those where some are (partial). Inside a partial tile, query i may attend to key j where
    query_low[i] <= key_position[j] < query_high[i].
Positions are whatever the mask needs: a document's number, a frame's number. A key at position -1 is padding and meets nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries and keys of one tile. Every launch's tile sizes divide it.
MASK_TILE = 128
_LARGEST = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class TileMask:
    """Tile lists and intervals; M is 1 (all samples alike) or B. All tensors are int32, contiguous, on the device of q."""

    kind: str  # "packed", "block_causal", "sliding_tile", "radial" or "tiles": the name in the dispatch table and in messages
    key_tiles: Tensor  # [M, QT, KT] key tiles of each query tile: full ones, then partial ones; the rest is not read
    key_counts: Tensor  # [M, QT, 2] how many are full, and how many are full or partial
    query_tiles: Tensor  # [M, KT, QT] the transpose: query tiles of each key tile
    query_counts: Tensor  # [M, KT, 2]
    query_low: Tensor  # [M, L], not negative
    query_high: Tensor  # [M, L]; a query with an empty interval is padding: its output and gradients are 0
    key_position: Tensor  # [M, S]

    def __post_init__(self) -> None:
        samples, length, key_length = *self.query_low.shape, self.key_position.shape[-1]
        query_tiles, key_tiles = -(-length // MASK_TILE), -(-key_length // MASK_TILE)
        expected = (
            (samples, query_tiles, key_tiles),
            (samples, query_tiles, 2),
            (samples, key_tiles, query_tiles),
            (samples, key_tiles, 2),
            (samples, length),
            (samples, length),
            (samples, key_length),
        )
        tensors = self.tensors()
        fits = all(t.shape == shape for t, shape in zip(tensors, expected, strict=True))
        if not fits or not all(t.dtype == torch.int32 and t.is_contiguous() for t in tensors):
            given = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors)
            raise ValueError(
                f"TileMask: {given} must be {', '.join(str(list(shape)) for shape in expected)}, all int32 and contiguous"
            )

    def tensors(self) -> list[Tensor]:
        """The seven tensors in the order of the fields: what the operators take."""
        return [
            self.key_tiles,
            self.key_counts,
            self.query_tiles,
            self.query_counts,
            self.query_low,
            self.query_high,
            self.key_position,
        ]

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.kind, *(tensor.to(device) for tensor in self.tensors()))

    def dense(self) -> Tensor:
        """Which pairs are allowed: bool [M, L, S]."""
        return dense_mask(self.tensors())

    @property
    def density(self) -> float:
        """The share of tile pairs that is computed; reading it waits for the GPU."""
        return mask_density(self.tensors())


def dense_mask(mask: Sequence[Tensor]) -> Tensor:
    """Which pairs the seven tensors of a mask allow: bool [M, L, S]."""
    key_tiles, key_counts, _, _, query_low, query_high, key_position = mask
    count = key_tiles.shape[-1]
    is_listed = torch.arange(count, device=key_tiles.device) < key_counts[..., 1:]
    columns = torch.where(is_listed, key_tiles, count).long()  # what is not read lands in a column that is cut off
    tiles = is_listed.new_zeros(*key_tiles.shape[:-1], count + 1).scatter(-1, columns, True)[..., :count]
    pairs = tiles.repeat_interleave(MASK_TILE, 1).repeat_interleave(MASK_TILE, 2)
    position = key_position[:, None, :]
    inside = (query_low[..., None] <= position) & (position < query_high[..., None])
    return pairs[:, : query_low.shape[1], : key_position.shape[1]] & inside


def mask_density(mask: Sequence[Tensor]) -> float:
    """The share of tile pairs that the seven tensors of a mask list."""
    key_tiles, key_counts = mask[0], mask[1]
    return float(key_counts[..., 1].sum()) / max(key_tiles.numel(), 1)


def packed_mask(
    query_lengths: Tensor,
    key_lengths: Tensor | None = None,
    *,
    length: int | None = None,
    key_length: int | None = None,
) -> TileMask:
    """Documents one after another in a row; each query attends to the keys of its own document.

    Args:
        query_lengths: tokens of each document, integers [documents] or [B, documents]; 0 is allowed.
        key_lengths: keys of each document (its text), shaped alike; None is self-attention, with the queries' lengths.
        length: L. Queries after the last document are padding. None is the largest sum of lengths.
        key_length: S, likewise; for self-attention it is L.

    Lengths may live on a GPU. Nothing waits for them there if `length` (and `key_length`) are given; then their values are not
    checked, and what does not fit is cut off.

    Raises:
        ValueError: lengths that are no integers, negative, differently shaped or longer than the row, or an empty row.
    """
    if key_lengths is None and key_length is not None:
        raise ValueError(f"packed_mask: key_length={key_length} must come with key_lengths (self-attention has S = L)")
    if key_lengths is not None and key_lengths.shape != query_lengths.shape:
        raise ValueError(
            f"packed_mask: key_lengths {list(key_lengths.shape)} must be shaped like query_lengths {list(query_lengths.shape)}"
        )
    document = _documents("query_lengths", query_lengths, "length", length)  # [M, L]
    if key_lengths is None:
        position = document
    else:
        position = _documents("key_lengths", key_lengths, "key_length", key_length)  # [M, S]
    return build_mask("packed", document.clamp(min=0), document + 1, position)


def block_causal_mask(frames: int, tokens_per_frame: int, *, window: int | None = None) -> TileMask:
    """Each frame attends to itself and to all earlier frames, or to the last `window` earlier ones; M is 1, on the CPU.

    Raises:
        ValueError: fewer than one frame or token, or a negative window.
    """
    if frames < 1 or tokens_per_frame < 1:
        raise ValueError(
            f"block_causal_mask: frames={frames} and tokens_per_frame={tokens_per_frame} must be at least 1"
        )
    if window is not None and window < 0:
        raise ValueError(f"block_causal_mask: window={window} must be None or at least 0 earlier frames")
    frame = torch.arange(frames).repeat_interleave(tokens_per_frame)[None]  # [1, L]
    low = torch.zeros_like(frame) if window is None else (frame - window).clamp(min=0)
    return build_mask("block_causal", low, frame + 1, frame)


def tile_mask(allowed: Tensor, length: int, key_length: int) -> TileMask:
    """Whole tiles of 128 queries x 128 keys: `allowed` bool [QT, KT], or [B, QT, KT] for a map per sample.

    Raises:
        ValueError: a map that is not bool or does not have ceil(L / 128) x ceil(S / 128) tiles.
    """
    tiles = -(-length // MASK_TILE), -(-key_length // MASK_TILE)
    if allowed.dtype != torch.bool or allowed.dim() not in (2, 3) or allowed.shape[-2:] != tiles or 0 in tiles:
        raise ValueError(
            f"tile_mask: allowed {list(allowed.shape)} {allowed.dtype} must be bool [{tiles[0]}, {tiles[1]}] (or with a batch in"
            f" front) for L={length} and S={key_length}, both at least 1"
        )
    allowed = allowed if allowed.dim() == 3 else allowed[None]
    query, key = (allowed.new_zeros(allowed.shape[0], n, dtype=torch.int32) for n in (length, key_length))
    return build_mask("tiles", query, query + 1, key, allowed)


def build_mask(
    kind: str, query_low: Tensor, query_high: Tensor, key_position: Tensor, allowed_tiles: Tensor | None = None
) -> TileMask:
    """Sorts tile pairs into full, partial and empty from each tile's extremes, and lists them both ways.

    Takes integers [M, L], [M, L] and [M, S], and optionally bool [M, QT, KT] to remove tile pairs. A full tile is certain (a
    ragged last key tile and tiles with padding never are); a tile that is not listed is certainly empty.
    """
    low, high, position = (x.int().contiguous() for x in (query_low, query_high, key_position))
    is_query, is_key = low < high, position >= 0
    first_key, last_key = _tiled(position, -1).amin(-1), _tiled(position, -1).amax(-1)  # [M, KT], padding counted as -1
    first_real_key = _tiled(torch.where(is_key, position, _LARGEST), _LARGEST).amin(-1)
    # Rows beyond L agree with every key: what they would compute is never stored.
    highest_low, lowest_high = _tiled(low, 0).amax(-1), _tiled(high, _LARGEST).amin(-1)  # [M, QT]
    lowest_low = _tiled(torch.where(is_query, low, _LARGEST), _LARGEST).amin(-1)
    highest_high = _tiled(torch.where(is_query, high, 0), 0).amax(-1)

    full = (highest_low[..., None] <= first_key[:, None]) & (last_key[:, None] < lowest_high[..., None])  # [M, QT, KT]
    met = (lowest_low[..., None] <= last_key[:, None]) & (first_real_key[:, None] < highest_high[..., None])
    if allowed_tiles is not None:
        full, met = full & allowed_tiles, met & allowed_tiles
    rank = 2 - met.int() - full.int()  # 0 full, 1 partial, 2 empty
    return TileMask(kind, *_lists(rank), *_lists(rank.mT.contiguous()), low, high, position)


def _lists(rank: Tensor) -> tuple[Tensor, Tensor]:
    counts = torch.stack([(rank == 0).sum(-1), (rank < 2).sum(-1)], -1)
    return rank.argsort(dim=-1, stable=True).int(), counts.int()


def _tiled(x: Tensor, fill: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % MASK_TILE), value=fill).unflatten(-1, (-1, MASK_TILE))


def _documents(name: str, lengths: Tensor, total_name: str, total: int | None) -> Tensor:
    """The document of each token [M, total]; -1 after the last one."""
    is_integer = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if not is_integer or lengths.dim() not in (1, 2) or lengths.shape[-1] < 1:
        raise ValueError(
            f"packed_mask: {name} {list(lengths.shape)} {lengths.dtype} must be integers [documents] or [B, documents]"
        )
    lengths = lengths.long() if lengths.dim() == 2 else lengths.long()[None]
    ends = lengths.cumsum(-1)
    if total is None:
        total = max(ends[:, -1].tolist(), default=0)
    is_readable = lengths.device.type == "cpu"
    if is_readable and bool((lengths < 0).any()):
        raise ValueError(f"packed_mask: {name}={lengths.tolist()} must not be negative")
    if total < 1 or (is_readable and bool((ends[:, -1] > total).any())):
        raise ValueError(
            f"packed_mask: {total_name}={total} must be at least 1 and at least each sum of {name}={lengths.tolist()}"
        )
    tokens = torch.arange(total, device=lengths.device).repeat(len(lengths), 1)
    document = torch.searchsorted(ends, tokens, right=True)  # the first document that ends after the token
    return torch.where(document < lengths.shape[1], document, -1)
