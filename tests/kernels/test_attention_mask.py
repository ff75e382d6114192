"""Masks: each builder against its rule written out per token, and the tile lists against the pairs they stand for."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muybridge.kernels.attention_mask import (
    MASK_TILE,
    TileMask,
    block_causal_mask,
    build_mask,
    packed_mask,
    tile_mask,
)
from muybridge.kernels.sparse_masks import radial_mask, sliding_tile_mask, tile_order

GRID_480P = (21, 30, 52)  # 81 frames of 480 x 832 pixels: 32 760 tokens


def pairs(length: int, key_length: int, is_allowed: Callable[[int, int], bool]) -> Tensor:
    return torch.tensor([[is_allowed(i, j) for j in range(key_length)] for i in range(length)])


def tiles_of(allowed: Tensor, fill: bool) -> Tensor:
    """[M, L, S] -> [M, QT, KT, 128 * 128], with `fill` in the places beyond L; there is nothing beyond S."""
    samples, length, key_length = allowed.shape
    rows, columns = -length % MASK_TILE, -key_length % MASK_TILE
    allowed = torch.cat([allowed, allowed.new_full((samples, rows, key_length), fill)], 1)
    allowed = torch.cat([allowed, allowed.new_zeros(samples, length + rows, columns)], 2)
    return allowed.unflatten(2, (-1, MASK_TILE)).unflatten(1, (-1, MASK_TILE)).transpose(2, 3).flatten(3)


def check_lists(tiles: Tensor, counts: Tensor, full: Tensor, met: Tensor, exact: bool) -> None:
    """The lists of one direction: full tiles first, then the others that hold a pair, each part in ascending order.

    Where the extremes of a tile tell all (`exact`), a tile without pairs is not listed.
    """
    for sample, row in itertools.product(range(tiles.shape[0]), range(tiles.shape[1])):
        full_count, count = counts[sample, row].tolist()
        listed = tiles[sample, row].tolist()
        first, second = listed[:full_count], listed[full_count:count]
        assert first == full[sample, row].nonzero().flatten().tolist()
        assert second == sorted(set(second) - set(first))
        needed = set(met[sample, row].nonzero().flatten().tolist())
        assert needed == set(first + second) if exact else needed <= set(first + second)


def check(mask: TileMask, expected: Tensor, *, exact: bool = True) -> None:
    """`mask` allows the pairs of `expected` [M, L, S], and its lists in both directions stand for them."""
    assert torch.equal(mask.dense(), expected)
    full, met = tiles_of(expected, True).all(-1), tiles_of(expected, False).any(-1)
    full &= met  # a tile of only padding rows is none
    check_lists(mask.key_tiles, mask.key_counts, full, met, exact)
    check_lists(mask.query_tiles, mask.query_counts, full.mT, met.mT, exact)
    listed = [
        {
            (sample, *pair[::order])
            for sample, row in itertools.product(range(tiles.shape[0]), range(tiles.shape[1]))
            for pair in ((row, column) for column in tiles[sample, row, : counts[sample, row, 1]].tolist())
        }
        for tiles, counts, order in (
            (mask.key_tiles, mask.key_counts, 1),
            (mask.query_tiles, mask.query_counts, -1),
        )
    ]
    assert listed[0] == listed[1]
    assert mask.density == len(listed[0]) / full.numel()


def owners(lengths: list[int], total: int) -> list[int]:
    tokens = [document for document, count in enumerate(lengths) for _ in range(count)]
    return tokens + [-1] * (total - len(tokens))


@pytest.mark.parametrize(
    ("lengths", "total"),
    [([1], 1), ([17, 63, 129], 209), ([0, 130, 0, 0, 5, 0], 135), ([128, 128], 256), ([100, 28, 1], 300), ([0, 0], 3)],
)
def test_packed_documents_attend_to_themselves(lengths: list[int], total: int) -> None:
    document = owners(lengths, total)
    expected = pairs(total, total, lambda i, j: document[i] == document[j] >= 0)
    mask = packed_mask(torch.tensor(lengths), length=total)
    check(mask, expected[None])
    if sum(lengths) == total:
        assert torch.equal(packed_mask(torch.tensor(lengths)).dense(), mask.dense())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_cross_attention_reads_its_own_text(dtype: torch.dtype) -> None:
    lengths, text = [[140, 0, 60], [30, 100, 1]], [[20, 7, 0], [130, 1, 2]]
    mask = packed_mask(torch.tensor(lengths, dtype=dtype), torch.tensor(text, dtype=dtype), length=210, key_length=140)
    expected = []
    for query_lengths, key_lengths in zip(lengths, text, strict=True):
        query, key = owners(query_lengths, 210), owners(key_lengths, 140)
        expected.append(pairs(210, 140, lambda i, j, query=query, key=key: query[i] == key[j] >= 0))  # type: ignore[misc]
    check(mask, torch.stack(expected))


@pytest.mark.parametrize("window", [None, 0, 1, 2, 9])
@pytest.mark.parametrize(("frames", "tokens"), [(1, 5), (5, 60), (3, 128), (7, 37)])
def test_frames_attend_to_earlier_frames(frames: int, tokens: int, window: int | None) -> None:
    reach = frames if window is None else window
    length = frames * tokens
    expected = pairs(length, length, lambda i, j: 0 <= i // tokens - j // tokens <= reach)
    check(block_causal_mask(frames, tokens, window=window), expected[None])


def sliding_window(tile: int, count: int, window: int) -> set[int]:
    """The `window` tiles of an axis with the smallest distance from a centre that keeps them all inside."""
    window = min(window, count)
    starts = range(count - window + 1)
    start = min(starts, key=lambda first: abs(first + (window - 1) / 2 - tile))
    return set(range(start, start + window))


@pytest.mark.parametrize(
    ("grid", "tile", "window"),
    [
        ((4, 4, 6), (2, 2, 2), (1, 1, 3)),
        ((5, 7, 3), (2, 3, 2), (3, 1, 5)),  # borders with smaller tiles
        ((4, 12, 12), (2, 12, 6), (1, 3, 1)),  # 144 tokens in a slot of 256
        ((1, 3, 3), (1, 1, 1), (1, 3, 3)),
        ((4, 2, 2), (1, 2, 2), (4, 1, 1)),  # an even window that covers its axis
    ],
)
def test_sliding_tiles_attend_to_a_window_of_tiles(
    grid: tuple[int, int, int], tile: tuple[int, int, int], window: tuple[int, int, int]
) -> None:
    order, mask = tile_order(grid, tile), sliding_tile_mask(grid, tile, window)
    counts = [math.ceil(tokens / extent) for tokens, extent in zip(grid, tile, strict=True)]
    coordinates = list(itertools.product(*(range(tokens) for tokens in grid)))
    windows = [
        [sliding_window(i, count, size) for i in range(count)] for count, size in zip(counts, window, strict=True)
    ]

    def is_allowed(i: int, j: int) -> bool:
        return all(
            key // extent in seen[query // extent]
            for query, key, extent, seen in zip(coordinates[i], coordinates[j], tile, windows, strict=True)
        )

    raster = pairs(len(coordinates), len(coordinates), is_allowed)
    expected = torch.zeros(order.length, order.length, dtype=torch.bool)
    expected[order.places[:, None], order.places] = raster
    check(mask, expected[None])
    if all(tokens % extent == 0 for tokens, extent in zip(grid, tile, strict=True)):
        seen = raster.sum(1)
        assert (seen == math.prod(min(w, c) for w, c in zip(window, counts, strict=True)) * math.prod(tile)).all()


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 2, 2), (3, 4, 2), (2, 12, 6), (9, 9, 9)])
def test_tile_order_groups_tokens_and_comes_back(tile: tuple[int, int, int]) -> None:
    grid = (5, 12, 7)
    order = tile_order(grid, tile)
    x = torch.arange(1.0, 1 + math.prod(grid)).repeat(2, 1)[..., None].requires_grad_()
    tiled = order.to_tiles(x)
    assert tiled.shape == (2, order.length, 1)
    assert order.length % MASK_TILE == 0
    assert torch.equal(order.to_raster(tiled), x)
    (grad,) = torch.autograd.grad(order.to_raster(tiled).square().sum(), [x])
    assert torch.equal(grad, 2 * x)

    counts = [math.ceil(tokens / extent) for tokens, extent in zip(grid, tile, strict=True)]
    raster = x.detach()[0, :, 0].view(grid)
    for slot, (t, h, w) in zip(
        tiled.detach()[0, :, 0].view(math.prod(counts), -1), itertools.product(*map(range, counts)), strict=True
    ):
        part = raster[t * tile[0] : (t + 1) * tile[0], h * tile[1] : (h + 1) * tile[1], w * tile[2] : (w + 1) * tile[2]]
        assert torch.equal(slot[: part.numel()], part.flatten())
        assert not slot[part.numel() :].any()


@pytest.mark.parametrize(
    ("grid", "width"),
    [((9, 8, 16), 1.0), ((20, 5, 8), 1.0), ((9, 10, 30), 1.0), ((9, 10, 30), 0.4), ((3, 4, 4), 1.0), ((1, 9, 17), 2.0)],
)
def test_radial_bands_halve_as_the_distance_doubles(grid: tuple[int, int, int], width: float) -> None:
    frames, places = grid[0], grid[1] * grid[2]
    length = frames * places
    pieces: dict[int, list[tuple[int, int, int]]] = {}  # per tile: frame, first and last place
    for frame in range(frames):
        for tile, tokens in itertools.groupby(range(frame * places, (frame + 1) * places), lambda i: i // MASK_TILE):
            inside = [token - frame * places for token in tokens]
            pieces.setdefault(tile, []).append((frame, inside[0], inside[-1]))

    def meet(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
        distance = abs(query[0] - key[0])
        if key[0] == 0 or distance <= 1:
            return True
        band = width * places / 2 ** math.floor(math.log2(distance))
        if band >= MASK_TILE:
            return abs(sum(query[1:]) / 2 - sum(key[1:]) / 2) + 1 <= band
        return max(query[1], key[1]) <= min(query[2], key[2]) and distance % math.ceil(MASK_TILE / band) == 0

    allowed = pairs(
        len(pieces), len(pieces), lambda i, j: any(itertools.starmap(meet, itertools.product(pieces[i], pieces[j])))
    )
    expected = allowed.repeat_interleave(MASK_TILE, 0).repeat_interleave(MASK_TILE, 1)[:length, :length]
    check(radial_mask(grid, width=width), expected[None])


def test_radial_density_is_near_that_of_the_rule_per_token() -> None:
    frames, places = 21, 1560
    allowed = 0
    for i, j in itertools.product(range(frames), repeat=2):
        band = min(places / 2 ** math.floor(math.log2(max(abs(i - j), 1))), places)
        whole = j == 0 or abs(i - j) <= 1
        allowed += places**2 if whole else places**2 - (places - int(band)) * (places - int(band) + 1)
    assert radial_mask(GRID_480P).density == pytest.approx(allowed / (frames * places) ** 2, rel=0.06)


@pytest.mark.parametrize(
    ("build", "density"),
    [
        (lambda: packed_mask(torch.tensor([10_000, 20_000, 2_760])), 0.479),
        (lambda: block_causal_mask(21, 30 * 52), 0.527),
        (lambda: block_causal_mask(21, 30 * 52, window=3), 0.183),
        (lambda: sliding_tile_mask(GRID_480P, (3, 10, 4), (3, 3, 3)), 27 / (7 * 3 * 13)),
        (lambda: radial_mask(GRID_480P), 0.534),
        (lambda: radial_mask(GRID_480P, width=0.5), 0.361),
    ],
)
def test_density_of_a_480p_video(build: Callable[[], TileMask], density: float) -> None:
    assert build().density == pytest.approx(density, abs=5e-4)


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)])
def test_tile_map_is_taken_as_it_is(shape: tuple[int, ...]) -> None:
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    expected = torch.kron(allowed.view(-1, 2, 3).int(), torch.ones(1, MASK_TILE, MASK_TILE, dtype=torch.int32)).bool()
    check(tile_mask(allowed, 200, 300), expected[:, :200, :300])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_intervals_and_tile_maps_are_sorted_into_tiles(data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, 2))
    length, key_length = (data.draw(st.sampled_from([1, 17, 127, 128, 129, 300])) for _ in range(2))
    seed = data.draw(st.integers(0, 10_000))
    step = data.draw(st.sampled_from([1, 20, 128, 300]))  # tokens with the same numbers: long runs make full tiles
    highest = data.draw(st.sampled_from([1, 3]))
    generator = torch.Generator().manual_seed(seed)

    def numbers(low: int, count: int) -> Tensor:
        runs = torch.randint(low, highest, (samples, -(-count // step)), generator=generator)
        return runs.repeat_interleave(step, 1)[:, :count]

    low, position = numbers(0, length), numbers(-1, key_length)
    high = low + numbers(0, length)
    shape = (samples, -(-length // MASK_TILE), -(-key_length // MASK_TILE))
    allowed = torch.rand(shape, generator=generator) < 0.7 if data.draw(st.booleans()) else None
    expected = (low[..., None] <= position[:, None]) & (position[:, None] < high[..., None])
    if allowed is not None:
        blocks = allowed.repeat_interleave(MASK_TILE, 1).repeat_interleave(MASK_TILE, 2)
        expected &= blocks[:, :length, :key_length]
    check(build_mask("tiles", low, high, position, allowed), expected, exact=False)


def test_the_rest_of_a_list_is_not_read() -> None:
    mask = block_causal_mask(4, 128)
    rubbish = torch.full_like(mask.key_tiles, -7)
    count = torch.arange(4)[None, None]
    edited = dataclasses.replace(mask, key_tiles=torch.where(count < mask.key_counts[..., 1:], mask.key_tiles, rubbish))
    assert torch.equal(edited.dense(), mask.dense())


def test_no_sample_needs_no_mask() -> None:
    mask = packed_mask(torch.zeros(0, 2, dtype=torch.int64), length=5)
    assert mask.dense().shape == (0, 5, 5)
    assert mask.density == 0


def test_a_mask_moves_as_a_whole() -> None:
    mask = block_causal_mask(2, 5).to("meta")
    assert {t.device.type for t in mask.tensors()} == {"meta"}
    assert tile_order((2, 3, 4), (1, 2, 2)).to("meta").places.is_meta


def test_tensors_come_in_the_order_of_the_fields() -> None:
    mask = block_causal_mask(2, 5)
    names = [field.name for field in dataclasses.fields(TileMask)][1:]
    assert all(a is getattr(mask, name) for a, name in zip(mask.tensors(), names, strict=True))


def lengths(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: packed_mask(lengths(3, -1)), r"query_lengths=\[\[3, -1\]\] must not be negative"),
        (lambda: packed_mask(lengths(3, 4), length=6), r"length=6 must be .* each sum of query_lengths=\[\[3, 4\]\]"),
        (lambda: packed_mask(lengths(0, 0)), "length=0 must be at least 1"),
        (lambda: packed_mask(torch.tensor([])), r"query_lengths \[0\] torch.float32 must be integers"),
        (lambda: packed_mask(lengths(3, 4).float()), "torch.float32 must be integers"),
        (lambda: packed_mask(lengths(3, 4), key_length=9), "key_length=9 must come with key_lengths"),
        (lambda: packed_mask(lengths(3, 4), lengths(3)), r"key_lengths \[1\] must be shaped like query_lengths \[2\]"),
        (
            lambda: packed_mask(lengths(3), lengths(9), key_length=8),
            r"key_length=8 .* each sum of key_lengths=\[\[9\]\]",
        ),
        (lambda: block_causal_mask(0, 5), "frames=0 and tokens_per_frame=5 must be at least 1"),
        (lambda: block_causal_mask(2, 5, window=-1), "window=-1 must be None or at least 0"),
        (lambda: tile_mask(torch.ones(2, 2), 200, 200), r"torch.float32 must be bool \[2, 2\]"),
        (lambda: tile_mask(torch.ones(2, 2) > 0, 300, 200), r"allowed \[2, 2\] .* must be bool \[3, 2\]"),
        (lambda: tile_order((2, 0, 2), (1, 1, 1)), r"grid=\(2, 0, 2\) must be \(frames, rows, columns\)"),
        (lambda: sliding_tile_mask((2, 2, 2), (1, 1, 0), (1, 1, 1)), r"tile=\(1, 1, 0\) must be"),
        (lambda: sliding_tile_mask((9, 2, 2), (1, 1, 1), (2, 1, 1)), r"window=\(2, 1, 1\) must be odd .* \(9, 2, 2\)"),
        (lambda: radial_mask((2, 2, 2), width=0.0), "width=0.0 must be positive"),
        (lambda: radial_mask((2, 2, 0)), r"grid=\(2, 2, 0\)"),
        (lambda: tile_order((2, 3, 4), (2, 2, 2)).to_tiles(torch.zeros(1, 23, 5)), r"\[1, 23, 5\].*\[B, 24, ...\]"),
        (lambda: tile_order((2, 3, 4), (2, 2, 2)).to_raster(torch.zeros(1, 24)), r"\[1, 24\].*\[B, 512, ...\]"),
        (
            lambda: dataclasses.replace(block_causal_mask(2, 5), query_low=torch.zeros(1, 9, dtype=torch.int32)),
            r"TileMask: .* must be \[1, 1, 1\].* \[1, 9\], \[1, 9\], \[1, 10\], all int32",
        ),
        (
            lambda: dataclasses.replace(block_causal_mask(2, 5), key_position=torch.zeros(1, 10)),
            r"\[1, 10\] torch.float32 must be",
        ),
    ],
)
def test_wrong_requests_are_named(build: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build()
