"""What has no place in the package, found in its source: pickles, shells, code from strings and files, downloads."""

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import muybridge
from muybridge.models.text import TextEncoderConfig, TextEncoderKind, Umt5TextEncoder
from muybridge.redaction import is_secret_name
from muybridge.train import checkpoint_writer

ROOT = Path(muybridge.__file__).parent
FOLDERS = ("kernels", "models", "data", "train", "scripts", "slurm", "configs")

# Modules whose readers run what a file says.
RUNNING_READERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pty"}
FORBIDDEN_CALLS = {
    **dict.fromkeys(("eval", "exec", "__import__", "builtins.eval", "builtins.exec"), "runs a string"),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), "starts a shell"),
    **dict.fromkeys(
        ("hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method"), "calls what settings name"
    ),
    **dict.fromkeys(
        ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"), "may build any object; yaml.safe_load"
    ),
    **dict.fromkeys(("torch.jit.load", "torch.package.PackageImporter", "runpy.run_path"), "runs a file"),
    **dict.fromkeys(
        ("torch.hub.load", "torch.hub.load_state_dict_from_url", "huggingface_hub.hf_hub_download"), "downloads"
    ),
    **dict.fromkeys(("huggingface_hub.snapshot_download", "urllib.request.urlretrieve"), "downloads"),
    **dict.fromkeys(("shutil.unpack_archive", "tempfile.mktemp"), "writes where others may say"),
    **dict.fromkeys(("ssl._create_unverified_context",), "asks for no certificate"),
}
FORBIDDEN_METHODS = {"extractall": "writes where an archive says"}
# Keywords, and the one value that each may have.
ONLY_VALUES = {
    "shell": False,
    "allow_pickle": False,
    "trust_remote_code": False,
    "weights_only": True,
    "verify_ssl": True,
}
# Calls, or methods of anything, and the keyword that they must have.
NEEDED_KEYWORDS = {"torch.load": "weights_only", ".from_pretrained": "local_files_only"}
# These choose a class, and would take one from a file in the folder that they read.
CHOOSING = ("AutoTokenizer", "AutoModel", "AutoConfig", "AutoProcessor", "AutoImageProcessor", "DiffusionPipeline")


def breaches(source: str) -> list[str]:
    """What in a Python file breaks a rule, with the line."""
    tree = ast.parse(source)
    names = dict(_imported_names(tree))
    found = []
    for node in ast.walk(tree):
        faults: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            faults += [f"{name} runs what a file says" for name in modules if name.split(".")[0] in RUNNING_READERS]
        elif isinstance(node, ast.Call):
            faults += _call_faults(node, _dotted(node.func, names))
        elif isinstance(node, ast.Constant) and str(node.value).startswith(("pipe:", "_target_")):
            faults.append(f"{node.value!r} names what is run")
        found += [f"line {node.lineno}: {fault}" for fault in faults]  # type: ignore[attr-defined]
    return found


def _call_faults(call: ast.Call, name: str) -> Iterator[str]:
    if name in FORBIDDEN_CALLS:
        yield f"{name} {FORBIDDEN_CALLS[name]}"
    method = name.rpartition(".")[2]
    if method in FORBIDDEN_METHODS:
        yield f"{name} {FORBIDDEN_METHODS[method]}"
    keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    for keyword, value in keywords.items():
        if keyword in ONLY_VALUES and not (isinstance(value, ast.Constant) and value.value is ONLY_VALUES[keyword]):
            yield f"{keyword} may only be {ONLY_VALUES[keyword]}, as it stands there"
    for end, needed in NEEDED_KEYWORDS.items():
        if (name == end or (end.startswith(".") and name.endswith(end))) and needed not in keywords:
            yield f"{name} must have {needed}"
    if name.endswith(".from_pretrained") and name.split(".")[-2] in CHOOSING and "trust_remote_code" not in keywords:
        yield f"{name} must have trust_remote_code=False, or it asks"


def _imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def package_files() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])


