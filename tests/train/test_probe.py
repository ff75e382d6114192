"""A start on machines with faults ends on all ranks with the same words, which name the rank; runs probe_program.py."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from muybridge.tests.conftest import Command

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, launch: Command) -> Path:
    root = tmp_path_factory.mktemp("probe")
    answer = launch(0, Path(__file__).with_name("probe_program.py"), root)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, dict[str, Any]]:
    """Of each case the ranks' exit codes and what they said."""
    return json.loads((root / "found.json").read_text())


def test_a_sound_machine_passes_and_leaves_no_file(found: dict[str, dict[str, Any]], root: Path) -> None:
    assert found["is_sound"]["codes"] == [0, 0, 0]
    assert not list((root / "is_sound" / "run").iterdir())


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        (
            "computes_wrongly",
            "ProbeError",
            f"a machine failed its test: rank 1 ({HOST}, cpu): 1 of 128 rows of a product in torch.bfloat16 are wrong, "
            "the first of them row 17",
        ),
        ("fails_to_compute", "ProbeError", f"rank 1 ({HOST}, cpu): a product failed: mat1 and mat2 shapes"),
        ("adds_up_wrongly", "ProbeError", f"rank 2 ({HOST}, cpu): 1 of 1000 sums over all ranks are wrong"),
        ("cannot_write", "ProbeError", f"rank 1 ({HOST}, cpu): cannot write in "),
        ("shares_no_folder", "ProbeError", f"rank 0 ({HOST}, cpu): cannot read in "),
        ("shares_no_folder", "ProbeError", "(it must be on a file system that all machines share)"),
        ("reads_something_else", "ProbeError", f"rank 0 ({HOST}, cpu): what rank 1 wrote in "),
        ("has_no_run_dir", "ProbeError", f"rank 0 ({HOST}, cpu): cannot make a folder in "),
        (
            "has_other_settings",
            "ValueError",
            f"ranks have other settings than rank 0: rank 1 ({HOST}): seed is 4, there 3; steps is None, there 5",
        ),
        ("is_locked", "RunIsLocked", "is in use by another attempt (process "),
    ],
)
def test_a_fault_ends_all_ranks_with_the_same_words(
    found: dict[str, dict[str, Any]], case: str, error: str, words: str
) -> None:
    assert found[case]["codes"] == [1, 1, 1]
    last_lines = [said.strip().splitlines()[-1] for said in found[case]["said"]]
    assert len(set(last_lines)) == 1
    assert f"{error}: " in last_lines[0]
    assert words in last_lines[0]


def test_one_rank_with_a_fault_is_not_taken_for_two(found: dict[str, dict[str, Any]]) -> None:
    for case in ("computes_wrongly", "adds_up_wrongly", "cannot_write", "has_no_run_dir", "has_other_settings"):
        assert found[case]["said"][0].strip().splitlines()[-1].count(f"({HOST}") == 1, case


def test_a_rank_that_computes_slowly_is_named_once_the_run_goes(found: dict[str, dict[str, Any]]) -> None:
    assert found["has_a_slow_rank"]["codes"] == [0, 0, 0]
    for said in found["has_a_slow_rank"]["said"]:
        assert said.count(f"rank 2 ({HOST}) takes ") == 1
