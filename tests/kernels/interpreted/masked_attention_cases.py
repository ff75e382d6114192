"""Masked attention in Triton's interpreter, through the public function: every kind of mask against fp64 and a dense bool mask."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muybridge.kernels import (
    TileMask,
    attention,
    block_causal_mask,
    packed_mask,
    radial_mask,
    sliding_tile_mask,
    tile_mask,
)
from muybridge.kernels.dispatch import forced

NAMES = ("out", "grad_q", "grad_k", "grad_v")


def some_tiles() -> TileMask:
    """A row of tiles without keys, a column without queries, and ragged ends."""
    allowed = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    return tile_mask(allowed, 300, 390)


def texts_per_sample() -> TileMask:
    lengths = torch.tensor([[129, 0, 63, 5], [1, 17, 0, 150]])
    texts = torch.tensor([[17, 30, 0, 128], [63, 129, 1, 2]])
    return packed_mask(lengths, texts, length=200, key_length=201)


MASKS: dict[str, Callable[[], TileMask]] = {
    "packed": lambda: packed_mask(torch.tensor([0, 1, 17, 63, 0, 129]), length=230),
    "packed with text": lambda: packed_mask(torch.tensor([17, 129, 0, 63]), torch.tensor([129, 63, 17, 0])),
    "packed with a padded tile": lambda: packed_mask(torch.tensor([100, 100]), length=300),
    "one document": lambda: packed_mask(torch.tensor([257])),
    "one token": lambda: packed_mask(torch.tensor([1])),
    "block causal": lambda: block_causal_mask(5, 70),
    "block causal, window": lambda: block_causal_mask(6, 64, window=1),
    "sliding tile, padded": lambda: sliding_tile_mask((3, 4, 30), (3, 4, 10), (1, 1, 1)),
    "sliding tile, whole": lambda: sliding_tile_mask((6, 8, 8), (2, 8, 8), (1, 1, 1)),
    "radial": lambda: radial_mask((6, 8, 8)),
    "radial, ragged": lambda: radial_mask((5, 7, 10), width=0.5),
    "tiles": some_tiles,
}


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask, scale: float) -> Tensor:
    allowed = mask.dense()[:, None]
    meets = allowed.any(-1, keepdim=True)
    scores = (q @ k.mT * scale).masked_fill(~(allowed | ~meets), float("-inf"))
    return torch.where(meets, torch.softmax(scores, -1) @ v, 0)


def run(function: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]  # keeps strides
    out = function(*leaves)
    assert out.dtype == dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))]


def check(
    inputs: list[Tensor], grad_out: Tensor, mask: TileMask, dtype: torch.dtype, scale: float | None = None
) -> None:
    """The bound of attention_cases.py: twice eager's error, plus one rounding of the answer and of the fp32 sums behind it.

    What meets nobody is exactly 0.
    """
    inputs, grad_out = [x.to(dtype).double() for x in inputs], grad_out.to(dtype).double()
    head_width = inputs[0].shape[-1]
    scale_value = head_width**-0.5 if scale is None else scale
    exact = run(lambda *x: plain_attention(*x, mask=mask, scale=scale_value), inputs, grad_out, torch.float64)
    eager = run(lambda *x: plain_attention(*x, mask=mask, scale=scale_value), inputs, grad_out, dtype)
    ours = run(lambda *x: attention(*x, scale=scale, mask=mask), inputs, grad_out, dtype)
    largest_score = (inputs[0] @ inputs[1].mT * scale_value).abs().max()
    growth = max(1, scale_value * max(x.shape[2] for x in inputs) ** 0.5)
    sums = 2 * torch.finfo(torch.float32).eps * (head_width**0.5 + largest_score) * growth
    for name, result, peer, truth in zip(NAMES, ours, eager, exact, strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max() + sums
        error, allowed = (result - truth).abs().max(), 2 * (peer - truth).abs().max() + floor
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    dense = mask.dense()[:, None, :, :, None]
    for result, is_met in zip(ours, (dense.any(3), dense.any(3), dense.any(2), dense.any(2)), strict=True):
        assert not result.masked_select(~is_met).any()


def normals(mask: TileMask, head_width: int, *, batch: int = 1, heads: int = 1) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(head_width)
    length, key_length = mask.query_low.shape[1], mask.key_position.shape[1]
    q, k, v, grad_out = (
        torch.randn(batch, heads, n, head_width, generator=generator, dtype=torch.float64)
        for n in (length, key_length, key_length, length)
    )
    return [q, k, v], grad_out


@pytest.mark.parametrize("name", list(MASKS))
def test_every_mask_matches_fp64(name: str) -> None:
    mask = MASKS[name]()
    check(*normals(mask, 32), mask, torch.float16)


@pytest.mark.parametrize(
    "mask",
    [
        packed_mask(torch.tensor([0, 1, 17, 63, 50]), torch.tensor([5, 1, 0, 17, 9]), length=135, key_length=40),
        block_causal_mask(3, 25, window=1),
        tile_mask(torch.tensor([[0, 1], [1, 0], [0, 0]], dtype=torch.bool), 258, 140),
    ],
    ids=["packed", "block causal", "tiles"],
)
def test_masks_match_fp64_in_full_precision(mask: TileMask) -> None:
    """Short lengths, since the interpreter is slow at the small tiles of fp32."""
    check(*normals(mask, 16), mask, torch.float32)


def test_each_sample_has_its_own_mask() -> None:
    mask = texts_per_sample()
    check(*normals(mask, 16, batch=2, heads=2), mask, torch.float16)


def test_one_mask_serves_all_samples_and_heads() -> None:
    mask = packed_mask(torch.tensor([30, 90, 20]))
    check(*normals(mask, 16, batch=2, heads=2), mask, torch.float16)


@pytest.mark.parametrize("head_width", [48, 64, 128, 256])
def test_head_widths_match_fp64(head_width: int) -> None:
    mask = packed_mask(torch.tensor([17, 63, 60]), torch.tensor([63, 60, 17]), length=150, key_length=150)
    check(*normals(mask, head_width), mask, torch.float16)


@pytest.mark.parametrize("name", ["packed", "packed with text", "block causal", "tiles"])
def test_atomic_backward_matches_fp64(name: str) -> None:
    mask = MASKS[name]()
    with forced(fused_backward=True):
        check(*normals(mask, 32), mask, torch.float16)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    mask = packed_mask(torch.tensor([0, 10, 30]), torch.tensor([5, 20, 15]), length=45)
    (q, k, v), grad_out = normals(mask, 16)
    for sign in (1, -1):  # all scores far above 0, then far below: a key of another document would win the softmax
        check([q.abs() * 20 * sign, k.abs() * 20, v], grad_out, mask, torch.float32, scale=0.5)


def test_strided_inputs_match_fp64() -> None:
    mask = packed_mask(torch.tensor([20, 120]))
    fused = torch.randn(2, 140, 3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))  # [B, L, (q, k, v), N, K]
    check([q, k, v], torch.ones(1, 1, 1, 1).expand(2, 2, 140, 16), mask, torch.float16)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.tuples(*2 * [st.sampled_from([0, 1, 17, 63, 129])]), min_size=1, max_size=4),
    padding=st.tuples(st.integers(0, 40), st.integers(1, 140)),
)
def test_any_documents_match_fp64(documents: list[tuple[int, int]], padding: tuple[int, int]) -> None:
    queries, keys = torch.tensor(documents).T
    length, key_length = max(1, int(queries.sum()) + padding[0]), int(keys.sum()) + padding[1]
    mask = packed_mask(queries, keys, length=length, key_length=key_length)
    check(*normals(mask, 16), mask, torch.float16)


def test_packing_gives_what_each_document_gives_alone() -> None:
    counts = [5, 70, 60]
    mask = packed_mask(torch.tensor(counts))
    inputs = [x.half() for x in normals(mask, 16)[0]]
    packed = attention(*inputs, mask=mask).split(counts, 2)
    for i, out in enumerate(packed):
        alone = attention(*(x.split(counts, 2)[i] for x in inputs))
        torch.testing.assert_close(out, alone, atol=2e-3, rtol=2e-3)


def test_empty_batch_gives_empty_results() -> None:
    mask = block_causal_mask(2, 3)
    inputs = [torch.empty(0, 2, 6, 16, requires_grad=True) for _ in range(3)]
    grads = torch.autograd.grad(attention(*inputs, mask=mask).sum(), inputs)
    assert all(g.shape == (0, 2, 6, 16) for g in grads)


def test_backward_repeats_bit_for_bit() -> None:
    mask = MASKS["packed with text"]()
    inputs, grad_out = normals(mask, 16)
    first, second = (run(lambda *x: attention(*x, mask=mask), inputs, grad_out, torch.float16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
