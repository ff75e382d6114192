"""Whether the compiled norms and GELU read and write whole rows 16 bytes at a time, and nothing in narrower pieces."""

import os
import re
from collections import Counter

import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.compiler import compile as triton_compile  # noqa: E402

from muybridge.kernels import gelu_kernels, norm_rope_kernels  # noqa: E402
from muybridge.kernels.compile_case import CompileCase  # noqa: E402

CASES = [
    case for case in (*norm_rope_kernels.compile_cases(), *gelu_kernels.compile_cases()) if case.architecture == 90
]


def global_accesses(case: CompileCase) -> Counter[str]:
    """How often each form of access to global memory is written in the kernel's PTX, as "ld v4.b32"."""
    arguments = [parameter.name for parameter in case.kernel.params]
    aligned = {name for name, kind in case.types.items() if kind.startswith("*")} | set(case.aligned)
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in arguments},
        constexprs=dict(case.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if name in aligned},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages}
    ptx = triton_compile(source, target=GPUTarget("cuda", case.architecture, 32), options=options).asm["ptx"]
    return Counter(" ".join(form) for form in re.findall(r"\b(ld|st)\.global[.\w:]*?\.((?:v\d\.)?[bu]\d+)\b", ptx))


@pytest.mark.parametrize(
    "case", [c for c in CASES if "norm_rope" in c.name and "2x64" not in c.name], ids=lambda c: c.name
)
def test_norm_moves_its_rows_in_vectors(case: CompileCase) -> None:
    accesses = global_accesses(case)
    row = case.constants["HEADS"] * case.constants["HEAD_WIDTH"]
    narrow, wide = row * (4 if "fp32" in case.name else 2), row * 4  # bytes of a row of x, and of the fp32 weight
    # Forward: x and the weight in, heads out. Backward: x, d_out and the weight in, dx and the partial sums out.
    loads, stores = (narrow + wide, narrow) if "forward" in case.name else (2 * narrow + wide, narrow + wide)
    vectors = {name: accesses.pop(f"{name} v4.b32") * 16 * 32 * case.warps for name in ("ld", "st")}
    assert vectors == {"ld": loads, "st": stores}
    # What is left: three coordinates, 1 / rms, and the table.
    assert set(accesses) <= {"ld b16", "ld b32", "st b32"}
    assert accesses["ld b16"] == (0 if "no positions" in case.name else 3)
    assert accesses["st b32"] == (1 if "forward" in case.name else 0)


@pytest.mark.parametrize("case", [c for c in CASES if "gelu" in c.name], ids=lambda c: c.name)
def test_gelu_moves_everything_in_vectors(case: CompileCase) -> None:
    assert set(global_accesses(case)) == {"ld v4.b32", "st v4.b32"}
