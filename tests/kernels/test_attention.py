"""Attention as the rest of the project calls it, on the CPU: contract, gradients, compile, checkpointing, fake tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from muybridge.kernels import attention
from muybridge.kernels.attention import INTERPRETED, attention_backward, attention_forward

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the CPU path tested here")


def inputs(query_length: int = 5, key_length: int = 7, head_width: int = 16, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    lengths = (query_length, key_length, key_length)
    return [torch.randn(2, 3, n, head_width, requires_grad=True, **options) for n in lengths]


def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_forward(q, k, v, [], q.shape[-1] ** -0.5, True)[0]


def test_cpu_is_torch_attention() -> None:
    q, k, v = inputs()
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(attention(q, k, v, scale=0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3))


def test_cpu_gradients_are_right() -> None:
    q, k, v = inputs(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_operator_gradients_are_right() -> None:
    q, k, v = inputs(dtype=torch.float64)
    grad_out = torch.randn_like(q)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), [q, k, v], grad_out)
    actual = torch.autograd.grad(operator(q, k, v), [q, k, v], grad_out)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)  # the log-sum-exp between the passes is fp32


def test_log_sum_exp_is_in_base_two() -> None:
    q, k, v = inputs()
    lse = attention_forward(q, k, v, [], 0.25, True)[1]
    expected = torch.logsumexp(q @ k.mT * 0.25, -1) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(lse, expected)
    assert not lse.requires_grad


def test_frozen_keys_and_values_get_no_gradient() -> None:
    q, k, v = inputs()
    out = operator(q, k.detach(), v.detach())
    (grad_q,) = torch.autograd.grad(out.sum(), [q])
    assert grad_q.shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    torch.library.opcheck(attention_forward, (q, k, v, [], 0.25, True))
    with torch.no_grad():
        out, lse = attention_forward(q, k, v, [], 0.25, True)
        torch.library.opcheck(attention_backward, (torch.randn_like(q), q, k, v, out, lse, [], 0.25, True))


@pytest.mark.parametrize("function", [attention, operator])
def test_compile_in_one_graph_gives_the_same(function: Callable[..., Tensor]) -> None:
    q, k, v = inputs()
    expected = torch.autograd.grad(function(q, k, v).square().sum(), [q, k, v])
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(q, k, v).square().sum(), [q, k, v])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [attention, operator])
def test_checkpointing_gives_the_same(function: Callable[..., Tensor]) -> None:
    q, k, v = inputs()
    expected = torch.autograd.grad(function(q, k, v).square().sum(), [q, k, v])
    out = checkpoint(function, q, k, v, use_reentrant=False)
    actual = torch.autograd.grad(out.square().sum(), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_meta_tensors_carry_shape_dtype_and_gradients() -> None:
    q, k, v = inputs(device="meta", dtype=torch.bfloat16)
    out = attention(q, k, v)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "meta")
    assert out.transpose(1, 2).is_contiguous()  # as on CUDA
    assert [g.shape for g in torch.autograd.grad(out.sum(), [q, k, v])] == [q.shape, k.shape, v.shape]


def test_fake_cuda_tensors_take_the_operator() -> None:
    # Without gradients: the autograd engine of a CPU build of torch cannot walk through a CUDA graph, not even a fake one.
    with FakeTensorMode(), torch.no_grad():
        q, k, v = inputs(device="cuda", dtype=torch.bfloat16)
        out = attention(q, k, v)
    assert (out.shape, out.device.type) == (q.shape, "cuda")
    assert out.transpose(1, 2).is_contiguous()


def test_empty_batch_is_allowed() -> None:
    q, k, v = (torch.empty(0, 2, n, 16) for n in (5, 7, 7))
    assert attention(q, k, v).shape == (0, 2, 5, 16)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("q", "k", "v", "says"),
    [
        (zeros(2, 5, 16), zeros(2, 5, 16), zeros(2, 5, 16), r"q \[2, 5, 16\].*must be q \[B, N, L, K\]"),
        (zeros(2, 3, 5, 16), zeros(2, 1, 7, 16), zeros(2, 1, 7, 16), r"k \[2, 1, 7, 16\].*must be q \[B, N, L, K\]"),
        (zeros(2, 3, 5, 16), zeros(1, 3, 7, 16), zeros(1, 3, 7, 16), r"k \[1, 3, 7, 16\].*must be q \[B, N, L, K\]"),
        (zeros(2, 3, 5, 16), zeros(2, 3, 7, 16), zeros(2, 3, 6, 16), r"v \[2, 3, 6, 16\].*must be q \[B, N, L, K\]"),
        (zeros(2, 3, 5, 16), zeros(2, 3, 7, 32), zeros(2, 3, 7, 32), r"k \[2, 3, 7, 32\].*must be q \[B, N, L, K\]"),
        (zeros(2, 3, 0, 16), zeros(2, 3, 7, 16), zeros(2, 3, 7, 16), r"q \[2, 3, 0, 16\].*at least one query"),
        (zeros(2, 3, 5, 16), zeros(2, 3, 0, 16), zeros(2, 3, 0, 16), r"k \[2, 3, 0, 16\].*at least one query"),
        (zeros(1, 1, 5, 24), zeros(1, 1, 5, 24), zeros(1, 1, 5, 24), r"q \[1, 1, 5, 24\].*multiple of 16 up to 256"),
        (
            zeros(1, 1, 5, 272),
            zeros(1, 1, 5, 272),
            zeros(1, 1, 5, 272),
            r"q \[1, 1, 5, 272\].*multiple of 16 up to 256",
        ),
        (zeros(1, 1, 5, 0), zeros(1, 1, 5, 0), zeros(1, 1, 5, 0), r"q \[1, 1, 5, 0\].*multiple of 16 up to 256"),
        (zeros(1, 1, 5, 16), zeros(1, 1, 5, 16).half(), zeros(1, 1, 5, 16), r"k .*float16.*must share one dtype"),
        (zeros(1, 1, 5, 16).int(), zeros(1, 1, 5, 16).int(), zeros(1, 1, 5, 16).int(), r"int32.*must share one dtype"),
    ],
)
def test_wrong_inputs_are_named(q: Tensor, k: Tensor, v: Tensor, says: str, device: str) -> None:
    with pytest.raises(ValueError, match=says):
        attention(q.to(device), k.to(device), v.to(device))


def test_mixed_devices_are_named() -> None:
    with pytest.raises(ValueError, match="must be on one device"):
        attention(zeros(1, 1, 5, 16), zeros(1, 1, 5, 16, device="meta"), zeros(1, 1, 5, 16))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_must_be_positive_and_finite(scale: float | None) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        attention(*inputs(), scale=scale)
