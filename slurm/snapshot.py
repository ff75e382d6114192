"""What a submission keeps of itself in the run directory: its settings, the code as it was, and where it came from."""

import getpass
import hashlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..redaction import environment_without_secrets, redacted, without_assigned_secrets
from ..train.compose import plain
from ..train.provenance import COPIED_COMMIT, git_commit, versions
from .placing import Placement
from .plan import Plan

PACKAGE = Path(__file__).parents[1]
_SUFFIXES = (".py", ".yaml", ".json", ".sbatch")
# Variables that change what a job does.
_TELLING_PREFIXES = (
    *(
        "CUDA_",
        "NCCL_",
        "GLOO_",
        "UCX_",
        "FI_",
        "TORCH",
        "PYTORCH_",
        "TRITON_",
        "DS_",
        "OMP_",
        "MKL_",
        "HF_",
        "WANDB_",
        "MUYBRIDGE_",
    ),
    *("PYTHON", "CONDA_", "MODULEPATH", "LOADEDMODULES", "SLURM_CONF"),
)
_TELLING = (
    "PATH",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
    "XDG_CACHE_HOME",
    "TMPDIR",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
_GIT_SECONDS = 60
_MOST_DIFF_CHARACTERS = 20_000_000


def package_files(package: Path = PACKAGE) -> list[Path]:
    """The files that make up the package, relative to it and in the order of their names; nothing else that lies in a checkout."""
    parts = [marker.parent for marker in package.glob("*/__init__.py")]
    found = [path for part in parts for path in part.rglob("*") if path.suffix in _SUFFIXES and path.is_file()]
    return sorted(path.relative_to(package) for path in [*package.glob("*.py"), *found])


def code_hash(files: Mapping[Path, bytes]) -> str:
    """12 hexadecimal digits that change with the name and the content of any file."""
    digest = hashlib.sha256()
    for path, content in files.items():
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def place_code(folder: Path, placement: Placement, package: Path = PACKAGE) -> Path:
    """Copy the package to FOLDER/HASH/muybridge, unless it is there; returns FOLDER/HASH, for PYTHONPATH. Raises OSError."""
    # Read once: somebody may save a file at this moment, and what is copied must be what the name says.
    files = {path: (package / path).read_bytes() for path in package_files(package)}
    root = folder / code_hash(files)
    # Whole only once this is there, its last file.
    finished = root / "complete"
    if finished.exists():
        return root
    for path, content in files.items():
        placement.write(root / "muybridge" / path, content)
    placement.write(root / COPIED_COMMIT, f"{git_commit() or ''}\n".encode())
    placement.write(finished, b"")
    return root


def copies_of_code(submit_dir: Path) -> list[Path]:
    """The copies that submissions have left there."""
    return [path for path in (submit_dir / "slurm" / "code").glob("*") if re.fullmatch("[0-9a-f]{12}", path.name)]


def place_submission(plan: Plan, placement: Placement) -> list[Path]:
    """Write everything that the job reads, and a record of this submission in each run's slurm/submissions/NAME; returns those.

    Raises OSError.
    """
    now = time.time()
    name = submission_name(now)
    code = ""
    if plan.slurm.snapshot_code:
        code = str(place_code(plan.submit_dir / "slurm" / "code", placement))
    records = [run.run_dir / "slurm" / "submissions" / name for run in plan.runs]
    for run, record in zip(plan.runs, records):
        placement.write(record / "config.yaml", yaml.safe_dump(plain(run.config), sort_keys=False).encode())
        placement.write(record / "overrides.json", (json.dumps(run.overrides, indent=1) + "\n").encode())
        fields = [os.getcwd(), plan.slurm.python or sys.executable, code, plan.slurm.stage_to or "", *run.overrides]
        placement.write(run.run_dir / "slurm" / "command", nul_terminated(fields))
        # By this the job knows which lives are of its submission: clocks of machines and of file servers differ.
        placement.write(run.run_dir / "slurm" / "submission", f"{name}\n".encode())
    common = plan.submit_dir / "slurm" / "submissions" / name
    facts = {"unix_seconds": round(now, 3), **circumstances(plain(plan.slurm))}
    placement.write(common / "submission.json", (json.dumps(facts, indent=1) + "\n").encode())
    placement.write(common / "changes.diff", changes_since_commit().encode())
    placement.write(common / "train.sbatch", plan.script.encode())
    placement.write(plan.submit_dir / "slurm" / "tasks", nul_terminated([str(run.run_dir) for run in plan.runs]))
    placement.write(plan.script_path, plan.script.encode())
    return records


def nul_terminated(fields: list[str]) -> bytes:
    """Texts for bash to read whatever is in them, as `mapfile -d ''` does."""
    return b"".join(os.fsencode(text) + b"\0" for text in fields)


def submission_name(now: float) -> str:
    """The name of a submission at this time, which no other has: names sort by the time."""
    milliseconds = int(now * 1000)
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(milliseconds // 1000))}.{milliseconds % 1000:03}Z-{secrets.token_hex(3)}"


def circumstances(settings: dict[str, Any]) -> dict[str, Any]:
    """What a submission came from, without secrets: who, where, which code and versions, and the variables that matter."""
    variables = environment_without_secrets()
    telling = {
        name: redacted(value)
        for name, value in sorted(variables.items())
        if name in _TELLING or name.startswith(_TELLING_PREFIXES)
    }
    return {
        "slurm": settings,
        "user": _user(),
        "host": socket.gethostname(),
        "working_directory": os.getcwd(),
        "git_commit": git_commit(),
        "versions": versions(),
        "environment": telling,
    }


def changes_since_commit(package: Path = PACKAGE) -> str:
    """`git diff` of the package against its last commit, without secrets; empty outside a git checkout and without git."""
    command = ["git", "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--", "."]
    try:
        answer = subprocess.run(command, cwd=package, capture_output=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    text = answer.stdout.decode("utf-8", errors="replace") if answer.returncode == 0 else ""
    return without_assigned_secrets(redacted(text[:_MOST_DIFF_CHARACTERS]))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a number without a name, as in some containers
        return str(os.getuid())
