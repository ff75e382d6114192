"""Attention's backward kernels on a real GPU: both forms against fp32 mathematics and each other, dense and masked."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from muybridge.kernels import TileMask, block_causal_mask, packed_mask

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from muybridge.kernels.attention_backward import run_backward
from muybridge.kernels.attention_forward import run_forward

NAMES = ("grad_q", "grad_k", "grad_v")
DTYPES = [torch.bfloat16, torch.float16]
LENGTH = 700
MASKS = ["none", "documents", "block-causal"]


@pytest.fixture(autouse=True)
def exact_matmuls_and_poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


def build_mask(name: str) -> TileMask | None:
    """One for every sample, one a sample with a document that has no keys, or none."""
    if name == "none":
        return None
    if name == "block-causal":
        return block_causal_mask(7, LENGTH // 7).to("cuda")
    queries, keys = torch.tensor([[300, 100, 300], [1, 0, 600]]), torch.tensor([[320, 0, 280], [0, 5, 690]])
    return packed_mask(queries, keys, length=LENGTH, key_length=LENGTH).to("cuda")


def normals(head_width: int, dtype: torch.dtype) -> list[Tensor]:
    """grad_out, q, k and v."""
    generator = torch.Generator("cuda").manual_seed(head_width)
    shape = (2, 3, LENGTH, head_width)
    return [torch.randn(shape, device="cuda", dtype=dtype, generator=generator) for _ in range(4)]


def run(inputs: list[Tensor], mask: TileMask | None, *, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, q, k, v = inputs
    scale, tensors = q.shape[-1] ** -0.5, [] if mask is None else mask.tensors()
    out, lse = run_forward(q, k, v, tensors, scale=scale)
    return run_backward(grad_out, q, k, v, out, lse, tensors, scale=scale, deterministic=deterministic)


def plain_gradients(inputs: list[Tensor], allowed: Tensor) -> list[Tensor]:
    grad_out, *rest = inputs
    q, k, v = leaves = [x.detach().requires_grad_() for x in rest]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, torch.finfo(q.dtype).min)
    out = (torch.softmax(scores, -1) * allowed) @ v
    return list(torch.autograd.grad(out, leaves, grad_out))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("head_width", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_mathematics(dtype: torch.dtype, head_width: int, name: str, deterministic: bool) -> None:
    """At most twice the error of eager code in the same dtype, plus one rounding of the answer and of fp32 sums of K terms."""
    inputs, mask = normals(head_width, dtype), build_mask(name)
    allowed = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device="cuda")
    if mask is not None:
        allowed = mask.dense()[:, None]
    exact, eager = plain_gradients([x.float() for x in inputs], allowed), plain_gradients(inputs, allowed)
    ours = run(inputs, mask, deterministic=deterministic)
    for gradient, result, peer, truth in zip(NAMES, ours, eager, exact, strict=True):
        assert not result.isnan().any(), gradient
        norm = truth.norm()
        floor = torch.finfo(dtype).eps * norm + torch.finfo(torch.float32).eps * (head_width * truth.numel()) ** 0.5
        error, limit = (result - truth).norm(), 2 * (peer - truth).norm() + floor
        assert error <= limit, f"{gradient}: error {error / norm:.2e}, allowed {limit / norm:.2e}"
    meets = allowed.expand(2, 3, -1, -1)
    for result, lonely in zip(ours, (~meets.any(3), ~meets.any(2), ~meets.any(2)), strict=True):
        assert (result[lonely] == 0).all()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_form_agrees_with_the_deterministic_one(dtype: torch.dtype, head_width: int, name: str) -> None:
    """Both round P and dS to the dtype before they multiply; only the order of fp32 sums differs, and one rounding."""
    inputs, mask = normals(head_width, dtype), build_mask(name)
    pairs = zip(run(inputs, mask, deterministic=False), run(inputs, mask, deterministic=True), strict=True)
    for gradient, (fused, deterministic) in zip(NAMES, pairs, strict=True):
        assert (fused.float() - deterministic.float()).norm() <= torch.finfo(
            dtype
        ).eps * deterministic.float().norm(), gradient


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("head_width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_deterministic_form_repeats_bit_for_bit(dtype: torch.dtype, head_width: int, name: str) -> None:
    inputs, mask = normals(head_width, dtype), build_mask(name)
    first = run(inputs, mask, deterministic=True)
    for _ in range(5):
        again = run(inputs, mask, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_gradient_expanded_from_one_number() -> None:
    """The bulk copy engine cannot address it: it is copied first."""
    _, *rest = normals(64, torch.bfloat16)
    ones = torch.ones(1, 1, 1, 1, device="cuda", dtype=torch.bfloat16).expand(rest[0].shape)
    first, second = (run([x, *rest], None, deterministic=True) for x in (ones, ones.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
