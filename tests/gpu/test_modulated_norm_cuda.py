"""The residual, its norm and the gated residual on a real GPU: accuracy, repeatability, long and large tensors, compile."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from muybridge.kernels.dispatch import Backend, forced
from muybridge.kernels.gated_residual import gated_residual
from muybridge.kernels.modulated_norm import modulated_norm, residual_affine_norm, residual_modulated_norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Tensors = list[Tensor]


def inputs(
    tokens: int, width: int, *, batch: int = 2, rows: int = 1, stream: torch.dtype, other: torch.dtype
) -> Tensors:
    """x, branch, weight, bias and a table [B, R, 6, D]."""
    generator = torch.Generator("cuda").manual_seed(tokens + width + rows)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    x, branch = normal(batch, tokens, width, dtype=stream), normal(batch, tokens, width, dtype=other)
    return [x, branch, normal(width), normal(width), normal(batch, rows, 6, width)]


def block(dtype: torch.dtype) -> Callable[..., Tensors]:
    """Everything a block calls, with norms in `dtype`; each starts from x, so that errors do not add up."""

    def run(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, table: Tensor) -> Tensors:
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(-2)
        norm: Any = {"eps": 1e-6, "dtype": dtype}
        return [
            modulated_norm(x, shift1, scale1, **norm),
            *residual_affine_norm(x, branch, weight, bias, gate=gate1, **norm),
            *residual_modulated_norm(x, branch, shift2, scale2, **norm),
            gated_residual(x, branch, gate2),
        ]

    return run


def run(function: Callable[..., Tensors], tensors: Tensors) -> Tensors:
    """Outputs and the gradients of all inputs; the gradients of the outputs are the same for every function."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    generator = torch.Generator("cuda").manual_seed(0)
    grads = [torch.randn(out.shape, generator=generator, device="cuda").bfloat16().to(out.dtype) for out in outputs]
    return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, leaves, grads))


def check(tensors: Tensors, dtype: torch.dtype) -> None:
    """At most twice the error of eager code in the same dtypes, plus one rounding of the answer and of fp32 sums."""
    exact = run(block(torch.float64), [tensor.double() for tensor in tensors])
    ours = run(block(dtype), tensors)
    with forced(pointwise=Backend.reference):
        eager = run(block(dtype), tensors)
    for i, (result, peer, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert result.dtype == peer.dtype
        assert not result.isnan().any()
        norm = truth.norm()
        floor = (torch.finfo(result.dtype).eps + 8 * torch.finfo(torch.float32).eps) * norm
        error, allowed = (result - truth).norm(), 2 * (peer - truth).norm() + floor
        assert error <= allowed, f"result {i}: error {error / norm:.2e}, allowed {allowed / norm:.2e}"


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (17, 1), (129, 3), (1000, 10), (63, 63)])
@pytest.mark.parametrize("width", [96, 128, 1000, 1536, 5120, 8192])
def test_outputs_and_gradients_match_mathematics(
    width: int, tokens: int, rows: int, stream: torch.dtype, dtype: torch.dtype
) -> None:
    check(inputs(tokens, width, rows=rows, stream=stream, other=dtype), dtype)


@pytest.mark.parametrize(("tokens", "rows"), [(32_760, 1), (32_760, 21), (4_680, 4_680)])
def test_long_videos_match_mathematics(tokens: int, rows: int) -> None:
    """480p, 81 frames: 32 760 tokens in 21 latent frames."""
    check(inputs(tokens, 1536, batch=1, rows=rows, stream=torch.float32, other=torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_everything_repeats_bit_for_bit(rows: int) -> None:
    tensors = inputs(1000, 1536, rows=rows, stream=torch.float32, other=torch.bfloat16)
    first = run(block(torch.bfloat16), tensors)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(block(torch.bfloat16), tensors), strict=True))


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    x, *others = inputs(100, 1536, stream=torch.float32, other=torch.float32)
    check([x + 1000, *others], torch.float32)


def test_strides_change_no_bit() -> None:
    x, branch, weight, bias, table = inputs(60, 192, rows=3, stream=torch.float32, other=torch.bfloat16)
    expected = run(block(torch.bfloat16), [x, branch, weight, bias, table])
    strided = [x.mT.contiguous().mT, torch.stack([branch] * 2, 2)[:, :, 1], weight, bias, table.mT.contiguous().mT]
    assert all(torch.equal(a, b) for a, b in zip(expected, run(block(torch.bfloat16), strided), strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """A bf16 stream of 2^31 elements and a little more: the last tokens are as those of a small tensor."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    tokens, width = 2**31 // 5120 + 40, 5120
    _, _, weight, bias, table = inputs(1, width, batch=1, stream=torch.bfloat16, other=torch.bfloat16)
    x = torch.zeros(1, tokens, width, device="cuda", dtype=torch.bfloat16)
    x[:, -40:].normal_()
    for results in zip(
        residual_affine_norm(x, x, weight, bias, gate=table[:, :, 0], eps=1e-6, dtype=torch.bfloat16),
        residual_affine_norm(x[:, -40:], x[:, -40:], weight, bias, gate=table[:, :, 0], eps=1e-6, dtype=torch.bfloat16),
        strict=True,
    ):
        assert torch.equal(results[0][:, -40:], results[1])


def test_compile_and_checkpoint_change_nothing() -> None:
    tensors = inputs(300, 1536, rows=3, stream=torch.float32, other=torch.bfloat16)
    function = block(torch.bfloat16)
    plain = run(function, tensors)
    compiled = run(torch.compile(function, backend="aot_eager", fullgraph=True), tensors)
    recomputed = run(lambda *x: checkpoint(function, *x, use_reentrant=False), tensors)
    for results in (compiled, recomputed):
        assert all(torch.equal(a, b) for a, b in zip(plain, results, strict=True))
