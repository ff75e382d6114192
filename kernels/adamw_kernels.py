"""The kernel of AdamW's update and the function that launches it: every operand is read and written once.

Bytes a parameter, with fp32 gradients: 28 (gradient 4; parameter and both moments 12 read, 12 written), and 8 more where the
average of the weights moves along. Apart, the average would cost 12, and clipping by multiplying the gradient in place 8.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .adamw import StepFactors
from .attention_tiles import on_device_of
from .compile_case import CompileCase

# Elements of one program: two 16-byte accesses a thread and fp32 operand, all loads in flight at once. Not timed yet.
BLOCK = 1024
WARPS = 4


@triton.jit
def _lerp(start, end, weight):
    """torch.lerp's two forms: each is exact at its own end."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit
def _update(
    param_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, clip, offsets, numel,
    decay, first_weight, second_decay, second_weight, step_size, root_correction, eps, average_weight,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One block of elements. A mask on a ragged length would break 16-byte accesses up, so only the last block has one."""
    mask = offsets < numel if MASKED else None
    param = tl.load(param_ptr + offsets, mask=mask)
    gradient = tl.load(gradient_ptr + offsets, mask=mask).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask)
    if average_ptr is not None:
        average = _lerp(tl.load(average_ptr + offsets, mask=mask), param, average_weight)
        tl.store(average_ptr + offsets, average, mask=mask)
    gradient *= clip
    exp_avg = _lerp(exp_avg, gradient, first_weight)
    exp_avg_sq = exp_avg_sq * second_decay + second_weight * (gradient * gradient)
    # Correctly rounded root and quotients, as in torch: Triton's plain ones are approximations.
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root_correction) + eps
    param = param * decay - step_size * tl.div_rn(exp_avg, denominator)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
    tl.store(param_ptr + offsets, param, mask=mask)


@triton.jit
def adamw_kernel(
    param_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, clip_ptr, numel,
    decay, first_weight, second_decay, second_weight, step_size, root_correction, eps, average_weight,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK neighbouring elements. `average_ptr` and `clip_ptr` may be None."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    clip = 1.0
    if clip_ptr is not None:
        clip = tl.load(clip_ptr)
    if start + BLOCK <= numel:
        _update(
            param_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, clip, offsets, numel,
            decay, first_weight, second_decay, second_weight, step_size, root_correction, eps, average_weight,
            False,
        )  # fmt: skip
    else:
        _update(
            param_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, clip, offsets, numel,
            decay, first_weight, second_decay, second_weight, step_size, root_correction, eps, average_weight,
            True,
        )  # fmt: skip


def run_adamw(
    param: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None,
    clip_coefficient: Tensor | None,
    factors: StepFactors,
    average_weight: float,
) -> None:
    """Updates fp32 tensors of one shape, which lie contiguously in memory, in place."""
    numel = param.numel()
    if numel == 0:
        return
    with on_device_of(param):
        adamw_kernel[(triton.cdiv(numel, BLOCK),)](
            param, gradient.contiguous(), exp_avg, exp_avg_sq, average, clip_coefficient, numel,
            *factors, average_weight,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """The launches of a training step (with and without an average that moves) and one with bf16 gradients."""
    tensors = ("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr")
    for architecture in (80, 90):
        for gradient, operands in (("fp32", ()), ("fp32", ("average", "clip")), ("bf16", ("average", "clip"))):
            optional = {name: f"{name}_ptr" for name in ("average", "clip")}
            yield CompileCase(
                name="/".join(("adamw", gradient, *operands)),
                kernel=adamw_kernel,
                types={
                    **dict.fromkeys([*tensors, *(optional[name] for name in operands)], "*fp32"),
                    "gradient_ptr": f"*{gradient}",
                    "numel": "i64",  # of any length: the accesses must stay whole
                    **dict.fromkeys([*StepFactors._fields, "average_weight"], "fp32"),
                },
                constants={
                    "BLOCK": BLOCK,
                    **{pointer: None for name, pointer in optional.items() if name not in operands},
                },
                warps=WARPS,
                stages=3,
                architecture=architecture,
            )
