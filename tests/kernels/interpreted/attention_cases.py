"""Dense attention in Triton's interpreter, which test_interpreted.py switches on before anything is imported.

Every case compares the output and all three gradients with fp64 mathematics.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from muybridge.kernels import attention

LENGTHS = (1, 17, 63, 129)
NAMES = ("out", "grad_q", "grad_k", "grad_v")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax(q @ k.mT * scale, -1) @ v


def run(function: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]  # keeps strides
    out = function(*leaves)
    assert out.dtype == dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))]


def check(inputs: list[Tensor], grad_out: Tensor, dtype: torch.dtype, scale: float | None = None) -> None:
    """Holds the error to twice that of eager code in the same dtype, plus a floor where eager is lucky or exact.

    The floor is one rounding of the exact answer, and fp32 rounding of two kinds of sums: the K terms behind dP and delta
    (which cancel), and scores minus log-sum-exp, which are rounded in proportion to the largest score.
    Both grow with the square root of the rows that a gradient adds up.
    """
    inputs, grad_out = [x.to(dtype).double() for x in inputs], grad_out.to(dtype).double()
    head_width = inputs[0].shape[-1]
    scale_value = head_width**-0.5 if scale is None else scale
    exact = run(lambda q, k, v: plain_attention(q, k, v, scale_value), inputs, grad_out, torch.float64)
    eager = run(lambda q, k, v: plain_attention(q, k, v, scale_value), inputs, grad_out, dtype)
    ours = run(lambda q, k, v: attention(q, k, v, scale=scale), inputs, grad_out, dtype)
    largest_score = (inputs[0] @ inputs[1].mT * scale_value).abs().max()
    growth = max(1, scale_value * max(x.shape[2] for x in inputs) ** 0.5)
    sums = 2 * torch.finfo(torch.float32).eps * (head_width**0.5 + largest_score) * growth
    for name, result, peer, truth in zip(NAMES, ours, eager, exact, strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max() + sums
        error, allowed = (result - truth).abs().max(), 2 * (peer - truth).abs().max() + floor
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def normals(
    heads: int, query_length: int, key_length: int, head_width: int, batch: int = 1
) -> tuple[list[Tensor], Tensor]:
    lengths = (query_length, key_length, key_length, query_length)
    q, k, v, grad_out = (normal(batch, heads, n, head_width, seed=i) for i, n in enumerate(lengths))
    return [q, k, v], grad_out


@pytest.mark.parametrize(("query_length", "key_length"), list(itertools.product(LENGTHS, LENGTHS)))
def test_odd_lengths_match_fp64(query_length: int, key_length: int) -> None:
    check(*normals(1, query_length, key_length, 32), torch.float16)


@pytest.mark.parametrize(("query_length", "key_length"), [(1, 1), (1, 129), (17, 63), (63, 17), (63, 63), (129, 1)])
def test_odd_lengths_match_fp64_in_full_precision(query_length: int, key_length: int) -> None:
    check(*normals(1, query_length, key_length, 32), torch.float32)


@pytest.mark.parametrize("head_width", [16, 48, 64, 80, 128, 208, 256])
def test_every_kind_of_head_width_matches_fp64(head_width: int) -> None:
    check(*normals(1, 33, 70, head_width), torch.float16)
    check(*normals(1, 17, 33, head_width), torch.float32)


def test_batch_and_heads_are_told_apart() -> None:
    check(*normals(3, 20, 70, 16, batch=2), torch.float16)


def test_scale_is_used() -> None:
    check(*normals(1, 20, 40, 16), torch.float32, scale=0.7)


def test_long_keys_pass_the_main_loop_many_times() -> None:
    check(*normals(1, 65, 400, 16), torch.float16)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    (q, k, v), grad_out = normals(1, 33, 70, 16)
    for sign in (1, -1):  # all scores far above 0, then far below: a padded key would win the softmax
        check([q.abs() * 20 * sign, k.abs() * 20, v], grad_out, torch.float32)


def test_strided_and_expanded_inputs_match_fp64() -> None:
    fused = normal(2, 19, 3, 2, 16)  # [B, L, (q, k, v), N, K], as one projection writes it
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    check([q, k, v], normal(1, 2, 19, 16).expand(2, 2, 19, 16), torch.float32)
    transposed = normal(2, 2, 16, 19).mT  # head width without unit stride
    check([transposed, k, v], normal(2, 2, 19, 16), torch.float32)
    check([q, k[:, :, ::2], v[:, :, ::2]], normal(2, 2, 19, 16), torch.float32)


def test_every_tensor_has_strides_of_its_own() -> None:
    """Four memory orders of [B, N, L, K], so that no tensor can be read with another's strides."""
    q, k, v, grad_out = (
        normal(2, 3, 20, 16),
        normal(2, 37, 3, 16).transpose(1, 2),
        normal(37, 3, 2, 16).permute(2, 1, 0, 3),
        normal(3, 2, 20, 16).transpose(0, 1),
    )
    check([q, k, v], grad_out, torch.float16)


def test_strides_reach_the_kernel_uncopied() -> None:
    fused = normal(2, 19, 3, 2, 16).float()
    strided = [fused[:, :, i].transpose(1, 2) for i in range(3)]
    assert not any(x.is_contiguous() for x in strided)
    out = attention(*strided)
    assert torch.equal(out, attention(*(x.contiguous() for x in strided)))
    assert out.transpose(1, 2).is_contiguous()


def test_empty_batch_gives_empty_results() -> None:
    q, k, v = (torch.empty(0, 2, n, 16, requires_grad=True) for n in (5, 7, 7))
    grads = torch.autograd.grad(attention(q, k, v).sum(), [q, k, v])
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_bf16_goes_around_the_interpreter() -> None:
    q, k, v = (torch.randn(1, 1, 20, 16, dtype=torch.bfloat16) for _ in range(3))
    exact = plain_attention(q.double(), k.double(), v.double(), 0.25)
    assert (attention(q, k, v) - exact).abs().max() < 0.02


def test_backward_repeats_bit_for_bit() -> None:
    inputs, grad_out = normals(2, 129, 100, 32)
    first, second = (run(attention, inputs, grad_out, torch.float16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