def test_nothing_in_the_package_runs_what_files_or_strings_say() -> None:
    files = package_files()
    assert len(files) > 100
    found = [f"{path}: {breach}" for path in files for breach in breaches(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_no_setting_names_what_is_run() -> None:
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 10
    assert not [path for path in files if "_target_" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import marshal", "import shelve", "def f():\n    import dill"),
        *("import joblib", "import _pickle as p"),
        *("import torch\ntorch.load(p)", "import torch\ntorch.load(p, weights_only=False)"),
        *("from torch import load\nload(p)", "import torch as t\nt.load(p, weights_only=flag)"),
        *("import numpy as np\nnp.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)"),
        *("import subprocess\nsubprocess.run(c, shell=True)", "from subprocess import Popen as P\nP(c, shell=1)"),
        *("import os\nos.system(c)", "from os import popen\npopen(c)", "import subprocess as s\ns.getoutput(c)"),
        *("eval(s)", "exec(s)", "__import__(s)"),
        *("import hydra\nhydra.utils.instantiate(c)", "from hydra.utils import instantiate\ninstantiate(c)"),
        'c["_target_"]',
        *("import yaml\nyaml.load(f)", "from yaml import unsafe_load\nunsafe_load(f)"),
        *("M.from_pretrained(p)", "M.from_pretrained(p, local_files_only=True, trust_remote_code=True)"),
        *("transformers.AutoTokenizer.from_pretrained(p, local_files_only=True)", 'open_url("pipe:cat a.tar")'),
        *("import tarfile\ntarfile.open(p).extractall(q)", "with tarfile.open(p) as t:\n    t.extractall(q)"),
        *("import tempfile\ntempfile.mktemp()", "import huggingface_hub as h\nh.snapshot_download(r)"),
        "import torch\ntorch.jit.load(p)",
    ],
)
def test_a_planted_breach_is_found(source: str) -> None:
    assert breaches(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p, weights_only=True, mmap=True)",
        "model.eval()",
        "import subprocess\nsubprocess.run([a, b], check=True)",
        "import numpy as np\nnp.load(p, mmap_mode='r', allow_pickle=False)",
        "import yaml\nyaml.safe_load(f)",
        "json.load(f)",
        "transformers.AutoTokenizer.from_pretrained(p, local_files_only=True, trust_remote_code=False)",
    ],
)
def test_what_is_fine_passes(source: str) -> None:
    assert not breaches(source)


def test_a_tokenizer_brings_no_code(tiny_umt5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of somebody else's, and a user who answers yes to whatever is asked."""
    shutil.copytree(tiny_umt5, tmp_path / "text")
    folder = tmp_path / "text" / "tokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **own}))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    settings = TextEncoderConfig(kind=TextEncoderKind.umt5, path=str(tmp_path / "text"), dim=32)
    with suppress(ValueError):  # or another class reads what it knows of the folder
        Umt5TextEncoder(settings)
    assert not (tmp_path / "ran").exists()


def test_the_writer_of_checkpoints_has_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    image = os.memfd_create("image")
    writer = checkpoint_writer.WriterProcess(image)
    try:
        assert psutil.Process(writer.pid).environ().keys() <= {*checkpoint_writer.ENVIRONMENT}
    finally:
        writer.close()
        os.close(image)
    assert not [name for name in checkpoint_writer.ENVIRONMENT if is_secret_name(name)]


def test_what_is_said_of_security_is_where_it_says() -> None:
    """Every file and test that SECURITY.md names exists."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    files = {path.relative_to(ROOT).as_posix(): path for path in [*package_files(), *(ROOT / "tests").rglob("*.py")]}
    sources = "".join(path.read_text(encoding="utf-8") for name, path in files.items() if name.startswith("tests/"))
    named = set(re.findall(r"[\w/]+\.py", text))
    assert len(named) > 20
    assert not [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)]
    tests = set(re.findall(r"::(test_\w+)", text))
    assert len(tests) > 5
    assert not [name for name in tests if f"def {name}" not in sources]
