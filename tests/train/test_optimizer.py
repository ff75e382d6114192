from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from muybridge.kernels.dispatch import INTERPRETED, Backend, forced
from muybridge.train.optimizer import (
    PENDING_AVERAGE,
    OptimizerConfig,
    Schedule,
    ShardAdamW,
    build_optimizer,
    learning_rate,
)

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.3}


def test_a_constant_schedule_warms_up_linearly_to_lr() -> None:
    config = OptimizerConfig(lr=0.8, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(OptimizerConfig(lr=0.3), 0, 10) == 0.3


def test_a_cosine_schedule_falls_by_half_at_half_way_and_ends_at_its_floor() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule=Schedule.cosine, final_lr_fraction=0.2)
    assert learning_rate(config, 9, 110) == 1.0
    assert learning_rate(config, 10, 110) == 1.0
    assert learning_rate(config, 60, 110) == pytest.approx(0.6)  # half way between 1 and 0.2
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)
    assert learning_rate(config, 500, 110) == pytest.approx(0.2)
    rates = [learning_rate(config, step, 110) for step in range(10, 111)]
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_a_run_shorter_than_its_warm_up_has_a_rate() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule=Schedule.cosine)
    assert learning_rate(config, 3, 5) == pytest.approx(0.4)


def test_matrices_decay_and_vectors_and_tables_do_not() -> None:
    model = torch.nn.Module()
    model.text_encoder = torch.nn.Linear(3, 3)
    model.linear = torch.nn.Linear(3, 3)
    model.convolution = torch.nn.Conv3d(2, 2, 3)
    model.norm = torch.nn.LayerNorm(3)
    model.scale_shift_table = torch.nn.Parameter(torch.zeros(1, 6, 3))
    model.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1, text_encoder_lr_scale=0.5))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        (group["weight_decay"], group["lr_scale"]): {names[parameter] for parameter in group["params"]}
        for group in optimizer.param_groups
    }
    assert groups == {
        (0.1, 1.0): {"linear.weight", "convolution.weight"},
        (0.0, 1.0): {"linear.bias", "convolution.bias", "norm.weight", "norm.bias", "scale_shift_table"},
        (0.1, 0.5): {"text_encoder.weight"},
        (0.0, 0.5): {"text_encoder.bias"},
    }


def test_our_optimizer_is_built_where_our_kernels_run() -> None:
    on_meta = torch.nn.Linear(3, 3, device="meta")  # which promises what a GPU would do
    assert type(build_optimizer(on_meta, OptimizerConfig())) is ShardAdamW
    with forced(pointwise=Backend.reference):
        assert type(build_optimizer(on_meta, OptimizerConfig())) is torch.optim.AdamW
    if not INTERPRETED:
        assert type(build_optimizer(torch.nn.Linear(3, 3), OptimizerConfig())) is torch.optim.AdamW


def steps(optimizer: torch.optim.Optimizer, parameters: list[Tensor], numbers: range) -> None:
    """Each with gradients and a learning rate of its own."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def shard() -> Tensor:
    return torch.linspace(-1, 1, 50).requires_grad_()


def test_a_shard_is_updated_as_torch_does() -> None:
    ours, theirs = shard(), shard()
    mine, peer = ShardAdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS, foreach=False)
    steps(mine, [ours], range(5))
    steps(peer, [theirs], range(5))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert mine.state[ours].keys() == peer.state[theirs].keys()
    for name, value in peer.state[theirs].items():
        torch.testing.assert_close(mine.state[ours][name], value, rtol=1e-6, atol=1e-7)


def test_several_tensors_in_a_group_are_torchs_own_step() -> None:
    ours, theirs = [shard(), shard()], [shard(), shard()]
    steps(ShardAdamW(ours, fused=True, **SETTINGS), ours, range(3))
    steps(torch.optim.AdamW(theirs, fused=True, **SETTINGS), theirs, range(3))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("classes", [(ShardAdamW, torch.optim.AdamW), (torch.optim.AdamW, ShardAdamW)])
def test_state_dicts_are_torchs(classes: tuple[type[torch.optim.AdamW], type[torch.optim.AdamW]]) -> None:
    whole = shard()
    steps(ShardAdamW([whole], fused=True, **SETTINGS), [whole], range(4))
    parameter = shard()
    first = classes[0]([parameter], fused=True, **SETTINGS)
    steps(first, [parameter], range(2))
    second = classes[1]([parameter], fused=True, **SETTINGS)
    second.load_state_dict(first.state_dict())
    steps(second, [parameter], range(2, 4))
    torch.testing.assert_close(parameter, whole, rtol=1e-6, atol=1e-7)


def test_a_shard_without_a_gradient_is_left_alone() -> None:
    ours = shard()
    optimizer = ShardAdamW([ours], **SETTINGS)
    optimizer.step()
    assert torch.equal(ours, shard())
    assert not optimizer.state[ours]


def test_a_step_clips_and_moves_a_waiting_average_once() -> None:
    ours, theirs, average = shard(), shard(), torch.zeros(50)
    optimizer, peer = ShardAdamW([ours], eps=1.0), ShardAdamW([theirs], eps=1.0)
    optimizer.clip_coefficient = lambda: torch.tensor(0.5)
    optimizer.state[ours][PENDING_AVERAGE] = (average, 0.25)
    ours.grad, theirs.grad = torch.ones(50), torch.full((50,), 0.5)
    optimizer.step()
    peer.step()
    assert torch.equal(ours, theirs)
    moved = 0.25 * shard().detach()
    assert torch.equal(average, moved)
    optimizer.step()
    assert torch.equal(average, moved)


def test_every_broken_rule_is_named() -> None:
    config = OptimizerConfig(
        lr=float("nan"),
        beta1=1.0,
        beta2=-0.1,
        eps=0.0,
        weight_decay=-1.0,
        gradient_clipping=-1.0,
        warmup_steps=-1,
        final_lr_fraction=1.5,
        text_encoder_lr_scale=0.0,
    )
    fields = {fault.split("=")[0] for fault in config.faults("optimizer")}
    broken = "lr beta1 beta2 eps weight_decay gradient_clipping warmup_steps final_lr_fraction text_encoder_lr_scale"
    assert fields == {f"optimizer.{name}" for name in broken.split()}
    assert OptimizerConfig().faults("optimizer") == []
