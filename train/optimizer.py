"""AdamW with its parameter groups, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.adamw import adamw_
from ..kernels.dispatch import Backend, pointwise_backend
from .flat_shards import full_shape
from .muon import Muon, is_block_matrix

# Where a shard's state holds the average (and its weight) that the next step moves on its way; see EMA.
PENDING_AVERAGE = "pending_average"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"


class OptimizerKind(Enum):
    adamw = "adamw"
    muon = "muon"


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), or Muon beside it, with warm-up and decay."""

    # adamw updates all parameters; muon the matrices of the transformer's blocks, at the same lr, and leaves the others to AdamW.
    kind: OptimizerKind = OptimizerKind.adamw
    # Peak learning rate.
    lr: float = 1e-4
    # Decay rates of the first and second moments.
    beta1: float = 0.9
    beta2: float = 0.999
    # Added to the root of the second moment.
    eps: float = 1e-8
    # Decay rate of Muon's average of gradients, which is its only one; 0 is off.
    momentum: float = 0.95
    # Decoupled decay of matrices and kernels; biases, norms and tables are not decayed. 0 is off.
    weight_decay: float = 0.01
    # Largest norm of the whole gradient; 0 is off.
    gradient_clipping: float = 1.0
    # Steps of linear warm-up from lr / warmup_steps; 0 is off.
    warmup_steps: int = 0
    schedule: Schedule = Schedule.constant
    # The cosine schedule ends at this share of lr.
    final_lr_fraction: float = 0.0
    # Learning rate of the built-in text encoder, relative to lr.
    text_encoder_lr_scale: float = 1.0

    def faults(self, field: str) -> list[str]:
        found = []
        if not self.lr > 0:
            found.append(f"{field}.lr={self.lr} must be positive")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{field}.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("weight_decay", "gradient_clipping", "warmup_steps"):
            if getattr(self, name) < 0:
                found.append(f"{field}.{name}={getattr(self, name)} must be 0 (off) or more")
        for name in ("eps", "text_encoder_lr_scale"):
            if not getattr(self, name) > 0:
                found.append(f"{field}.{name}={getattr(self, name)} must be positive")
        if not 0 <= self.final_lr_fraction <= 1:
            found.append(f"{field}.final_lr_fraction={self.final_lr_fraction} must lie in [0, 1]")
        return found


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, on_host: bool = False) -> torch.optim.Optimizer:
    """AdamW or Muon over the trainable parameters; each group carries `lr_scale`, its learning rate relative to the schedule's.

    `on_host`: its shards will lie in the memory of the host, wherever the parameters are. Raises ValueError where Muon has nothing
    to do.
    """
    is_muon = config.kind is OptimizerKind.muon
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = name.endswith("scale_shift_table")
        shape = full_shape(parameter)
        decay = config.weight_decay if len(shape) > 1 and not is_table else 0.0
        lr_scale = config.text_encoder_lr_scale if name.startswith("text_encoder.") else 1.0
        groups.setdefault((is_muon and is_block_matrix(name, shape), decay, lr_scale), []).append(parameter)
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,
    }
    if is_muon:
        if not any(orthogonal for orthogonal, _, _ in groups):
            raise ValueError("optimizer.kind=muon must be adamw for a model without matrices in `blocks`")
        return Muon(
            [
                {
                    "params": parameters,
                    "weight_decay": decay,
                    "lr_scale": lr_scale,
                    "momentum": config.momentum,
                    "orthogonal": orthogonal,
                }
                for (orthogonal, decay, lr_scale), parameters in groups.items()
            ],
            **settings,
        )
    has_kernel = not on_host and all(
        pointwise_backend("adamw", parameter) is Backend.own
        for parameters in groups.values()
        for parameter in parameters
    )
    return (ShardAdamW if has_kernel else torch.optim.AdamW)(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": lr_scale}
            for (_, decay, lr_scale), parameters in groups.items()
        ],
        **settings,
    )


class ShardAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the same states, in one pass over the one flat shard that ZeRO makes of a group of parameters.

    The pass also clips, and moves the average of the weights that PENDING_AVERAGE names. Bytes that a step reads and writes for
    each parameter of a shard, with bf16 at ZeRO 1 or 2, by DeepSpeed 0.19.8's source (its all-gather aside):

                        check for  norm in  flat fp32                     weights of
                         overflow     fp64   gradient  clip  AdamW  EMA  the forward  all
        torch's AdamW           4       18         10     8     28   12            6   86
        this one                4       18         10     -     28    8            6   74

    It is 72 instead of 84 with fp32, and 4 less instead of 12 at ZeRO 3, where DeepSpeed keeps the clipping.
    """

    # Set by the engine where this optimizer clips: the factor to multiply all gradients with, a scalar on their device.
    clip_coefficient: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every shard that has a gradient."""
        if any(len(group["params"]) > 1 for group in self.param_groups):
            # Without ZeRO there are no shards: torch packs many small tensors into few launches.
            return super().step(closure)
        assert closure is None, "DeepSpeed passes none"
        clip_coefficient = self.clip_coefficient() if self.clip_coefficient is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, clip_coefficient)
        return None

    def _update(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], clip_coefficient: Tensor | None
    ) -> None:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        # On the CPU, where reading it makes nobody wait; a checkpoint puts it on the GPU.
        state["step"] = state["step"].cpu() + 1
        average, average_weight = state.pop(PENDING_AVERAGE, (None, 0.0))
        adamw_(
            parameter,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            clip_coefficient=clip_coefficient,
            average=average,
            average_weight=average_weight,
        )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of `step` (0 for the first): linear warm-up, then constant or a half cosine down to the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule is Schedule.constant:
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    floor = config.final_lr_fraction
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
