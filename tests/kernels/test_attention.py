"""Attention as the rest of the project calls it, on the CPU: contract, gradients, compile, checkpointing, fake tensors."""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from muybridge.kernels import TileMask, attention, block_causal_mask, packed_mask, tile_mask
from muybridge.kernels.attention import attention_backward, attention_forward
from muybridge.kernels.dispatch import INTERPRETED, Backend, forced

attention_module = importlib.import_module("muybridge.kernels.attention")  # the package has a function of this name
pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the CPU path tested here")


def inputs(query_length: int = 5, key_length: int = 7, head_width: int = 16, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    lengths = (query_length, key_length, key_length)
    return [torch.randn(2, 3, n, head_width, requires_grad=True, **options) for n in lengths]


def operator(q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | None = None) -> Tensor:
    tensors = [] if mask is None else mask.tensors()
    return attention_forward(q, k, v, tensors, q.shape[-1] ** -0.5, True)[0]


def text_mask() -> TileMask:
    """5 queries and 7 keys of three documents: one without queries, one without keys, and padding on both sides."""
    return packed_mask(torch.tensor([2, 0, 2]), torch.tensor([3, 3, 0]), length=5, key_length=7)


def text_mask_per_sample() -> TileMask:
    return packed_mask(torch.tensor([[2, 3], [4, 0]]), torch.tensor([[3, 4], [1, 5]]), length=5, key_length=7)


def whole_mask() -> TileMask:
    return tile_mask(torch.ones(1, 1, dtype=torch.bool), 5, 7)


MASKS = [text_mask, text_mask_per_sample, whole_mask]


def masked_mathematics(q: Tensor, k: Tensor, v: Tensor, mask: TileMask) -> Tensor:
    allowed = mask.dense()[:, None]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, -1e9)
    return torch.softmax(scores, -1) * allowed.any(-1, keepdim=True) @ v


def test_cpu_is_torch_attention() -> None:
    q, k, v = inputs()
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(attention(q, k, v, scale=0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3))


def test_cpu_gradients_are_right() -> None:
    q, k, v = inputs(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(attention, (q, k, v))


@pytest.mark.parametrize("build", MASKS)
def test_masked_output_and_gradients_are_right(build: Callable[[], TileMask]) -> None:
    q, k, v = inputs(dtype=torch.float64)
    mask = build()
    torch.testing.assert_close(attention(q, k, v, mask=mask), masked_mathematics(q, k, v, mask))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask=mask), (q, k, v))


