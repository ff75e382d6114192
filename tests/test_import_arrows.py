"""Who may import whom: kernels <- models <- train, data on its own, and one file for each heavy third party."""

import ast
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import muybridge

ROOT = Path(muybridge.__file__).parent
FOLDERS = ("kernels", "models", "data", "train", "scripts", "slurm", "configs")
ALLOWED_OWN = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "data": {"data"},
    "train": {"train", "models", "data", "kernels"},
}
# Where a heavy third party may be imported from kernels, models, data and train; scripts and slurm may use what they need.
HOMES = {
    "triton": ["kernels/*.py"],
    "transformers": ["models/text.py"],
    "tokenizers": ["models/text_small.py"],
    "webdataset": ["data/*.py"],
    "decord": ["data/decode_decord.py"],
    "torchcodec": ["data/decode_torchcodec.py"],
    "av": ["data/decode_decord.py", "data/decode_pyav.py", "data/media_info.py", "data/mp4.py", "data/scenes.py"],
    "cv2": ["data/mp4.py"],
    "imageio": ["data/mp4.py"],
    "fsspec": ["data/storage.py"],
    "scenedetect": ["data/scenes.py"],
    "deepspeed": ["train/engine.py", "train/checkpoint.py"],
    "wandb": ["train/tracking.py"],
    "hydra": ["train/__main__.py", "train/compose.py", "train/config.py"],
    "omegaconf": ["train/__main__.py", "train/compose.py", "train/config.py"],
    "diffusers": ["scripts/export_checks.py", "scripts/evaluate_in_diffusers.py"],
}
# Not on every machine that runs this file's importer, or too slow to load for those who do not use it.
ONLY_INSIDE_FUNCTIONS = {
    "av",
    "decord",
    "torchcodec",
    "cv2",
    "fsspec",
    "imageio",
    "scenedetect",
    "transformers",
    "tokenizers",
    "wandb",
    "diffusers",
}
# Nothing here reads or writes pickles.
NOWHERE = {"accelerate", "pickle", "dill", "pytest", "hypothesis"}


def breaches(file: str, source: str) -> list[str]:
    """The imports of `source`, the text of `file` (relative to the package), that break a rule."""
    folder = file.split("/")[0]
    found = []
    for name, line, is_lazy in imports(file, ast.parse(source)):
        where = f"{file}:{line}"
        top, _, rest = name.partition(".")
        own = rest.split(".")[0] if top == "muybridge" else None
        if own in FOLDERS and own not in ALLOWED_OWN.get(folder, FOLDERS):
            found.append(f"{where} {folder} may not import {own}")
        if top in FOLDERS:
            found.append(f"{where} imports a top-level `{top}`; write a relative import")
        if top in NOWHERE:
            found.append(f"{where} {top} has no place in the package")
        if folder in ALLOWED_OWN and top in HOMES and not any(fnmatch(file, home) for home in HOMES[top]):
            found.append(f"{where} {top} belongs in {', '.join(HOMES[top])}")
        if top in ONLY_INSIDE_FUNCTIONS and not is_lazy:
            found.append(f"{where} {top} may only be imported inside a function")
        if folder == "kernels" and top not in {"torch", "triton", "muybridge"} | sys.stdlib_module_names:
            found.append(f"{where} kernels import torch and triton only, not {top}")
    return found


def imports(file: str, tree: ast.Module) -> list[tuple[str, int, bool]]:
    """(absolute dotted name, line, whether it waits for a function call) of every import, `from . import x` included."""
    package = ["muybridge", *file.split("/")[:-1]]
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, is_lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, is_lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) + 1 - child.level] if child.level else []
                base = [*base, child.module] if child.module else base
                # The name may be a module itself: `from .. import models`.
                found.extend((".".join([*base, alias.name]), child.lineno, is_lazy) for alias in child.names)
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, is_lazy or is_function or is_type_checking(child))

    visit(tree, False)
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def package_files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_imports_follow_the_arrows() -> None:
    files = package_files()
    assert len(files) > 10
    found = [breach for file in files for breach in breaches(file, (ROOT / file).read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/attention.py", "from ..models import dit"),
        ("kernels/attention.py", "from .. import models"),
        ("kernels/attention.py", "import einops"),
        ("models/vae/model.py", "from ...data.batch import VideoBatch"),
        ("models/vae/model.py", "def f():\n    from ...train import ema"),
        ("models/dit.py", "import triton.language as tl"),
        ("models/text.py", "import transformers"),
        ("data/loader.py", "from muybridge.train import trainer"),
        ("data/loader.py", "def f():\n    import av"),
        ("data/mp4.py", "import av"),
        ("train/trainer.py", "import deepspeed"),
        ("train/trainer.py", "from omegaconf import OmegaConf"),
        ("train/trainer.py", "from ..scripts import pictures"),
        ("scripts/sample.py", "import pickle"),
        ("scripts/sample.py", "import kernels"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str) -> None:
    assert breaches(file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/attention.py", "import math\nimport torch\nimport triton.language as tl\nfrom .registry import op"),
        (
            "models/vae/model.py",
            "from ...kernels import attention\nfrom ..blocks import Block\nfrom .loss import vae_loss",
        ),
        ("models/text.py", "def f():\n    import transformers"),
        ("data/decode_pyav.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import av"),
        ("train/engine.py", "import deepspeed\nfrom ..models.dit import DiT\nfrom ..data import batch"),
        ("scripts/bench.py", "import deepspeed\nfrom ..train import trainer"),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    assert not breaches(file, source)
