"""`muybridge bench code`: the machine code of every kernel launch, compiled ahead of time for the GPUs we name, without one.

kernels/machine_code.json holds what the code looked like when it was last accepted; tests/kernels/test_machine_code.py holds the
code to that. Read the limits as: no spilled registers, shared memory within what a block may have, matrix products on tensor cores.
"""

import argparse
import functools
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from .. import kernels
from ..kernels.compile_case import CompileCase

COMMITTED = Path(kernels.__file__).with_name("machine_code.json")
HOW_TO_ACCEPT = (
    "`muybridge bench code --update` accepts the code as it is now; commit kernels/machine_code.json with the change"
)
# Bytes of shared memory that one block may use. The code for 8.0 also serves 8.6, 8.9 and 12.0, which have the least.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA"}
# Registers that a change may cost without being looked at.
REGISTER_SLACK = 8


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel needs, and the instructions that tell whether it uses the hardware it was written for."""

    # Registers a thread (the most that any group of warps has, where they are specialised).
    registers: int
    # Bytes of registers a thread keeps in memory for want of more.
    spilled: int
    # Bytes of shared memory a block.
    shared: int
    # Bytes of global memory a launch asks Triton's allocator for (descriptors that the kernel itself makes).
    scratch: int
    # Matrix products on tensor cores: HGMMA for 9.0, HMMA for 8.0.
    tensor_core: int
    # Loads, and stores or reductions, by the bulk copy engine (UTMALDG; UTMASTG, UTMAREDG).
    bulk_loads: int
    bulk_stores: int
    # Hand-overs of registers between groups of warps (USETMAXREG): not 0 where warp specialisation took effect.
    handovers: int
    # Matrix products whose fp32 operands are rounded to 10 bits of mantissa; must be 0.
    tf32: int


def main(argv: list[str]) -> int:
    """Compile every launch, print a table, and compare with the committed file or rewrite it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="muybridge bench code", description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"rewrite kernels/{COMMITTED.name}")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases with TEXT in their names")
    options = parser.parse_args(argv)
    if options.update and options.only:
        parser.error("--update rewrites the whole file: leave --only out")
    cases = [case for case in all_cases() if options.only in key(case)]
    if not cases:
        raise ValueError(f"--only={options.only} must be part of a case's name; `muybridge bench code` lists them")
    console = Console(stderr=True)
    found = {key(case): measure(case) for case in track(cases, description="compiling", console=console)}
    print_table(found)
    complaints = [text for case in cases for text in broken_limits(case, found[key(case)])]
    if options.update:
        write_committed(found, COMMITTED)
        print(f"muybridge: wrote {COMMITTED}; commit it with the change that made the difference")
    else:
        committed = read_committed(COMMITTED)
        complaints += [text for case in cases for text in regressions(case, found[key(case)], committed)]
        complaints += [] if options.only else unmatched(cases, committed)
    for text in complaints:
        print(f"muybridge: {text}")
    if not complaints:
        print(f"muybridge: {len(found)} launches keep every limit; on a GPU, `muybridge bench kernels` times them")
    return 1 if complaints else 0


def all_cases() -> list[CompileCase]:
    """The cases of every module in kernels/ that has `compile_cases`, in a fixed order.

    Raises:
        ValueError: two cases have one name.
    """
    cases: dict[str, CompileCase] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(kernels.__path__)):
        compile_cases = getattr(importlib.import_module(f"{kernels.__name__}.{module}"), "compile_cases", None)
        for case in compile_cases() if compile_cases else ():
            if key(case) in cases:
                raise ValueError(f"kernels/{module}.py: the compile case {key(case)} must have a name of its own")
            cases[key(case)] = case
    return [cases[name] for name in sorted(cases)]


def key(case: CompileCase) -> str:
    """The case's name in the committed file and in messages."""
    return f"{case.name}/sm{case.architecture}"


