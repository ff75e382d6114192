"""Every launch, compiled for compute capability 9.0 and held to its limits and to kernels/machine_code.json.

The launches for 8.0 are in test_machine_code_sm80.py, so that two workers share them.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402

from muybridge.kernels.compile_case import CompileCase  # noqa: E402
from muybridge.scripts import cli, machine_code  # noqa: E402
from muybridge.scripts.machine_code import (  # noqa: E402
    COMMITTED,
    HOW_TO_ACCEPT,
    README,
    Committed,
    MachineCode,
    all_cases,
    broken_limits,
    compilers,
    key,
    measure,
    read_committed,
    regressions,
    unmatched,
    with_figures,
    write_committed,
)

CASES = all_cases()


@pytest.mark.parametrize("case", [case for case in CASES if case.architecture == 90], ids=key)
def test_launch_on_hopper_keeps_its_limits(case: CompileCase) -> None:
    code = measure(case)
    complaints = broken_limits(case, code) + regressions(case, code, read_committed(COMMITTED))
    assert not complaints, "\n".join(complaints)


def test_committed_file_names_every_launch_and_no_other() -> None:
    complaints = unmatched(CASES, read_committed(COMMITTED))
    assert not complaints, "\n".join(complaints)


def test_readme_shows_the_committed_figures() -> None:
    text = README.read_text()
    assert text == with_figures(text, read_committed(COMMITTED).launches), HOW_TO_ACCEPT
    assert "no such launch" not in text


@triton.jit
def toy_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, out_ptr, length,
    SIZE: tl.constexpr, PRECISION: tl.constexpr, ON_TENSOR_CORES: tl.constexpr,
):  # fmt: skip
    """out += A B over `length` pairs of [SIZE, SIZE] matrices."""
    index = tl.arange(0, SIZE)
    offsets = index[:, None] * SIZE + index[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(length):
        a, b = tl.load(a_ptr + i * SIZE * SIZE + offsets), tl.load(b_ptr + i * SIZE * SIZE + offsets)
        if ON_TENSOR_CORES:
            total = tl.dot(a, b, total, input_precision=PRECISION)
        else:
            total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out_ptr + offsets, total)


def toy(**changes: Any) -> CompileCase:
    constants = {"SIZE": 64, "PRECISION": "ieee", "ON_TENSOR_CORES": True, **changes.pop("constants", {})}
    dtype = changes.pop("dtype", "bf16")
    types = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "out_ptr": "*fp32", "length": "i32"}
    case = CompileCase("toy", toy_kernel, types, constants, warps=4, stages=2, architecture=90, has_matmul=True)
    return replace(case, **changes)


def complaints_about(case: CompileCase) -> list[str]:
    return broken_limits(case, measure(case))


@pytest.mark.parametrize("architecture", [80, 90])
def test_a_sound_kernel_is_passed(architecture: int) -> None:
    case = toy(architecture=architecture)
    code = measure(case)
    assert broken_limits(case, code) == []
    assert code.tensor_core > 0
    assert 0 < code.registers <= 255
    assert code.shared > 0


def test_a_spill_is_caught() -> None:
    (complaint,) = complaints_about(toy(constants={"SIZE": 128}, warps=1, stages=1, architecture=80))
    assert "toy/sm80" in complaint
    assert "bytes of registers spill" in complaint


def test_a_product_that_left_the_tensor_cores_is_caught() -> None:
    (complaint,) = complaints_about(toy(constants={"ON_TENSOR_CORES": False}))
    assert "no HGMMA" in complaint


def test_a_tile_too_small_for_hopper_is_caught() -> None:
    (complaint,) = complaints_about(toy(constants={"SIZE": 32}))
    assert "no HGMMA" in complaint


def test_too_much_shared_memory_is_caught() -> None:
    (complaint,) = complaints_about(toy(constants={"SIZE": 128}, warps=8, stages=5))
    assert "of shared memory, and a block may have 232448" in complaint


def test_tf32_is_caught() -> None:
    (complaint,) = complaints_about(toy(dtype="fp32", constants={"PRECISION": "tf32"}, architecture=80))
    assert "round fp32 to tf32" in complaint


def test_a_case_that_forgets_an_argument_is_refused() -> None:
    with pytest.raises(ValueError, match=r"toy/sm90: .*\['length'\] does not fit"):
        measure(toy(types={"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32"}))


CODE = MachineCode(
    registers=100,
    spilled=0,
    shared=1000,
    scratch=0,
    tensor_core=16,
    bulk_loads=4,
    bulk_stores=1,
    handovers=2,
    serialized=0,
    tf32=0,
)


@pytest.mark.parametrize(
    ("change", "same_compiler", "other_compiler"),
    [
        ({}, "", ""),
        ({"registers": 108, "tensor_core": 17}, "", ""),
        ({"registers": 109}, "109 registers, 100", ""),
        ({"tensor_core": 15}, "tensor core: 15 instructions, 16", ""),
        ({"bulk_loads": 0}, "bulk loads: 0 instructions, 4", "bulk loads: 0 instructions, 4"),
        ({"serialized": 1}, "now wait for each other", "now wait for each other"),
        ({"handovers": 0}, "handovers: 0 instructions, 2", "handovers: 0 instructions, 2"),
    ],
)
def test_what_counts_as_a_regression(change: dict[str, int], same_compiler: str, other_compiler: str) -> None:
    for made_with, expected in ((compilers(), same_compiler), ({"triton": "3.0"}, other_compiler)):
        found = regressions(toy(), replace(CODE, **change), Committed(made_with, {"toy/sm90": CODE}))
        assert len(found) == bool(expected)
        assert expected in "".join(found)
        assert all("muybridge bench code --update" in text for text in found)


def test_missing_and_stale_entries_are_named() -> None:
    assert unmatched([toy()], Committed({}, {"toy/sm90": CODE})) == []
    missing, stale = unmatched([toy()], Committed({}, {"gone/sm90": CODE}))
    assert missing.startswith("toy/sm90: missing in kernels/machine_code.json")
    assert stale.startswith("gone/sm90: no launch any more, but in kernels/machine_code.json")


def test_the_committed_file_has_a_line_a_launch_in_order(tmp_path: Path) -> None:
    path = tmp_path / "code.json"
    write_committed({"b": CODE, "a": replace(CODE, registers=7)}, path)
    assert read_committed(path) == Committed(compilers(), {"a": replace(CODE, registers=7), "b": CODE})
    assert [line[:4] for line in path.read_text().splitlines()[2:4]] == [' "a"', ' "b"']
    assert read_committed(tmp_path / "none") == Committed({}, {})


def test_bench_code_compares_updates_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "machine_code.json"
    monkeypatch.setattr(machine_code, "all_cases", lambda: [toy()])
    monkeypatch.setattr(machine_code, "COMMITTED", path)
    readme = tmp_path / "README.md"
    readme.write_text("| `toy/sm90` | 7 |\n| `gone/sm90` | 8 |\n| text | `toy/sm90` |\n")
    monkeypatch.setattr(machine_code, "README", readme)
    assert cli.main(["bench", "code"]) == 1
    assert "toy/sm90: missing in" in capsys.readouterr().out
    assert cli.main(["bench", "code", "--update"]) == 0
    assert "commit them with the change" in capsys.readouterr().out
    toy_row, gone_row, text = readme.read_text().splitlines()
    assert int(toy_row.split("|")[2]) == read_committed(path).launches["toy/sm90"].registers
    assert gone_row == "| `gone/sm90` | no such launch |"
    assert text == "| text | `toy/sm90` |"
    assert cli.main(["bench", "code"]) == 0
    assert "on a GPU, `muybridge bench kernels` times them" in capsys.readouterr().out
    assert cli.main(["bench", "code", "--only", "none"]) == 64
    assert "--only=none must be part of a case's name" in capsys.readouterr().err
