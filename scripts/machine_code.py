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
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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
README = COMMITTED.with_name("README.md")
README_COLUMNS = ("registers", "spilled", "shared", "tensor_core", "bulk_loads", "serialized")
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

    # Registers a thread (at the start, where groups of warps then hand some over to each other).
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
    # 1 where the assembler made every tensor-core instruction of 9.0 wait for the one before (its remark C7515): correct, but
    # products then overlap with nothing.
    serialized: int
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
        README.write_text(with_figures(README.read_text(), found))
        print(f"muybridge: wrote {COMMITTED} and {README}; commit them with the change that made the difference")
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
        # The assembler makes none of the instructions we count from anything else, and disassembling takes half a second.
        is_special = re.search(r"mma\.|cp\.async\.bulk|cp\.reduce\.async\.bulk|setmaxnreg", compiled.asm["ptx"])
        code = _output_of(knobs.nvidia.nvdisasm.path, "-c", cubin) if is_special else ""
    matrix = _count(code, MATRIX_INSTRUCTION[case.architecture])
    # A group of HGMMA ends with one that carries a scoreboard to wait for.
    waits = len(re.findall(r"\bHGMMA\b.*\bgsb0\b", code))
    return MachineCode(
        registers=max(int(count) for count in re.findall(r"REG:(\d+)", usage)),
        spilled=sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        shared=compiled.metadata.shared,
        scratch=compiled.metadata.global_scratch_size,
        tensor_core=matrix,
        bulk_loads=_count(code, "UTMALDG"),
        bulk_stores=_count(code, "UTMASTG") + _count(code, "UTMAREDG"),
        handovers=_count(code, "USETMAXREG"),
        serialized=int(0 < matrix == waits),
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
    if code.serialized > before.serialized:
        found.append(f"{name}: tensor-core instructions now wait for each other (ptxas -v says why). {HOW_TO_ACCEPT}")
    if same_compiler and code.registers > before.registers + REGISTER_SLACK:
        found.append(f"{name}: {code.registers} registers, {before.registers} in the committed code. {HOW_TO_ACCEPT}")
    return found


def unmatched(cases: Sequence[CompileCase], committed: "Committed") -> list[str]:
    """Launches that the committed file lacks, and entries of it that no launch has any more."""
    names = {key(case) for case in cases}
    missing, stale = sorted(names - set(committed.launches)), sorted(set(committed.launches) - names)
    return [
        f"{', '.join(some)}: {what} kernels/{COMMITTED.name}. {HOW_TO_ACCEPT}"
        for some, what in ((missing, "missing in"), (stale, "no launch any more, but in"))
        if some
    ]


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


def with_figures(text: str, found: Mapping[str, MachineCode]) -> str:
    """The README with the figures of the launches that a table of it names."""

    def row(match: re.Match[str]) -> str:
        code = found.get(match[1])
        figures = [getattr(code, column) for column in README_COLUMNS] if code else ["no such launch"]
        return f"| `{match[1]}` | {' | '.join(map(str, figures))} |"

    return re.sub(r"^\| `([^`]+/sm\d+)` \|.*$", row, text, flags=re.MULTILINE)


@functools.cache
def compilers() -> dict[str, str]:
    """The versions that decide about registers: Triton's, and its assembler's."""
    version = re.findall(r"V(\d[.\d]*)", _output_of(knobs.nvidia.ptxas.path, "--version"))[0]
    return {"triton": triton.__version__, "ptxas": version}


def print_table(found: Mapping[str, MachineCode]) -> None:
    """A line a launch."""
    versions = ", ".join(f"{name} {version}" for name, version in compilers().items())
    table = Table(title=f"Machine code of the kernels ({versions})")
    table.add_column("launch", no_wrap=True, min_width=max(map(len, found)))
    columns = [field.name for field in fields(MachineCode) if any(getattr(code, field.name) for code in found.values())]
    for column in columns:
        table.add_column(_title(column), justify="right")
    for name, code in found.items():
        table.add_row(name, *(str(getattr(code, column) or "") for column in columns))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


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
