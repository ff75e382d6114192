from itertools import pairwise

import pytest
import torch

from muybridge.train.optimizer import OptimizerConfig, Schedule, build_optimizer, learning_rate


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
