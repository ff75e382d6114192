"""Attention's backward kernels in Triton's interpreter, called directly: both forms, every way to load, dense and masked.

The masks here are made by hand from intervals and positions, and their tile lists by looking at every pair. The forward pass is
plain fp64 arithmetic, so that only the backward kernels are under test.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from muybridge.kernels.attention_backward import run_backward
from muybridge.kernels.attention_backward_launches import Launches, choose_launches
from muybridge.kernels.attention_mask import MASK_TILE
from muybridge.kernels.attention_tiles import Launch, MaskTensors

NAMES = ("grad_q", "grad_k", "grad_v")
FORMS = [
    pytest.param(hopper, deterministic, id=f"{loads}-{form}")
    for hopper, loads in ((False, "pointers"), (True, "descriptors"))
    for deterministic, form in ((True, "deterministic"), (False, "fused"))
]


@dataclasses.dataclass(frozen=True)
class Mask:
    tensors: MaskTensors
    allowed: Tensor  # [M, L, S] bool


def make_mask(query_low: Tensor, query_high: Tensor, key_position: Tensor) -> Mask:
    """From query_low and query_high [M, L] and key_position [M, S], in which -1 is padding."""
    position = key_position[:, None]
    allowed = (query_low[..., None] <= position) & (position < query_high[..., None])
    masks, query_length, key_length = allowed.shape
    query_tiles, key_tiles = -(-query_length // MASK_TILE), -(-key_length // MASK_TILE)
    some = torch.zeros(masks, query_tiles, key_tiles, dtype=torch.bool)
    every = torch.zeros_like(some)
    for i in range(query_tiles):
        for j in range(key_tiles):
            tile = allowed[:, i * MASK_TILE : (i + 1) * MASK_TILE, j * MASK_TILE : (j + 1) * MASK_TILE]
            some[:, i, j] = tile.any((-1, -2))
            every[:, i, j] = tile.all(-1).all(-1) & (tile.shape[-1] == MASK_TILE)
    of_queries, of_keys = list_tiles(every, some), list_tiles(every.mT, some.mT)
    intervals = (x.int() for x in (query_low, query_high, key_position))
    return Mask(MaskTensors(*of_queries, *of_keys, *intervals), allowed)


def list_tiles(every: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Full tiles, partial tiles, then numbers that no kernel may read; and the counts."""
    lists = torch.full(some.shape, 10**6, dtype=torch.int32)
    counts = torch.stack([every.sum(-1), some.sum(-1)], -1).int()
    for index in torch.cartesian_prod(*map(torch.arange, some.shape[:2])).tolist():
        m, i = index
        full, partial = every[m, i].nonzero()[:, 0], (some[m, i] & ~every[m, i]).nonzero()[:, 0]
        lists[m, i, : len(full) + len(partial)] = torch.cat([full, partial]).int()
    return lists, counts


def documents(query_lengths: Sequence[Sequence[int]], key_lengths: Sequence[Sequence[int]]) -> Mask:
    """Queries meet the keys of their own document; a document may lack either. One inner sequence a sample."""
    queries, keys = (
        torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
        for lengths in (query_lengths, key_lengths)
    )
    return make_mask(queries, queries + 1, keys)


def block_causal(frames: int, tokens: int) -> Mask:
    """Queries meet the keys of their own and earlier frames."""
    frame = torch.arange(frames).repeat_interleave(tokens)[None]
    return make_mask(torch.zeros_like(frame), frame + 1, frame)


def padded_keys() -> Mask:
    """The last 150 of 390 keys, and 20 in the middle, are padding; the second query tile may attend to nothing."""
    position = torch.zeros(1, 390, dtype=torch.long)
    position[:, 240:] = -1
    position[:, 100:120] = -1
    high = torch.ones(1, 300, dtype=torch.long)
    high[:, 128:256] = 0
    return make_mask(torch.zeros(1, 300, dtype=torch.long), high, position)


MASKS: dict[str, Callable[[], Mask]] = {
    "one mask": lambda: documents([[130, 170]], [[260, 130]]),
    "a mask a sample": lambda: documents([[130, 0, 170], [40, 200, 60]], [[0, 130, 260], [256, 34, 100]]),
    "block-causal": lambda: block_causal(5, 70),
    "padding": padded_keys,
}


