"""Launch table of the attention kernels, and the functions that allocate their outputs and launch them.

Tile sizes are committed rather than tuned while training: tuning stalls every rank at a different moment, and another winner
is another rounding.
"""

import contextlib
import dataclasses
import functools
import math

import torch
import triton

from .attention import empty_token_major
from .attention_kernels import delta_kernel, forward_kernel, grad_key_value_kernel, grad_query_kernel

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Sizes of one kernel: a step multiplies a tile of `queries` x `keys` scores; loads are pipelined `stages` deep."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Launches:
    """Launch sizes of the three matrix kernels for one head width, architecture and precision."""

    forward: Launch
    grad_query: Launch
    grad_key_value: Launch


# Keyed by the head width padded to 64, 128 or 256. tests/kernels/test_attention_code.py compiles every entry ahead of time and
# holds it to its limits (shared memory, no register spills, tensor cores). No entry has been timed yet.
HOPPER_LAUNCHES = {
    64: Launches(Launch(128, 64, 4, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 3)),
    128: Launches(Launch(128, 128, 8, 2), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2)),
    256: Launches(Launch(128, 64, 8, 2), Launch(128, 32, 8, 2), Launch(32, 64, 8, 2)),
}
# For every other GPU, so within the 99 KiB of shared memory that compute capabilities 8.6, 8.9 and 12.0 have (8.0: 163 KiB).
AMPERE_LAUNCHES = {
    64: Launches(Launch(128, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)),
    128: Launches(Launch(128, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
    256: Launches(Launch(64, 32, 8, 2), Launch(64, 32, 8, 1), Launch(32, 32, 8, 1)),
}
# fp32 runs on ordinary cores, since tensor cores would round it to tf32: small tiles, the same on every GPU.
FP32_LAUNCHES = {
    64: Launches(Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1)),
    128: Launches(Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1)),
    256: Launches(Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 4, 1)),
}
DELTA_LAUNCH = Launch(queries=32, keys=0, warps=4, stages=1)


def run_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output [B, N, L, K] (token-major in memory) and the base-2 log-sum-exp of the scaled scores [B, N, L]."""
    q, k, v = map(_with_unit_stride, (q, k, v))
    batch, heads, query_length, head_width = q.shape
    out, lse = empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    launches, block_k = _launches(q)
    launch = launches.forward
    if out.numel() > 0:
        with _on_device_of(q):
            forward_kernel[(triton.cdiv(query_length, launch.queries) * batch * heads,)](
                q, k, v, out, lse,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                heads, query_length, k.shape[2], scale * LOG2_E,
                **_constants(launch, head_width, block_k),
            )  # fmt: skip
    return out, lse


def run_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of q, k and v, token-major in memory, from what `run_forward` took and returned."""
    grad_out, q, k, v, out = map(_with_unit_stride, (grad_out, q, k, v, out))
    lse = lse.contiguous()
    batch, heads, query_length, head_width = q.shape
    key_length = k.shape[2]
    grad_q, grad_k, grad_v = empty_token_major(q), empty_token_major(k), empty_token_major(k)
    delta = torch.empty_like(lse)
    launches, block_k = _launches(q)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3])
    sizes = (heads, query_length, key_length, scale, scale * LOG2_E)
    if grad_q.numel() > 0:
        with _on_device_of(q):
            delta_kernel[(triton.cdiv(query_length, DELTA_LAUNCH.queries) * batch * heads,)](
                out, grad_out, delta, *out.stride()[:3], *grad_out.stride()[:3], heads, query_length,
                HEAD_WIDTH=head_width, BLOCK_K=block_k, BLOCK_L=DELTA_LAUNCH.queries, num_warps=DELTA_LAUNCH.warps,
            )  # fmt: skip
            launch = launches.grad_query
            grad_query_kernel[(triton.cdiv(query_length, launch.queries) * batch * heads,)](
                q, k, v, grad_out, lse, delta, grad_q, *strides, *grad_q.stride()[:3], *sizes,
                **_constants(launch, head_width, block_k),
            )  # fmt: skip
            launch = launches.grad_key_value
            grad_key_value_kernel[(triton.cdiv(key_length, launch.keys) * batch * heads,)](
                q, k, v, grad_out, lse, delta, grad_k, grad_v, *strides, *grad_k.stride()[:3], *sizes,
                **_constants(launch, head_width, block_k),
            )  # fmt: skip
    return grad_q, grad_k, grad_v


def _with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launches(q: torch.Tensor) -> tuple[Launches, int]:
    """Launch sizes for q, and the head width they are padded to (a power of two of at least 64)."""
    block_k = max(64, triton.next_power_of_2(q.shape[-1]))
    if q.dtype == torch.float32:
        return FP32_LAUNCHES[block_k], block_k
    return (HOPPER_LAUNCHES if _is_hopper(q.device) else AMPERE_LAUNCHES)[block_k], block_k


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's (nor a GPU, in the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _constants(launch: Launch, head_width: int, block_k: int) -> dict[str, int]:
    return {
        "HEAD_WIDTH": head_width,
        "BLOCK_K": block_k,
        "BLOCK_L": launch.queries,
        "BLOCK_S": launch.keys,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
