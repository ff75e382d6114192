"""Runs the kernels' arithmetic on the CPU, in Triton's interpreter: every module of `interpreted/`, in one process of their own."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest

from muybridge.tests.patience import PATIENCE

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
CASES = sorted((Path(__file__).parent / "interpreted").glob("*_cases.py"))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


pytestmark = [
    pytest.mark.timeout(600 * PATIENCE),
    pytest.mark.skipif(
        version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4),
        reason="the interpreter of Triton before 3.7 cannot run loops with numpy from 2.4 on",
    ),
]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What kept a test from passing, by module. In a process of its own: the kernels' first import chooses the interpreter."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *CASES,
    ]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode in (0, 1), result.stdout[-6000:] + result.stderr[-2000:]
    found: dict[str, list[str]] = {}
    for test in ElementTree.parse(report).iter("testcase"):
        of_module = found.setdefault(test.attrib["classname"].rpartition(".")[2], [])
        of_module += [
            f"{test.attrib['name']}: {problem.tag}\n{(problem.text or '')[-3000:]}"
            for problem in test
            if problem.tag in ("failure", "error", "skipped")
        ]
    return found


@pytest.mark.parametrize("cases", CASES, ids=[path.stem for path in CASES])
def test_kernels_match_fp64_in_the_interpreter(cases: Path, problems: dict[str, list[str]]) -> None:
    assert cases.stem in problems, "none of its tests ran"
    assert not problems[cases.stem], "\n".join(problems[cases.stem])
