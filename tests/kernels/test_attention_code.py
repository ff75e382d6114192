"""The machine code of attention's backward launches, compiled ahead of time for the GPUs we name, without one.

Read the limits as: no spilled registers, shared memory within what a block may have, matrix products on tensor cores.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402
from triton.compiler import compile as triton_compile  # noqa: E402

from muybridge.kernels import attention_backward as backward  # noqa: E402
from muybridge.kernels.attention_tiles import Launch  # noqa: E402

KERNELS = {
    "grad_query": backward.grad_query_kernel,
    "grad_key_value": backward.grad_key_value_kernel,
}
LAUNCHES = {
    "HOPPER": [backward.HOPPER_GRAD_QUERY, backward.HOPPER_GRAD_KEY_VALUE],
    "AMPERE": [backward.AMPERE_GRAD_QUERY, backward.AMPERE_GRAD_KEY_VALUE],
    "FP32": [backward.FP32_GRAD_QUERY, backward.FP32_GRAD_KEY_VALUE],
}


def launch_of(table: str, head_width: int, kernel: str) -> Launch:
    return LAUNCHES[table][list(KERNELS).index(kernel)][head_width]


# Bytes of shared memory that one block may use. The Ampere table also serves compute capability 8.6, 8.9 and 12.0.
SHARED_LIMIT = {80: 101_376, 90: 232_448}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async"}


def compile_kernel(kernel: Any, launch: Launch, *, capability: int, dtype: str, head_width: int) -> CompiledKernel:
    """Compiles as a launch with aligned tensors would."""
    block_k = next(width for width in (64, 128, 256) if width >= head_width)
    constants = {"HEAD_WIDTH": head_width, "BLOCK_K": block_k, "BLOCK_L": launch.queries, "BLOCK_S": launch.keys}
    signature, constexprs, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constexprs[name] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in ("lse_ptr", "delta_ptr") else f"*{dtype}"
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
        if name.endswith("_ptr") or name.startswith("stride_"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(compiled: CompiledKernel, folder: Path) -> int:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_width", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_half_precision_runs_on_tensor_cores_without_spills(
    capability: int, dtype: str, head_width: int, kernel: str, tmp_path: Path
) -> None:
    launch = launch_of({80: "AMPERE", 90: "HOPPER"}[capability], head_width, kernel)
    compiled = compile_kernel(KERNELS[kernel], launch, capability=capability, dtype=dtype, head_width=head_width)
    assert spilled_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]
    assert MATRIX_INSTRUCTION[capability] in compiled.asm["ptx"]


def test_padded_head_width_costs_at_most_two_spilled_registers(tmp_path: Path) -> None:
    launch = launch_of("HOPPER", 128, "grad_key_value")  # the kernel with the fewest registers to spare
    compiled = compile_kernel(KERNELS["grad_key_value"], launch, capability=90, dtype="bf16", head_width=96)
    assert spilled_bytes(compiled, tmp_path) <= 8
    assert compiled.metadata.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_width", [64, 128, 256])
def test_full_precision_keeps_the_limits_and_is_not_rounded_to_tf32(
    head_width: int, kernel: str, tmp_path: Path
) -> None:
    launch = launch_of("FP32", head_width, kernel)
    compiled = compile_kernel(KERNELS[kernel], launch, capability=90, dtype="fp32", head_width=head_width)
    assert spilled_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= SHARED_LIMIT[80]  # the same code layout serves every GPU
    assert "tf32" not in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
def test_delta_kernel_does_not_spill(capability: int, tmp_path: Path) -> None:
    compiled = compile_kernel(
        backward.delta_kernel, backward.DELTA_LAUNCH, capability=capability, dtype="bf16", head_width=256
    )
    assert spilled_bytes(compiled, tmp_path) == 0
