"""Programs that stand on PATH for Slurm's: some keep how they were called and answer what a test wants, others ask a cluster."""

import os
import shutil
from pathlib import Path

from muybridge.tests.slurm.cluster import Cluster

PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel")
# Each call's arguments and environment go to files of their own; sbatch answers with 101, 102, ... unless told otherwise.
_PROGRAM = """\
#!/bin/bash
here=$(dirname -- "$0") name=$(basename -- "$0")
number=$(($(cat "$here/$name.calls" 2>/dev/null || echo 0) + 1))
echo "$number" >"$here/$name.calls"
printf '%s\\0' "$@" >"$here/$name.$number.argv"
env -0 >"$here/$name.$number.env"
[ ! -e "$here/$name.do" ] || . "$here/$name.do"
[ "$name" != sbatch ] || echo "$((100 + number))"
"""


class FakeSlurm:
    """A folder of programs that ask nobody."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in PROGRAMS:
            (folder / name).write_text(_PROGRAM)
            (folder / name).chmod(0o755)

    @property
    def path(self) -> str:
        """A PATH on which they come first."""
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    def answer(self, program: str, lines: str) -> None:
        """What a program does from now on, in bash; `$number` is the number of the call."""
        (self.folder / f"{program}.do").write_text(lines)

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of each call so far."""
        return [self._fields(program, number, "argv") for number in range(1, self._count(program) + 1)]

    def environment(self, program: str) -> dict[str, str]:
        """That of the last call."""
        fields = self._fields(program, self._count(program), "env")
        return dict(field.split("=", 1) for field in fields)

    def _count(self, program: str) -> int:
        file = self.folder / f"{program}.calls"
        return int(file.read_text()) if file.exists() else 0

    def _fields(self, program: str, number: int, kind: str) -> list[str]:
        content = (self.folder / f"{program}.{number}.{kind}").read_bytes()
        return os.fsdecode(content).split("\0")[:-1]


def real_programs(cluster: Cluster, folder: Path) -> str:
    """A PATH on which Slurm's programs run on the cluster's head host, which has a network of its own."""
    folder.mkdir()
    # Jobs, which have the environment of whoever submits them, are to find the real ones.
    here = f"PATH='{os.environ['PATH']}' SLURM_TEST_DIR='{cluster.folder}'"
    for name in PROGRAMS:
        words = ["bash", Path(__file__).with_name("cluster.sh"), "exec", shutil.which(name)]
        command = " ".join(f"'{word}'" for word in words)
        (folder / name).write_text(f'#!/bin/bash\n{here} exec {command} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
