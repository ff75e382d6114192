"""A kernel with everything its compiler needs, so that `muybridge bench code` and the tests can compile it without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One launch of one kernel, as it is compiled for one architecture."""

    # Kernel, dtype and shape, unique over all kernels, as "attention_forward/bf16/128/packed".
    name: str
    # The function that @triton.jit made.
    kernel: Any
    # Type of every argument that is not a constant, as Triton writes it: "*bf16", "i32", "fp32", "tensordesc<bf16[64,128]>".
    types: Mapping[str, str]
    # Values of the tl.constexpr arguments.
    constants: Mapping[str, Any]
    warps: int
    stages: int
    # Compute capability times ten: 80 or 90.
    architecture: int
    # Integer arguments that are multiples of 16 (pointers always are).
    aligned: tuple[str, ...] = ()
    # Whether the kernel multiplies matrices, which must then run on tensor cores.
    has_matmul: bool = False
    # Bytes of registers that may spill to memory.
    spill_limit: int = 0
