"""RMSNorm and rotary positions in Triton's interpreter, which test_interpreted.py switches on before anything is imported.

Every case compares the output and both gradients with fp64 mathematics.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muybridge.kernels import norm_rope_kernels
from muybridge.kernels.norm_rope import Rope, build_packed_rope, build_rope, rms_norm_heads, rms_norm_rope

CPU = torch.device("cpu")
EPS = 1e-6
NAMES = ("out", "grad_x", "grad_weight")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program of the backward kernel walks over several tokens, as on a GPU."""
    monkeypatch.setattr(norm_rope_kernels, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(norm_rope_kernels, "RESIDENT", dict.fromkeys(norm_rope_kernels.RESIDENT, 3))


def plain(x: Tensor, weight: Tensor, rope: Rope | None, heads: int) -> Tensor:
    """The definition, pair by pair, in the dtype of x."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    heads_of = normed.unflatten(-1, (heads, -1))
    if rope is None:
        return heads_of
    axis = torch.arange(3).repeat_interleave(torch.tensor(rope.axis_pairs))
    position = rope.coordinates.long()[..., axis]  # [L, K/2] or [B, L, K/2]
    rotation = rope.table[position, torch.arange(len(axis))].to(x.dtype)  # [L, K/2, 2] or [B, L, K/2, 2]
    cosine, sine = rotation.unsqueeze(-3).unbind(-1)  # [L, 1, K/2] or [B, L, 1, K/2]
    even, odd = heads_of[..., ::2], heads_of[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)


def ours(x: Tensor, weight: Tensor, rope: Rope | None, heads: int) -> Tensor:
    if rope is None:
        return rms_norm_heads(x, weight, heads=heads, eps=EPS)
    return rms_norm_rope(x, weight, rope, heads=heads, eps=EPS)


def run(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, rope: Rope | None, grad_out: Tensor
) -> list[Tensor]:
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    out = function(x, weight, rope, grad_out.shape[2])
    return [out.detach(), *torch.autograd.grad(out, [x, weight], grad_out)]


def check(
    x: Tensor, weight: Tensor, rope: Rope | None, heads: int, dtype: torch.dtype, grad_out: Tensor | None = None
) -> None:
    """The kernel computes in fp32 and rounds once: one rounding of the answer, and fp32 sums over a row and over tokens."""
    grad_out = normal(*x.shape[:2], heads, x.shape[2] // heads, seed=7) if grad_out is None else grad_out
    x, weight, grad_out = x.to(dtype), weight.to(dtype), grad_out.to(dtype)
    exact = run(plain, x.double(), weight.double(), rope, grad_out.double())
    terms = x.shape[2] + x.shape[0] * x.shape[1]
    for name, result, truth in zip(NAMES, run(ours, x, weight, rope, grad_out), exact, strict=True):
        assert result.dtype == dtype
        allowed = (torch.finfo(dtype).eps + 2 * terms**0.5 * torch.finfo(torch.float32).eps) * truth.abs().max()
        error = (result - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def inputs(batch: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    return 3 * normal(batch, length, width), 1 + normal(width, seed=1)


def positions(*shape: int, head_width: int, seed: int = 0) -> Rope:
    coordinates = torch.randint(0, 50, (*shape, 3), generator=torch.Generator().manual_seed(seed))
    return build_packed_rope(coordinates, positions=50, head_width=head_width, device=CPU)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [(1, torch.float32), (1, torch.float16), (17, torch.float16), (63, torch.float32), (129, torch.float16)],
)
def test_odd_lengths_match_fp64(length: int, dtype: torch.dtype) -> None:
    check(*inputs(1, length, 64), positions(length, head_width=32), 2, dtype)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 7, 12, 16, 40])
def test_every_number_of_heads_matches_fp64(heads: int) -> None:
    check(*inputs(1, 2, heads * 16), positions(2, head_width=16), heads, torch.float32)
    check(*inputs(1, 2, heads * 16), None, heads, torch.float16)


@pytest.mark.parametrize(
    ("heads", "head_width"), [(12, 128), (40, 128), (2, 64), (4, 48), (3, 96), (1, 6), (5, 2), (30, 64), (5, 200)]
)
def test_widths_of_models_match_fp64(heads: int, head_width: int) -> None:
    check(*inputs(1, 2, heads * head_width), positions(2, head_width=head_width), heads, torch.float32)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 6),
    heads=st.integers(1, 9),
    pairs=st.integers(1, 24),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    shared=st.booleans(),
)
def test_any_shape_matches_fp64(
    batch: int, length: int, heads: int, pairs: int, dtype: torch.dtype, shared: bool
) -> None:
    rope = positions(*([length] if shared else [batch, length]), head_width=2 * pairs)
    check(*inputs(batch, length, heads * 2 * pairs), rope, heads, dtype)


def test_a_grid_is_turned_by_frame_row_and_column() -> None:
    rope = build_rope(2, 3, 4, head_width=16, device=CPU)
    check(*inputs(2, 24, 32), rope, 2, torch.float32)


def test_fused_projection_is_read_in_place() -> None:
    fused = normal(2, 5, 3 * 64)
    _, weight = inputs(1, 1, 64)
    rope = positions(2, 5, head_width=32)
    grad_out = normal(2, 2, 5, 32).transpose(1, 2)  # as attention's backward pass lays it out
    for x in fused.float().split(64, dim=-1):
        assert not x.is_contiguous()
        check(x.double(), weight, rope, 2, torch.float32, grad_out)
        given_strides, copied = (ours(t, weight.float(), rope, 2) for t in (x, x.contiguous()))
        assert torch.equal(given_strides, copied)
        assert given_strides.is_contiguous()


def test_any_strides_match_fp64() -> None:
    _, weight = inputs(1, 1, 32)
    rope = positions(2, 3, head_width=16)
    wide = normal(2, 3, 96).float()
    for x in (
        wide[..., 32:64],
        wide[..., ::3],
        normal(3, 2, 32).float().transpose(0, 1),
        wide[:1, :, :32].expand(2, 3, 32),
    ):
        for grad_out in (normal(2, 3, 2, 16), normal(2, 3, 16, 2).mT, normal(1, 1, 1, 1).expand(2, 3, 2, 16)):
            results = run(ours, x, weight.float(), rope, grad_out.float())
            copied = run(ours, x.contiguous(), weight.float(), rope, grad_out.float().contiguous())
            assert all(torch.equal(a, b) for a, b in zip(results, copied, strict=True))


def test_result_may_have_another_dtype() -> None:
    x, weight = inputs(1, 6, 32)
    rope = positions(6, head_width=16)
    exact = plain(x.half().double(), weight, rope, 2)
    out = rms_norm_rope(x.half(), weight.float(), rope, heads=2, eps=EPS, dtype=torch.float32)
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() < 1e-5
    assert rms_norm_heads(x.float(), weight.float(), heads=2, eps=EPS, dtype=torch.float16).dtype == torch.float16


def test_rows_of_zeros_give_finite_gradients() -> None:
    x, weight = inputs(1, 3, 32)
    x[:, 1] = 0
    check(x, weight, positions(3, head_width=16), 2, torch.float32)


def test_empty_batch_gives_empty_results() -> None:
    x, weight = torch.empty(0, 5, 32), torch.ones(32)
    out, grad_x, grad_weight = run(ours, x, weight, positions(5, head_width=16), torch.empty(0, 5, 2, 16))
    assert (out.shape, grad_x.shape) == ((0, 5, 2, 16), x.shape)
    assert torch.equal(grad_weight, torch.zeros(32))


def test_bf16_goes_around_the_interpreter() -> None:
    x, weight = (t.bfloat16() for t in inputs(1, 6, 32))
    rope = positions(6, head_width=16)
    exact = plain(x.double(), weight.double(), rope, 2)
    assert (ours(x, weight, rope, 2) - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_gradients_repeat_bit_for_bit() -> None:
    x, weight = (t.half() for t in inputs(1, 12, 64))
    rope, grad_out = positions(12, head_width=32), normal(1, 12, 2, 32).half()
    first, second = (run(ours, x, weight, rope, grad_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
