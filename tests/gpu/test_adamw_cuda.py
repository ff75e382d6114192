"""AdamW's pass on a real GPU: accuracy against torch's fused step, repeatability, odd addresses, long shards, no waiting."""

from typing import Any

import pytest
import torch
from torch import Tensor

from muybridge.kernels.adamw import adamw_
from muybridge.kernels.dispatch import Backend, forced
from muybridge.train.optimizer import PENDING_AVERAGE, OptimizerConfig, ShardAdamW, build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
NAMES = ("param", "exp_avg", "exp_avg_sq", "average")


def gradients(numel: int, steps: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(numel)
    return [torch.randn(numel, device="cuda", generator=generator).to(dtype) * 10.0**-step for step in range(steps)]


def run(grads: list[Tensor], dtype: torch.dtype, *, clip: float | None, weight: float | None) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    numel = len(grads[0])
    param, average = (torch.randn(numel, device="cuda", generator=generator).to(dtype) for _ in range(2))
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    for step, gradient in enumerate(grads, start=1):
        adamw_(
            param,
            gradient.to(dtype) if dtype == torch.float64 else gradient,
            exp_avg,
            exp_avg_sq,
            step=step,
            clip_coefficient=None if clip is None else torch.tensor(clip, device="cuda", dtype=dtype),
            average=None if weight is None else average,
            average_weight=weight or 0.0,
            **SETTINGS,
        )
    return [param, exp_avg, exp_avg_sq, average]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("clip", "weight"), [(None, None), (0.3, None), (None, 1e-3), (0.3, 0.7)])
@pytest.mark.parametrize("numel", [1, 17, 1023, 1024, 1_000_003])
def test_a_few_steps_match_fp64(numel: int, clip: float | None, weight: float | None, dtype: torch.dtype) -> None:
    """At most twice the error of eager fp32 code, plus two roundings of each element and step."""
    grads = gradients(numel, 4, dtype)
    exact = run(grads, torch.float64, clip=clip, weight=weight)
    with forced(pointwise=Backend.reference):
        eager = run(grads, torch.float32, clip=clip, weight=weight)
    ours = run(grads, torch.float32, clip=clip, weight=weight)
    for name, result, peer, truth in zip(NAMES, ours, eager, exact, strict=True):
        floor = 2 * len(grads) * torch.finfo(torch.float32).eps * truth.abs()
        assert ((result - truth).abs() <= 2 * (peer - truth).abs().max() + floor).all(), name


def test_the_optimizer_equals_torchs_fused_one() -> None:
    ours, theirs = (torch.linspace(-1, 1, 1_000_003, device="cuda").requires_grad_() for _ in range(2))
    mine, peer = ShardAdamW([ours], fused=True, **SETTINGS), torch.optim.AdamW([theirs], fused=True, **SETTINGS)
    average, expected = torch.zeros_like(ours), torch.zeros_like(theirs)
    for step, gradient in enumerate(gradients(1_000_003, 5, torch.float32)):
        for optimizer, parameter in ((mine, ours), (peer, theirs)):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            parameter.grad = gradient.clone()
            optimizer.step()
        expected.lerp_(theirs.detach(), 0.3)
        mine.state[ours][PENDING_AVERAGE] = (average, 0.3)
    average.lerp_(ours.detach(), mine.state[ours].pop(PENDING_AVERAGE)[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(mine.state[ours][name], peer.state[theirs][name], rtol=5e-6, atol=5e-7)


def test_a_model_on_the_gpu_gets_our_optimizer() -> None:
    assert type(build_optimizer(torch.nn.Linear(3, 3, device="cuda"), OptimizerConfig())) is ShardAdamW


def test_the_same_operands_give_the_same_bits() -> None:
    grads = gradients(1_000_003, 3, torch.float32)
    first = run(grads, torch.float32, clip=0.3, weight=0.1)
    for _ in range(3):
        again = run(grads, torch.float32, clip=0.3, weight=0.1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_odd_addresses_give_the_same_bits_and_leave_neighbours_alone() -> None:
    numel = 100_000
    gradient = torch.randn(numel, device="cuda")
    results = []
    for offset in (0, 1, 3, 4):
        whole = [torch.full((numel + 8,), 0.5, device="cuda") for _ in range(4)]
        param, exp_avg, exp_avg_sq, average = (tensor[offset : offset + numel] for tensor in whole)
        adamw_(param, gradient, exp_avg, exp_avg_sq, step=1, average=average, average_weight=0.1, **SETTINGS)
        results.append([tensor.clone() for tensor in (param, exp_avg, exp_avg_sq, average)])
        assert all((tensor[:offset] == 0.5).all() and (tensor[offset + numel :] == 0.5).all() for tensor in whole)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 44 * 2**30:
        pytest.skip("needs 44 GiB of free GPU memory")
    numel = 2**31 + 1025
    gradient = torch.ones(numel, device="cuda", dtype=torch.bfloat16)
    param, exp_avg, exp_avg_sq, average = (torch.zeros(numel, device="cuda") for _ in range(4))
    adamw_(param, gradient, exp_avg, exp_avg_sq, step=1, average=average, average_weight=0.5, **SETTINGS)
    for tensor in (param, exp_avg, exp_avg_sq):
        assert tensor[0] != 0
        assert (tensor[-3000:] == tensor[0]).all()


def test_a_step_never_makes_the_host_wait() -> None:
    shard = torch.ones(5000, device="cuda", requires_grad=True)
    shard.grad = torch.ones_like(shard)
    norm = torch.full((), 3.0, device="cuda")
    optimizer = ShardAdamW([shard], fused=True, **SETTINGS)
    optimizer.clip_coefficient = lambda: (1.0 / (norm + 1e-6)).clamp(max=1.0)
    optimizer.step()  # the first one compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