def measure(case: CompileCase) -> MachineCode:
    """Compile a launch as Triton would at run time and read its machine code.

    Raises:
        ValueError: the case does not name exactly the kernel's own arguments.
    """
    compiled = triton_compile(
        _source(case),
        target=GPUTarget("cuda", case.architecture, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output_of(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        code = _output_of(knobs.nvidia.nvdisasm.path, "-c", cubin)
    matrix = _count(code, MATRIX_INSTRUCTION[case.architecture])
    return MachineCode(
        registers=max(int(count) for count in re.findall(r"REG:(\d+)", usage)),
        spilled=sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        shared=compiled.metadata.shared,
        scratch=compiled.metadata.global_scratch_size,
        tensor_core=matrix,
        bulk_loads=_count(code, "UTMALDG"),
        bulk_stores=_count(code, "UTMASTG") + _count(code, "UTMAREDG"),
        handovers=_count(code, "USETMAXREG"),
        tf32=len(re.findall(r"MMA[.\w]*\.TF32", code)),
    )


def broken_limits(case: CompileCase, code: MachineCode) -> list[str]:
    """What no launch may do on any GPU, whatever was committed."""
    name, found = key(case), []
    if code.spilled > case.spill_limit:
        found.append(
            f"{name}: {code.spilled} bytes of registers spill to memory, more than the {case.spill_limit} allowed:"
            " take smaller tiles, more warps or fewer values that live at once"
        )
    if code.shared > SHARED_LIMIT[case.architecture]:
        limit = SHARED_LIMIT[case.architecture]
        found.append(
            f"{name}: {code.shared} bytes of shared memory, and a block may have {limit}: the launch would fail"
        )
    if case.has_matmul and code.tensor_core == 0:
        instruction = MATRIX_INSTRUCTION[case.architecture]
        found.append(f"{name}: the matrix product does not run on tensor cores (no {instruction} in the machine code)")
    if code.tf32 > 0:
        found.append(f"{name}: {code.tf32} products round fp32 to tf32: give tl.dot input_precision='ieee'")
    return found


def regressions(case: CompileCase, code: MachineCode, committed: "Committed") -> list[str]:
    """What is worse than the committed code; an exact count is only comparable within one version of the compilers."""
    name, before = key(case), committed.launches.get(key(case))
    if before is None:
        return []  # `unmatched` says so, once
    same_compiler = committed.made_with == compilers()
    found = []
    for field in ("tensor_core", "bulk_loads", "bulk_stores", "handovers"):
        now, then = getattr(code, field), getattr(before, field)
        if now < then if same_compiler else now == 0 < then:
            found.append(f"{name}: {_title(field)}: {now} instructions, {then} in the committed code. {HOW_TO_ACCEPT}")
    if same_compiler and code.registers > before.registers + REGISTER_SLACK:
        found.append(f"{name}: {code.registers} registers, {before.registers} in the committed code. {HOW_TO_ACCEPT}")
    return found


def unmatched(cases: Sequence[CompileCase], committed: "Committed") -> list[str]:
    """Launches that the committed file lacks, and entries of it that no launch has any more."""
    names = {key(case) for case in cases}
    missing = [
        f"{name} is not in kernels/{COMMITTED.name}. {HOW_TO_ACCEPT}" for name in names - set(committed.launches)
    ]
    stale = [f"{name} is in kernels/{COMMITTED.name} only. {HOW_TO_ACCEPT}" for name in set(committed.launches) - names]
    return sorted(missing) + sorted(stale)


@dataclass(frozen=True)
class Committed:
    """The committed file: the code of every launch by its key, and the versions of the compilers that made it."""

    made_with: Mapping[str, str]
    launches: Mapping[str, MachineCode]


def read_committed(path: Path) -> Committed:
    """The committed file's content; nothing where there is no file."""
    if not path.exists():
        return Committed({}, {})
    content = json.loads(path.read_text())
    return Committed(content["made_with"], {name: MachineCode(**code) for name, code in content["launches"].items()})


def write_committed(found: Mapping[str, MachineCode], path: Path) -> None:
    """One line a launch, in the order of their names, so that a change of one kernel is a change of its lines."""
    lines = [f" {json.dumps(name)}: {json.dumps(vars(found[name]))}" for name in sorted(found)]
    made_with = json.dumps(compilers())
    path.write_text(f'{{"made_with": {made_with},\n"launches": {{\n' + ",\n".join(lines) + "\n}}\n")


@functools.cache
def compilers() -> dict[str, str]:
    """The versions that decide about registers: Triton's, and its assembler's."""
    version = re.findall(r"V(\d[.\d]*)", _output_of(knobs.nvidia.ptxas.path, "--version"))[0]
    return {"triton": triton.__version__, "ptxas": version}


def print_table(found: Mapping[str, MachineCode]) -> None:
    """A line a launch."""
    versions = ", ".join(f"{name} {version}" for name, version in compilers().items())
    table = Table(title=f"Machine code of the kernels ({versions})")
    table.add_column("launch", no_wrap=True)
    for field in fields(MachineCode):
        table.add_column(_title(field.name), justify="right")
    for name, code in found.items():
        table.add_row(name, *(str(value or "") for value in astuple(code)))
    Console().print(table)


def _source(case: CompileCase) -> ASTSource:
    arguments = [parameter.name for parameter in case.kernel.params]
    given = [*case.types, *case.constants]
    if sorted(given) != sorted(arguments) or not set(case.aligned) <= set(case.types):
        wrong = sorted(set(given) ^ set(arguments)) or sorted(set(case.aligned) - set(case.types)) or "some twice"
        raise ValueError(f"{key(case)}: the case must name every argument of the kernel once: {wrong} does not fit")
    aligned = {name for name, kind in case.types.items() if kind.startswith("*")} | set(case.aligned)
    return ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in arguments},
        constexprs=dict(case.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if name in aligned},
    )


def _output_of(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _count(code: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", code))


def _title(field: str) -> str:
    return field.replace("_", " ")
