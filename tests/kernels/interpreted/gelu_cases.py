"""GELU in Triton's interpreter, which test_interpreted.py switches on before anything is imported."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muybridge.kernels import gelu_kernels
from muybridge.kernels.gelu import gelu_tanh

DTYPES = [torch.float32, torch.float16]
SUBNORMAL = 2.0**-24  # the smallest step of fp16


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gelu_kernels, "BLOCK", 64)


def run(function: object, x: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()  # keeps strides
    out = gelu_tanh(x) if function is gelu_tanh else F.gelu(x, approximate="tanh")
    return out.detach(), torch.autograd.grad(out, x, grad_out)[0]


def check(x: Tensor, dtype: torch.dtype, grad_out: Tensor | None = None) -> None:
    """The kernel computes in fp32 and rounds once: one rounding of the answer, and what rounding the sigmoid's argument costs,
    at most 10 roundings of 1 where the sigmoid is steepest."""
    x = x.to(dtype)
    grad_out = (normal(*x.shape, seed=1) if grad_out is None else grad_out).to(dtype)
    exact = run(F.gelu, x.double(), grad_out.double())
    for result, truth, scale in zip(run(gelu_tanh, x, grad_out), exact, (1, grad_out.abs().double()), strict=True):
        assert (result.dtype, result.shape) == (dtype, x.shape)
        error, allowed = (result - truth).abs(), torch.finfo(dtype).eps * truth.abs() + 10 * 2**-23 * scale + SUBNORMAL
        assert (error <= allowed).all(), f"error {error.max():.2e}"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 17, 63, 64, 129, 1000])
def test_odd_sizes_match_fp64(length: int, dtype: torch.dtype) -> None:
    check(normal(length), dtype)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 7), max_size=3), dtype=st.sampled_from(DTYPES))
def test_any_shape_matches_fp64(shape: list[int], dtype: torch.dtype) -> None:
    check(normal(*shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_every_size_match_fp64(dtype: torch.dtype) -> None:
    check(torch.linspace(-20, 20, 801, dtype=torch.float64), dtype)


def test_huge_values_neither_overflow_nor_give_nan() -> None:
    x = torch.tensor([3e38, 1e20, 1e13, 30.0, -30.0, -1e13, -1e20, -3e38])
    out, grad = run(gelu_tanh, x, torch.ones(8))
    assert torch.equal(out, x.clamp(min=0))
    assert torch.equal(grad, (x > 0).float())
    assert gelu_tanh(torch.tensor([float("nan"), float("inf")])).tolist()[1] == float("inf")


def test_nan_stays_nan() -> None:
    out, grad = run(gelu_tanh, torch.tensor([float("nan"), 1.0]), torch.ones(2))
    assert out.isnan().tolist() == grad.isnan().tolist() == [True, False]


def test_dense_strides_are_kept_and_others_are_copied() -> None:
    x, grad_out = normal(4, 5, 6).float(), normal(4, 5, 6, seed=1).float()
    expected = run(gelu_tanh, x, grad_out)
    permuted = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.zeros(4, 5, 12)
    wide[..., ::2] = x
    for strided in (permuted, wide[..., ::2]):
        for grad in (grad_out, grad_out.mT.contiguous().mT):
            results = run(gelu_tanh, strided, grad)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert gelu_tanh(permuted).stride() == permuted.stride()
    assert gelu_tanh(wide[..., ::2]).is_contiguous()
    one = torch.ones(()).expand(4, 5, 6)
    assert torch.equal(run(gelu_tanh, x, one)[1], run(gelu_tanh, x, one.contiguous())[1])


def test_empty_tensors_pass() -> None:
    out, grad = run(gelu_tanh, torch.empty(0, 5), torch.empty(0, 5))
    assert out.shape == grad.shape == (0, 5)


def test_bf16_goes_around_the_interpreter() -> None:
    x = normal(200).bfloat16()
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))