@pytest.mark.parametrize("build", MASKS)
def test_masked_operator_gradients_are_right(build: Callable[[], TileMask]) -> None:
    q, k, v = inputs(dtype=torch.float64)
    mask, grad_out = build(), torch.randn_like(q)
    out, expected = operator(q, k, v, mask=mask), masked_mathematics(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    pairs = zip(*(torch.autograd.grad(x, [q, k, v], grad_out) for x in (out, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)  # the log-sum-exp between the passes is fp32


@pytest.mark.parametrize("function", [attention, operator])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_takes_no_part(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    mask = text_mask()  # queries from 2 on and keys from 3 on meet nobody
    out = function(q, k, v, mask=mask)
    grad_q, grad_k, grad_v = torch.autograd.grad(out.square().sum() + out.sum(), [q, k, v])
    assert torch.equal(out[:, :, 2:], torch.zeros_like(out[:, :, 2:]))
    assert out[:, :, :2].abs().min() > 0
    assert grad_q[:, :, :2].any()
    assert not grad_q[:, :, 2:].any()
    for x, grad in ((k, grad_k), (v, grad_v)):
        assert grad[:, :, :3].any()
        assert not grad[:, :, 3:].any()
        with torch.no_grad():
            x[:, :, 3:] = 7
    torch.testing.assert_close(function(q, k, v, mask=mask), out, atol=0, rtol=0)


def test_rows_without_keys_have_an_infinite_log_sum_exp() -> None:
    lse = attention_forward(*inputs(), text_mask().tensors(), 0.25, True)[1]
    assert (lse[:, :, 2:] == math.inf).all()
    assert lse[:, :, :2].isfinite().all()


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
@pytest.mark.parametrize("mask", [[], text_mask().tensors()], ids=["dense", "masked"])
def test_operators_pass_opcheck(mask: list[Tensor], dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    torch.library.opcheck(attention_forward, (q, k, v, mask, 0.25, True))
    with torch.no_grad():
        out, lse = attention_forward(q, k, v, mask, 0.25, True)
        torch.library.opcheck(attention_backward, (torch.randn_like(q), q, k, v, out, lse, mask, 0.25, True))


@pytest.mark.parametrize("function", [attention, operator])
@pytest.mark.parametrize("mask", [None, text_mask()], ids=["dense", "masked"])
def test_compile_in_one_graph_gives_the_same(function: Callable[..., Tensor], mask: TileMask | None) -> None:
    q, k, v = inputs()
    expected = torch.autograd.grad(function(q, k, v, mask=mask).square().sum(), [q, k, v])
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(q, k, v, mask=mask).square().sum(), [q, k, v])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [attention, operator])
@pytest.mark.parametrize("mask", [None, text_mask()], ids=["dense", "masked"])
def test_checkpointing_gives_the_same(function: Callable[..., Tensor], mask: TileMask | None) -> None:
    q, k, v = inputs()
    expected = torch.autograd.grad(function(q, k, v, mask=mask).square().sum(), [q, k, v])
    out = checkpoint(function, q, k, v, mask=mask, use_reentrant=False)
    actual = torch.autograd.grad(out.square().sum(), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("mask", [None, text_mask().to("meta")], ids=["dense", "masked"])
def test_meta_tensors_carry_shape_dtype_and_gradients(mask: TileMask | None) -> None:
    q, k, v = inputs(device="meta", dtype=torch.bfloat16)
    out = attention(q, k, v, mask=mask)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "meta")
    assert out.transpose(1, 2).is_contiguous()  # as on CUDA
    assert [g.shape for g in torch.autograd.grad(out.sum(), [q, k, v])] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("mask", [None, text_mask()], ids=["dense", "masked"])
def test_fake_cuda_tensors_take_the_operator(mask: TileMask | None) -> None:
    # Without gradients: the autograd engine of a CPU build of torch cannot walk through a CUDA graph, not even a fake one.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), forced(attention=Backend.own):
        q, k, v = inputs(device="cuda", dtype=torch.bfloat16)
        if mask is not None:
            mask = TileMask(mask.kind, *(torch.empty_like(t, device="cuda") for t in mask.tensors()))
        out = attention(q, k, v, mask=mask)
    assert (out.shape, out.device.type) == (q.shape, "cuda")
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mask", [None, text_mask()], ids=["dense", "masked"])
def test_empty_batch_is_allowed(mask: TileMask | None) -> None:
    q, k, v = (torch.empty(0, 2, n, 16, requires_grad=True) for n in (5, 7, 7))
    for function in (attention, operator):
        out = function(q, k, v, mask=mask)
        assert out.shape == (0, 2, 5, 16)
        assert [g.shape for g in torch.autograd.grad(out.sum(), [q, k, v])] == [q.shape, k.shape, v.shape]


def test_strided_inputs_give_the_same() -> None:
    fused = torch.randn(2, 5, 3, 3, 16)  # [B, L, (q, k, v), N, K]
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    mask = block_causal_mask(5, 1)
    for function in (attention, operator):
        torch.testing.assert_close(
            function(q, k, v, mask=mask), function(*(x.contiguous() for x in (q, k, v)), mask=mask)
        )


def test_settings_reach_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(q: Tensor, k: Tensor, v: Tensor, mask: list[Tensor], scale: float, deterministic: bool) -> list[Tensor]:
        calls.append((len(mask), scale, deterministic))
        return [q]

    monkeypatch.setattr(attention_module, "attention_forward", record)
    q, k, v = inputs(device="meta")
    attention(q, k, v)
    with forced(fused_backward=True):
        attention(q, k, v, scale=0.5, mask=text_mask().to("meta"))
    assert calls == [(0, 0.25, True), (7, 0.5, False)]


def test_cudnn_is_asked_alone_and_for_rows_of_unit_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(q: Tensor, k: Tensor, v: Tensor, **_: float | None) -> Tensor:
        cuda = torch.backends.cuda
        assert cuda.cudnn_sdp_enabled()
        assert not any((cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()))
        assert {x.stride(-1) for x in (q, k, v)} == {1}
        return q + 1

    monkeypatch.setattr(attention_module, "attention_backend", lambda *_, **__: Backend.cudnn)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    q = torch.zeros(1, 1, 16, 5).mT
    assert torch.equal(attention(q, q, q), q + 1)


def counted(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_operations_are_counted_as_for_torch_attention() -> None:
    q, k, v = inputs()
    forward = sdpa_flop_count(q.shape, k.shape, v.shape)
    backward = sdpa_backward_flop_count(q.shape, q.shape, k.shape, v.shape)
    assert counted(lambda: operator(q, k, v)) == forward
    assert counted(lambda: operator(q, k, v).sum().backward()) == forward + backward
    on_meta = [x.to("meta") for x in (q, k, v)]
    assert counted(lambda: attention(*on_meta, mask=text_mask().to("meta"))) == forward


def test_masked_operations_are_counted_by_tiles() -> None:
    q, k, v = inputs(384, 384)
    mask = block_causal_mask(3, 128)  # 6 of 9 tiles
    dense = counted(lambda: operator(q, k, v).sum().backward())
    assert counted(lambda: operator(q, k, v, mask=mask).sum().backward()) * 3 == dense * 2


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


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (block_causal_mask(5, 1), r"block_causal mask \[1, 5, 5\].*1 or B samples, L queries and S keys"),
        (block_causal_mask(7, 1), r"q \[2, 3, 5, 16\].*k \[2, 3, 7, 16\], block_causal mask \[1, 7, 7\]"),
        (packed_mask(torch.tensor([[5]] * 3), torch.tensor([[7]] * 3)), r"packed mask \[3, 5, 7\].*1 or B samples"),
        (torch.ones(5, 7, dtype=torch.bool), "mask of type Tensor must be a TileMask"),
    ],
)
def test_wrong_masks_are_named(mask: Any, says: str, device: str) -> None:
    with pytest.raises(ValueError, match=says):
        attention(*inputs(device=device), mask=mask.to(device))


def test_a_mask_on_another_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"mask \[1, 5, 7\] on meta: the mask must be on one device"):
        attention(*inputs(), mask=text_mask().to("meta"))
    half = dataclasses.replace(text_mask(), key_counts=text_mask().key_counts.to("meta"))
    with pytest.raises(ValueError, match="the mask must be on one device"):
        attention(*inputs(), mask=half)
