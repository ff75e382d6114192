"""Runs the kernels' arithmetic on the CPU, in Triton's interpreter: every module of `interpreted/`, each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
CASES = sorted((Path(__file__).parent / "interpreted").glob("*_cases.py"))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4),
    reason="the interpreter of Triton before 3.7 cannot run loops with numpy from 2.4 on",
)
@pytest.mark.parametrize("cases", CASES, ids=[path.stem for path in CASES])
def test_kernels_match_fp64_in_the_interpreter(cases: Path) -> None:
    """A process of its own, since the interpreter is chosen when the kernels are first imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cases.parents[3], check=False)
    summary = result.stdout.strip().splitlines()[-1]
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in summary
    assert "skipped" not in summary
