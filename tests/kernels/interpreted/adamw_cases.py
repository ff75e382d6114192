"""AdamW's pass in Triton's interpreter: every operand after a few steps against fp64 mathematics."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muybridge.kernels.adamw import adamw_
from muybridge.kernels.dispatch import Backend, forced

NAMES = ("param", "exp_avg", "exp_avg_sq", "average")
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def gradients(numel: int, steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of many magnitudes, some of them zero: torch skips nothing there, and nor may we."""
    generator = torch.Generator().manual_seed(numel)
    scales = [10.0 ** torch.randint(-6, 2, (numel,), generator=generator) for _ in range(steps)]
    grads = [torch.randn(numel, generator=generator) * scale for scale in scales]
    for gradient in grads:
        gradient[::7] = 0
    return [gradient.to(dtype) for gradient in grads]


def start(numel: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(numel + 1)
    param, average = (torch.randn(numel, generator=generator).to(dtype) for _ in range(2))
    return [param, torch.zeros_like(param), torch.zeros_like(param), average]


def run(
    grads: list[Tensor], dtype: torch.dtype, *, clip: float | None, weight: float | None, **changes: Any
) -> list[Tensor]:
    param, exp_avg, exp_avg_sq, average = start(len(grads[0]), dtype)
    for step, gradient in enumerate(grads, start=1):
        adamw_(
            param,
            gradient.to(dtype) if dtype == torch.float64 else gradient,
            exp_avg,
            exp_avg_sq,
            step=step,
            clip_coefficient=None if clip is None else torch.tensor(clip, dtype=dtype),
            average=None if weight is None else average,
            average_weight=weight or 0.0,
            **{**SETTINGS, **changes},
        )
    return [param, exp_avg, exp_avg_sq, average]


def check(
    grads: list[Tensor], *, clip: float | None = None, weight: float | None = None, rounding: int = 2, **changes: Any
) -> None:
    """Twice the error of eager fp32 code, plus a few roundings of each element where eager is lucky or exact."""
    exact = run(grads, torch.float64, clip=clip, weight=weight, **changes)
    with forced(pointwise=Backend.reference):
        eager = run(grads, torch.float32, clip=clip, weight=weight, **changes)
    ours = run(grads, torch.float32, clip=clip, weight=weight, **changes)
    for name, result, peer, truth in zip(NAMES, ours, eager, exact, strict=True):
        floor = rounding * len(grads) * torch.finfo(torch.float32).eps * truth.abs()
        error, allowed = (result - truth).abs(), 2 * (peer - truth).abs().max() + floor
        assert (error <= allowed).all(), f"{name}: {(error - allowed).max():.2e} too much"


@pytest.mark.parametrize("numel", [1, 17, 63, 129, 1000, 1023, 1024, 1025, 2048, 4097])
def test_every_length_matches_fp64(numel: int) -> None:
    check(gradients(numel, 3), clip=0.3, weight=0.2)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    numel=st.integers(1, 3000),
    clip=st.none() | st.floats(1e-3, 1.0),
    weight=st.none() | st.floats(1e-4, 1.0),
    weight_decay=st.sampled_from([0.0, 0.3]),
    beta1=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_any_settings_match_fp64(
    numel: int, clip: float | None, weight: float | None, weight_decay: float, beta1: float
) -> None:
    check(gradients(numel, 2), clip=clip, weight=weight, weight_decay=weight_decay, betas=(beta1, 0.95), eps=1e-5)


def test_bf16_gradients_are_read_as_they_are() -> None:
    check(gradients(1029, 2, torch.bfloat16), clip=0.3, weight=0.1)


def test_torch_adamw_gives_the_same_to_a_rounding() -> None:
    grads = gradients(1500, 5)
    param, exp_avg, exp_avg_sq, _ = run(grads, torch.float32, clip=None, weight=None)
    peer = start(1500, torch.float32)[0].requires_grad_()
    optimizer = torch.optim.AdamW([peer], **SETTINGS, foreach=False)
    for gradient in grads:
        peer.grad = gradient.clone()
        optimizer.step()
    state = optimizer.state[peer]
    for ours, theirs in ((param, peer.detach()), (exp_avg, state["exp_avg"]), (exp_avg_sq, state["exp_avg_sq"])):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_average_follows_what_the_step_before_left() -> None:
    param, exp_avg, exp_avg_sq, average = start(2000, torch.float32)
    before, expected = param.clone(), torch.lerp(average, param, 0.25)
    adamw_(param, torch.ones(2000), exp_avg, exp_avg_sq, step=1, average=average, average_weight=0.25, **SETTINGS)
    assert torch.equal(average, expected)
    assert not torch.equal(param, before)


def test_neighbours_in_memory_are_left_alone() -> None:
    """Shards that start and end in the middle of larger tensors, at odd addresses."""
    whole = [torch.full((3000,), 7.0) for _ in range(4)]
    param, exp_avg, exp_avg_sq, average = (tensor[5:1500] for tensor in whole)
    adamw_(param, torch.ones(1495), exp_avg, exp_avg_sq, step=1, average=average, average_weight=0.5, **SETTINGS)
    for tensor in whole:
        assert (tensor[:5] == 7).all()
        assert (tensor[1500:] == 7).all()
    for tensor in whole[:3]:
        assert (tensor[5:1500] != 7).all()


def test_a_strided_gradient_is_read_by_its_strides() -> None:
    gradient = torch.randn(40, 30).T
    results = []
    for given_gradient in (gradient, gradient.contiguous()):
        param, exp_avg, exp_avg_sq = torch.ones(30, 40), torch.zeros(30, 40), torch.zeros(30, 40)
        adamw_(param, given_gradient, exp_avg, exp_avg_sq, step=1, **SETTINGS)
        results.append(param)
    assert torch.equal(*results)


def test_empty_shards_are_allowed() -> None:
    empty = torch.empty(0)
    adamw_(empty, empty, empty.clone(), empty.clone(), step=1, **SETTINGS)


def test_the_same_operands_give_the_same_bits() -> None:
    grads = gradients(2500, 3)
    first, second = (run(grads, torch.float32, clip=0.5, weight=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
