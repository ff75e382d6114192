"""One step of AdamW on one tensor, with clipping and a moving average of the weights, in a single pass over the data.

`adamw_` is the public name. On CUDA it calls the operator `muybridge::adamw_`, which updates its operands in place.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import Backend, has_kernel, pointwise_backend

GRADIENT_DTYPES = (torch.float32, torch.bfloat16)


class StepFactors(NamedTuple):
    """The scalars of one step, worked out in double precision: in single precision 1 - 0.999 has an error of 3e-5."""

    # What weight decay leaves: 1 - lr * weight_decay.
    decay: float
    first_weight: float  # 1 - beta1
    second_decay: float  # beta2
    second_weight: float  # 1 - beta2
    # lr over the first moment's bias correction, and the root of the second moment's.
    step_size: float
    root_correction: float
    eps: float


def step_factors(*, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> StepFactors:
    """The scalars of the update number `step`, 1 for the first."""
    beta1, beta2 = betas
    return StepFactors(
        decay=1 - lr * weight_decay,
        first_weight=1 - beta1,
        second_decay=beta2,
        second_weight=1 - beta2,
        step_size=lr / (1 - beta1**step),
        root_correction=math.sqrt(1 - beta2**step),
        eps=eps,
    )


def reference_adamw_(
    param: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None,
    clip_coefficient: Tensor | None,
    factors: StepFactors,
    average_weight: float,
) -> None:
    """The mathematics of the kernel, in the order of torch.optim.AdamW."""
    if average is not None:
        average.lerp_(param, average_weight)
    gradient = gradient.to(param.dtype)
    if clip_coefficient is not None:
        gradient = gradient * clip_coefficient
    param.mul_(factors.decay)
    exp_avg.lerp_(gradient, factors.first_weight)
    exp_avg_sq.mul_(factors.second_decay).addcmul_(gradient, gradient, value=factors.second_weight)
    denominator = (exp_avg_sq.sqrt() / factors.root_correction).add_(factors.eps)
    param.addcdiv_(exp_avg, denominator, value=-factors.step_size)


@torch.library.custom_op("muybridge::adamw_", mutates_args=("param", "exp_avg", "exp_avg_sq", "average"))
def adamw_operator(
    param: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None,
    clip_coefficient: Tensor | None,
    factors: list[float],
    average_weight: float,
) -> None:
    """The operator behind `adamw_`; `factors` are those of `step_factors`, in order."""
    operands = (param, gradient, exp_avg, exp_avg_sq, average, clip_coefficient, StepFactors(*factors), average_weight)
    if has_kernel(param):
        from .adamw_kernels import run_adamw  # here, so that machines without Triton can import this module

        run_adamw(*operands)
    else:
        reference_adamw_(*operands)


@adamw_operator.register_fake
def _(
    param: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None,
    clip_coefficient: Tensor | None,
    factors: list[float],
    average_weight: float,
) -> None:
    return None


@torch.no_grad()
def adamw_(
    param: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_coefficient: Tensor | None = None,
    average: Tensor | None = None,
    average_weight: float = 0.0,
) -> None:
    """Moves `param` and its moments by one step of AdamW, in place; all tensors have one shape.

    The formulas are Loshchilov and Hutter's (arXiv:1711.05101, algorithm 2) in torch.optim.AdamW's order of operations:
        g = clip_coefficient * gradient
        exp_avg += (1 - beta1) (g - exp_avg);  exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
        param = (1 - lr weight_decay) param - lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
    `step` is 1 for the first update. `clip_coefficient` stays on the device: reading it makes nobody wait. An `average` first
    moves by `average_weight` of the way to `param` as it was before this step, that is to what the step before this one left.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit together, step below 1, or an average_weight outside [0, 1].
            The rules are the same on every backend.
    """
    _check(param, gradient, exp_avg, exp_avg_sq, average, clip_coefficient)
    if step < 1:
        raise ValueError(f"adamw_: step={step} must be 1 for the first update, or more")
    if not 0 <= average_weight <= 1:
        raise ValueError(f"adamw_: average_weight={average_weight} must lie in [0, 1]")
    factors = step_factors(step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    tensors = (param, gradient, exp_avg, exp_avg_sq, average, clip_coefficient)
    if pointwise_backend("adamw", param) is Backend.own:
        adamw_operator(*tensors, list(factors), average_weight)
    else:
        reference_adamw_(*tensors, factors, average_weight)


def _check(
    param: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None,
    clip_coefficient: Tensor | None,
) -> None:
    given = {"param": param, "gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    given |= {"average": average} if average is not None else {}
    written = [tensor for name, tensor in given.items() if name != "gradient"]
    if any(tensor.shape != param.shape for tensor in given.values()):
        rule = "must share one shape"
    elif clip_coefficient is not None and clip_coefficient.numel() != 1:
        rule = "must come with a clip_coefficient of one element"
    elif param.dtype not in (torch.float32, torch.float64) or any(x.dtype != param.dtype for x in written):
        rule = "must be float32 (or float64, without a kernel), the gradient aside"
    elif gradient.dtype not in (*GRADIENT_DTYPES, param.dtype):
        rule = "must have a gradient of float32, bfloat16 or the parameter's dtype"
    elif clip_coefficient is not None and clip_coefficient.dtype != param.dtype:
        rule = "must come with a clip_coefficient of the parameter's dtype"
    elif any(x.device != param.device for x in (*given.values(), clip_coefficient) if x is not None):
        rule = "must be on one device"
    elif not all(tensor.is_contiguous() for tensor in written):
        rule = "must be contiguous, the gradient aside"
    else:
        return
    given |= {"clip_coefficient": clip_coefficient} if clip_coefficient is not None else {}
    tensors = ", ".join(f"{name} {list(x.shape)} {x.dtype} on {x.device}" for name, x in given.items())
    raise ValueError(f"adamw_: {tensors}: {rule}")
