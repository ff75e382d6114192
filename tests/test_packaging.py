"""What pip installs is what the checkout holds."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import muybridge

ROOT = Path(muybridge.__file__).parent
NOT_PACKAGED = {"tests", "build", "runs", "dist", "benchmarks"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_of_python_files_is_a_listed_package() -> None:
    folders = {
        file.parent.relative_to(ROOT)
        for file in ROOT.rglob("*.py")
        if not file.relative_to(ROOT).parts[0].startswith(".") and file.relative_to(ROOT).parts[0] not in NOT_PACKAGED
    }
    found = {".".join(["muybridge", *folder.parts]) for folder in folders}
    assert found == set(project()["tool"]["setuptools"]["packages"])
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


def test_every_direct_dependency_is_pinned() -> None:
    declared = project()["project"]
    requirements = [
        *declared["dependencies"],
        *(line for extra in declared["optional-dependencies"].values() for line in extra),
    ]
    # decord2 stands in for decord where there is no wheel of it, which is not where the pins are made.
    wanted = {normalised(requirement) for requirement in requirements} - {"muybridge", "decord2"}
    pins = {
        normalised(line)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if re.fullmatch(r"[\w.-]+==[\w.!-]+", line)
    }
    assert wanted <= pins


def test_constraints_name_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.!-]+", line)]
    # A local version such as +cpu exists in one registry only, an address on one machine only.
    assert not wrong


def test_the_installed_version_is_the_packages() -> None:
    assert version("muybridge") == muybridge.__version__


def normalised(requirement: str) -> str:
    """The project name of a requirement line, in the form in which registries compare names."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def test_the_folders_cannot_be_imported_by_their_bare_names_where_python_starts_in_the_checkout() -> None:
    """Libraries that look for a package `kernels` would load a second copy of ours, and its operators would take over."""
    program = "import importlib.util as u, muybridge.kernels; print(u.find_spec('kernels'), u.find_spec('data'))"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["None", "None"]