def plain_backward(inputs: list[Tensor], allowed: Tensor, scale: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-sum-exp to base 2, and gradients by autograd, in the inputs' dtype; inputs are grad_out, q, k and v."""
    grad_out, *rest = inputs
    leaves = [x.detach().requires_grad_() for x in rest]
    scores = leaves[0] @ leaves[1].mT * scale
    scores = scores.masked_fill(~allowed[:, None], torch.finfo(grad_out.dtype).min)
    out = (torch.softmax(scores, -1) * allowed[:, None]) @ leaves[2]
    lse = torch.logsumexp(scores.detach(), -1) / math.log(2)
    lse = torch.where(allowed.any(-1)[:, None], lse, math.inf)
    return out.detach(), lse, list(torch.autograd.grad(out, leaves, grad_out))


def normals(batch: int, heads: int, query_length: int, key_length: int, head_width: int) -> list[Tensor]:
    """grad_out, q, k and v in fp64."""
    generator = torch.Generator().manual_seed(query_length + key_length + head_width)
    lengths = (query_length, query_length, key_length, key_length)
    return [torch.randn(batch, heads, n, head_width, generator=generator, dtype=torch.float64) for n in lengths]


def run(
    inputs: list[Tensor],
    out: Tensor,
    lse: Tensor,
    dtype: torch.dtype,
    launches: Launches,
    *,
    mask: Mask | None = None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, q, k, v = (x.to(dtype) for x in inputs)
    tensors = mask.tensors if mask else ()
    deterministic = launches.grad_query is not None
    return run_backward(
        grad_out, q, k, v, out.to(dtype), lse.float(), tensors,
        scale=scale, deterministic=deterministic, launches=launches,
    )  # fmt: skip


def check(
    inputs: list[Tensor],
    dtype: torch.dtype,
    launches: Launches,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
) -> list[Tensor]:
    """Holds every gradient to twice the error of eager code in the same dtype, plus the floor of attention_cases.py."""
    inputs = [x.to(dtype).double() for x in inputs]
    _, q, k, _ = inputs
    query_length, key_length, head_width = q.shape[2], k.shape[2], q.shape[3]
    scale = head_width**-0.5 if scale is None else scale
    allowed = torch.ones(1, query_length, key_length, dtype=torch.bool) if mask is None else mask.allowed
    out, lse, exact = plain_backward(inputs, allowed, scale)
    _, _, eager = plain_backward([x.to(dtype) for x in inputs], allowed, scale)
    ours = run(inputs, out, lse, dtype, launches, mask=mask, scale=scale)
    largest_score = (q @ k.mT * scale).abs().max()
    growth = max(1, scale * max(query_length, key_length) ** 0.5)
    sums = 2 * torch.finfo(torch.float32).eps * (head_width**0.5 + largest_score) * growth
    for name, result, peer, truth in zip(NAMES, ours, eager, exact, strict=True):
        assert result.dtype == dtype
        assert result.transpose(1, 2).is_contiguous()
        floor = torch.finfo(dtype).eps * truth.abs().max() + sums
        error, limit = (result - truth).abs().max(), 2 * (peer - truth).abs().max() + floor
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"
    meets = allowed.expand(q.shape[0], -1, -1)
    for result, lonely in zip(ours, (~meets.any(2), ~meets.any(1), ~meets.any(1)), strict=True):
        assert (result.transpose(1, 2)[lonely] == 0).all(), "a query without keys, a key without queries: exactly 0"
    return list(ours)


def tables(head_width: int, *, hopper: bool, masked: bool, deterministic: bool) -> Launches:
    return choose_launches(torch.float16, head_width, hopper=hopper, masked=masked, deterministic=deterministic)


@pytest.mark.parametrize(("hopper", "deterministic"), FORMS)
@pytest.mark.parametrize(("query_length", "key_length"), [(1, 1), (17, 129), (129, 17), (130, 150)])
def test_dense_gradients_match_fp64(query_length: int, key_length: int, hopper: bool, deterministic: bool) -> None:
    launches = tables(32, hopper=hopper, masked=False, deterministic=deterministic)
    check(normals(1, 2, query_length, key_length, 32), torch.float16, launches)


@pytest.mark.parametrize(("hopper", "deterministic"), FORMS)
@pytest.mark.parametrize("name", MASKS)
def test_masked_gradients_match_fp64(name: str, hopper: bool, deterministic: bool) -> None:
    mask = MASKS[name]()
    _, query_length, key_length = mask.allowed.shape
    launches = tables(16, hopper=hopper, masked=True, deterministic=deterministic)
    check(normals(2, 1, query_length, key_length, 16), torch.float16, launches, mask=mask)


@pytest.mark.parametrize(("hopper", "deterministic"), FORMS)
@pytest.mark.parametrize("head_width", [48, 96, 128, 256])
def test_every_kind_of_head_width(head_width: int, hopper: bool, deterministic: bool) -> None:
    mask = documents([[30, 50]], [[100, 45]])
    launches = tables(head_width, hopper=hopper, masked=True, deterministic=deterministic)
    assert (launches.grad_query is None) == (not deterministic and head_width <= 128)
    check(normals(1, 1, 80, 145, head_width), torch.float16, launches, mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_full_precision(masked: bool) -> None:
    mask = documents([[30, 0, 20], [9, 30, 11]], [[0, 60, 85], [132, 0, 13]]) if masked else None
    launches = choose_launches(torch.float32, 16, hopper=False, masked=masked, deterministic=False)
    check(normals(2, 1, 50, 145, 16), torch.float32, launches, mask=mask)


@pytest.mark.parametrize(("hopper", "deterministic"), FORMS)
def test_scores_far_from_zero_leave_padded_keys_out(hopper: bool, deterministic: bool) -> None:
    grad_out, q, k, v = normals(1, 1, 33, 70, 16)
    launches = tables(16, hopper=hopper, masked=False, deterministic=deterministic)
    for sign in (1, -1):  # a key of zeros would weigh infinitely where all true scores are far below 0
        check([grad_out, q.abs() * 20 * sign, k.abs() * 20, v], torch.float32, launches)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=3),
    hopper=st.booleans(),
    deterministic=st.booleans(),
)
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
def test_any_documents(lengths: list[tuple[int, int]], hopper: bool, deterministic: bool) -> None:
    lengths = [*lengths, (1, 1)]
    mask = documents([[queries for queries, _ in lengths]], [[keys for _, keys in lengths]])
    launches = tables(16, hopper=hopper, masked=True, deterministic=deterministic)
    _, query_length, key_length = mask.allowed.shape
    check(normals(1, 1, query_length, key_length, 16), torch.float16, launches, mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_descriptors_and_pointers_load_the_same(masked: bool) -> None:
    mask = documents([[60, 90]], [[100, 45]]) if masked else None
    for fused in (False, True):
        described = Launch(32, 64, 4, 1, descriptors=True)
        pointers = dataclasses.replace(described, descriptors=False)
        first, second = (
            check(normals(1, 1, 150, 145, 16), torch.float16, Launches(None if fused else x, x), mask=mask)
            for x in (described, pointers)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("hopper", [False, True])
def test_every_tensor_has_strides_of_its_own(hopper: bool) -> None:
    """Four memory orders of [B, N, L, K], a transposed head width, and a gradient expanded from one row."""
    inputs = normals(2, 3, 20, 37, 16)
    grad_out, q, k, v = (x.half() for x in inputs)
    moved = [
        grad_out[..., :1, :].expand_as(grad_out),
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        v.mT.contiguous().mT,
    ]
    allowed = torch.ones(1, 20, 37, dtype=torch.bool)
    out, lse, _ = plain_backward([x.double() for x in moved], allowed, 0.25)
    launches = tables(16, hopper=hopper, masked=False, deterministic=True)
    first, second = (
        run(x, out, lse, torch.float16, launches, scale=0.25) for x in (moved, [x.contiguous() for x in moved])
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("hopper", [False, True])
def test_deterministic_form_repeats_bit_for_bit(hopper: bool) -> None:
    mask = documents([[60, 70]], [[100, 45]])
    launches = tables(16, hopper=hopper, masked=True, deterministic=True)
    first, second = (check(normals(1, 1, 130, 145, 16), torch.float16, launches, mask=mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
