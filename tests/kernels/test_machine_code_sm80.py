"""Every launch, compiled for compute capability 8.0; see test_machine_code.py."""

import os

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from muybridge.kernels.compile_case import CompileCase
from muybridge.scripts.machine_code import (
    COMMITTED,
    all_cases,
    broken_limits,
    key,
    measure,
    read_committed,
    regressions,
)


@pytest.mark.parametrize("case", [case for case in all_cases() if case.architecture == 80], ids=key)
def test_launch_on_ampere_keeps_its_limits(case: CompileCase) -> None:
    code = measure(case)
    complaints = broken_limits(case, code) + regressions(case, code, read_committed(COMMITTED))
    assert not complaints, "\n".join(complaints)
