"""The launch tables of attention's backward kernels, and every launch as a case to compile without a GPU."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .attention_backward_kernels import (
    delta_kernel,
    finish_grad_query_kernel,
    grad_key_value_kernel,
    grad_query_kernel,
)
from .attention_mask import MASK_TILE
from .attention_tiles import Launch, launch_constants, padded_head_width
from .compile_case import CompileCase

# Keyed by the head width padded to 64, 128 or 256; see attention_forward.py for the rules of the tables. A load is under way for
# `stages` - 2 whole steps before it is needed. No entry has been timed yet.
HOPPER_GRAD_QUERY = {
    64: Launch(128, 64, 8, 3, descriptors=True),
    128: Launch(128, 64, 8, 3, descriptors=True),
    256: Launch(128, 32, 8, 3, descriptors=True),
}
HOPPER_GRAD_KEY_VALUE = {
    64: Launch(64, 128, 8, 3, descriptors=True),
    128: Launch(64, 128, 8, 3, descriptors=True),
    256: Launch(32, 64, 8, 3, descriptors=True),
}
HOPPER_MASKED_GRAD_KEY_VALUE = HOPPER_GRAD_KEY_VALUE | {256: Launch(16, 64, 8, 2, descriptors=True)}
# 128 keys halve the sums' traffic, but with a mask the registers only last for 64, and for 32 queries.
HOPPER_FUSED = {
    64: Launch(64, 128, 8, 3, descriptors=True),
    128: Launch(32, 128, 8, 3, descriptors=True),
}
HOPPER_MASKED_FUSED = HOPPER_FUSED | {128: Launch(32, 64, 8, 3, descriptors=True)}
AMPERE_GRAD_QUERY = {
    64: Launch(64, 64, 4, 2),
    128: Launch(64, 64, 8, 2),
    256: Launch(64, 32, 8, 1),
}
AMPERE_GRAD_KEY_VALUE = {
    64: Launch(64, 64, 4, 2),
    128: Launch(64, 64, 8, 2),
    256: Launch(32, 32, 8, 1),
}
AMPERE_MASKED_GRAD_KEY_VALUE = AMPERE_GRAD_KEY_VALUE | {64: Launch(64, 32, 4, 2)}
AMPERE_FUSED = {
    64: Launch(32, 64, 4, 2),
    128: Launch(64, 64, 8, 2),
}
AMPERE_MASKED_FUSED = AMPERE_FUSED | {128: Launch(32, 64, 8, 2)}
FP32_GRAD_QUERY = {
    64: Launch(16, 16, 4, 1),
    128: Launch(16, 16, 4, 1),
    256: Launch(16, 16, 8, 1),
}
FP32_GRAD_KEY_VALUE = {
    64: Launch(16, 16, 4, 1),
    128: Launch(16, 16, 8, 1),
    256: Launch(16, 16, 4, 1),
}
# The kernels that run over rows once.
ROWS_LAUNCH = Launch(queries=32, keys=0, warps=4, stages=1)


class Launches(NamedTuple):
    """The launches of one backward pass. Without one for dQ, the kernel of dK and dV adds up dQ too."""

    grad_query: Launch | None
    grad_key_value: Launch


def choose_launches(
    dtype: torch.dtype, head_width: int, *, hopper: bool, masked: bool, deterministic: bool
) -> Launches:
    """What the tables say."""
    width = padded_head_width(head_width)
    if dtype == torch.float32:
        return Launches(FP32_GRAD_QUERY[width], FP32_GRAD_KEY_VALUE[width])
    if hopper:
        fused = HOPPER_MASKED_FUSED if masked else HOPPER_FUSED
        grad_query, grad_key_value = (
            HOPPER_GRAD_QUERY,
            HOPPER_MASKED_GRAD_KEY_VALUE if masked else HOPPER_GRAD_KEY_VALUE,
        )
    else:
        fused = AMPERE_MASKED_FUSED if masked else AMPERE_FUSED
        grad_query, grad_key_value = (
            AMPERE_GRAD_QUERY,
            AMPERE_MASKED_GRAD_KEY_VALUE if masked else AMPERE_GRAD_KEY_VALUE,
        )
    if not deterministic and width in fused:
        return Launches(None, fused[width])
    return Launches(grad_query[width], grad_key_value[width])


def compile_cases() -> Iterator[CompileCase]:
    """Every launch of the tables, and a padded head width where it is hardest, as tensors with aligned strides launch them."""
    for architecture in (80, 90):
        for width, masked in [
            (64, False),
            (128, False),
            (256, False),
            (64, True),
            (96, True),
            (128, True),
            (256, True),
        ]:
            for deterministic in (True, False):
                launches = choose_launches(
                    torch.bfloat16, width, hopper=architecture == 90, masked=masked, deterministic=deterministic
                )
                if deterministic or launches.grad_query is None:
                    yield from _cases(launches, "bf16", width, masked=masked, architecture=architecture)
        constants = {"HEAD_WIDTH": 128, "BLOCK_K": 128, "BLOCK_L": ROWS_LAUNCH.queries}
        for name, kernel in (("delta", delta_kernel), ("finish_grad_query", finish_grad_query_kernel)):
            yield _case(f"attention_{name}/bf16/128", kernel, ROWS_LAUNCH, "bf16", constants, architecture)
    for width in (64, 128, 256):
        launches = Launches(FP32_GRAD_QUERY[width], FP32_GRAD_KEY_VALUE[width])
        yield from _cases(launches, "fp32", width, masked=True, architecture=80)


def _cases(
    launches: Launches, dtype: str, head_width: int, *, masked: bool, architecture: int
) -> Iterator[CompileCase]:
    fused = launches.grad_query is None
    name = f"{dtype}/{head_width}/{'masked' if masked else 'dense'}"
    lists = ["tiles_ptr", "counts_ptr"]
    rules = ["query_low_ptr", "query_high_ptr", "key_position_ptr"]
    if launches.grad_query is not None:
        launch, absent = launches.grad_query, [] if masked else [*rules, *(f"key_{x}" for x in lists)]
        sizes = launch_constants(launch, head_width)
        constants = {**sizes, "DESCRIBED": launch.descriptors, **dict.fromkeys(absent)}
        case = f"attention_grad_query/{name}"
        yield _case(case, grad_query_kernel, launch, dtype, constants, architecture)
    launch, absent = launches.grad_key_value, [] if masked else [*rules, *(f"query_{x}" for x in lists)]
    bulk_add, absent = fused and launch.descriptors, absent if fused else [*absent, "grad_q_sums"]
    sizes = launch_constants(launch, head_width)
    constants = {**sizes, "DESCRIBED": launch.descriptors, "BULK_ADD": bulk_add, **dict.fromkeys(absent)}
    case = f"attention_{'fused_backward' if fused else 'grad_key_value'}/{name}"
    yield _case(case, grad_key_value_kernel, launch, dtype, constants, architecture)


def _case(
    name: str, kernel: Any, launch: Launch, dtype: str, constants: dict[str, Any], architecture: int
) -> CompileCase:
    constants = {key: value for key, value in constants.items() if not key.startswith("num_")} | {"TILE": MASK_TILE}
    block_k, rows = constants["BLOCK_K"], {"k_rows": launch.keys, "v_rows": launch.keys}
    types = {}
    for argument in (parameter.name for parameter in kernel.params if not parameter.is_constexpr):
        if argument.startswith("stride_") or argument in ("heads", "query_length", "key_length", "mask_step"):
            types[argument] = "i32"
        elif argument.startswith("scale"):
            types[argument] = "fp32"
        elif argument in ("lse_rows", "delta_rows"):
            types[argument] = f"tensordesc<fp32[1,{launch.queries}]>" if launch.descriptors else "*fp32"
        elif argument.endswith("_rows"):
            block = f"[1,1,{rows.get(argument, launch.queries)},{block_k}]"
            types[argument] = f"tensordesc<{dtype}{block}>" if launch.descriptors else f"*{dtype}"
        elif argument == "grad_q_sums":
            types[argument] = f"tensordesc<fp32[{block_k},{launch.queries}]>" if launch.descriptors else "*fp32"
        elif argument.startswith(("key_", "query_")):
            types[argument] = "*i32"
        else:
            types[argument] = "*fp32" if "lse" in argument or "delta" in argument else f"*{dtype}"
    return CompileCase(
        name=name,
        kernel=kernel,
        types={argument: kind for argument, kind in types.items() if argument not in constants},
        constants=constants,
        warps=launch.warps,
        stages=launch.stages,
        architecture=architecture,
        aligned=tuple(argument for argument in types if argument.startswith("stride_")),
        has_matmul=dtype != "fp32" and launch is not ROWS_LAUNCH,
    )
