"""What a run directory keeps of a submission: the code as it was and where it came from, without secrets."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from muybridge.slurm.placing import Placement
from muybridge.slurm.snapshot import (
    PACKAGE,
    changes_since_commit,
    circumstances,
    code_hash,
    nul_terminated,
    package_files,
    place_code,
)
from muybridge.train.provenance import git_commit

SECRET = "f3c1a7e09b2d4c6f8a0b"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout of a package, with what lies around in one."""
    root = tmp_path / "checkout"
    files = ["__init__.py", "redaction.py", "train/__init__.py", "train/trainer.py", "train/notes.txt"]
    files += ["configs/__init__.py", "configs/train.yaml", "configs/experiment/mine.yaml", "slurm/__init__.py"]
    files += ["slurm/train.sbatch", "tests/test_x.py", "runs/first/config.yaml", ".venv/lib/x.py", "README.md"]
    files += ["train/__pycache__/trainer.cpython-311.pyc", "docs/conf.py"]
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    return root


def test_the_copy_holds_the_package_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    placement = Placement()
    folder = place_code(tmp_path / "code", placement, checkout)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    wanted = ["__init__.py", "redaction.py", "train/__init__.py", "train/trainer.py", "slurm/__init__.py"]
    wanted += ["configs/__init__.py", "configs/train.yaml", "configs/experiment/mine.yaml", "slurm/train.sbatch"]
    assert found == sorted(["complete", "muybridge_commit.txt", *(f"muybridge/{name}" for name in wanted)])
    assert re.fullmatch("[0-9a-f]{12}", folder.name)


def test_the_same_code_is_kept_once_and_other_code_beside_it(checkout: Path, tmp_path: Path) -> None:
    first = place_code(tmp_path / "code", Placement(), checkout)
    inode = (first / "muybridge" / "__init__.py").stat().st_ino
    assert place_code(tmp_path / "code", Placement(), checkout) == first
    assert (first / "muybridge" / "__init__.py").stat().st_ino == inode
    (checkout / "train" / "trainer.py").write_text("changed")
    second = place_code(tmp_path / "code", Placement(), checkout)
    assert second != first
    assert (first / "muybridge/train/trainer.py").read_text() == "# train/trainer.py\n"
    assert (second / "muybridge/train/trainer.py").read_text() == "changed"


def test_a_copy_that_was_cut_short_is_made_whole(checkout: Path, tmp_path: Path) -> None:
    folder = place_code(tmp_path / "code", Placement(), checkout)
    (folder / "complete").unlink()
    (folder / "muybridge/train/trainer.py").write_text("torn")
    assert place_code(tmp_path / "code", Placement(), checkout) == folder
    assert (folder / "muybridge/train/trainer.py").read_text() == "# train/trainer.py\n"


def test_a_file_that_is_saved_meanwhile_is_copied_as_the_name_says(checkout: Path, tmp_path: Path) -> None:
    class Slow(Placement):
        def write(self, path: Path, content: bytes) -> None:
            (checkout / "train/trainer.py").write_text("saved meanwhile")
            super().write(path, content)

    folder = place_code(tmp_path / "code", Slow(), checkout)
    assert (folder / "muybridge/train/trainer.py").read_text() == "# train/trainer.py\n"
    assert place_code(tmp_path / "code", Placement(), checkout) != folder


def test_a_name_and_its_content_are_told_apart() -> None:
    contents = [{Path("a"): b"bc"}, {Path("ab"): b"c"}, {Path("a"): b"b", Path("c"): b""}]
    assert len({code_hash(files) for files in contents}) == 3


def test_every_file_that_is_installed_is_copied() -> None:
    found = {path.as_posix() for path in package_files()}
    assert {"__init__.py", "slurm/train.sbatch", "kernels/machine_code.json", "configs/data/clips.yaml"} <= found
    assert {path.split("/")[0] for path in found if "/" in path}.isdisjoint({"tests", "docs", "benchmarks"})


def test_the_copy_is_what_python_finds_and_it_brings_its_settings(tmp_path: Path) -> None:
    folder = place_code(tmp_path / "code", Placement())
    program = "import muybridge.configs, muybridge.slurm.scheduler as s; print(s.__file__, muybridge.configs.__file__)"
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=PACKAGE, capture_output=True, text=True, check=True
    )
    found = [str(folder / "muybridge" / name) for name in ("slurm/scheduler.py", "configs/__init__.py")]
    assert done.stdout.split() == found
    assert (folder / "muybridge" / "configs" / "experiment" / "quickstart.yaml").is_file()


def test_a_copy_knows_its_commit_also_below_another_checkout(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    folder = place_code(tmp_path / "code", Placement())
    program = "from muybridge.train.provenance import git_commit; print(git_commit())"
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(git_commit())


def test_the_change_since_the_last_commit_is_kept_without_secrets(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], cwd=checkout, check=True)
    subprocess.run([*git, "add", "train", "__init__.py"], cwd=checkout, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], cwd=checkout, check=True)
    assert changes_since_commit(checkout) == ""
    monkeypatch.setenv("MY_API_KEY", SECRET)
    (checkout / "train" / "trainer.py").write_text(f"key = '{SECRET}'\n# WANDB_API_KEY=0123456789abcdef\n")
    (checkout / "__init__.py").write_bytes(b"\xff\xfe")
    text = changes_since_commit(checkout)
    assert "+key = '[hidden]'\n+# WANDB_API_KEY=[hidden]\n" in text
    assert SECRET not in text


def test_where_there_is_no_checkout_and_no_git_there_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert changes_since_commit(tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert changes_since_commit() == ""
    assert circumstances({})["git_commit"] is None


def test_the_circumstances_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET, "NCCL_DEBUG": f"x{SECRET}", "http_proxy": "http://a:b@c"}
    for name, value in {**values, "NCCL_SOCKET_IFNAME": "ib0", "EDITOR": "vi"}.items():
        monkeypatch.setenv(name, value)
    facts = circumstances({"nodes": 4})
    assert SECRET not in json.dumps(facts)
    assert facts["environment"]["NCCL_SOCKET_IFNAME"] == "ib0"
    assert facts["environment"]["NCCL_DEBUG"].startswith("x[")
    assert {"EDITOR", "WANDB_API_KEY", "http_proxy"}.isdisjoint(facts["environment"])
    assert facts["slurm"] == {"nodes": 4}
    assert facts["versions"]["torch"]


def test_bash_reads_fields_as_they_are() -> None:
    fields = ["", "a b", "$(touch x)`id`", "two\nlines\n", "'\"\\*;#", "é", "\udcff"]
    program = "mapfile -d '' -t fields; printf '%s\\0' \"${fields[@]}\""
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-c", program], input=nul_terminated(fields), capture_output=True, check=True)
    assert [os.fsdecode(field) for field in done.stdout.split(b"\0")[:-1]] == fields


def test_undone_everything_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "stale").write_text("stale")
    placement = Placement()
    placement.write(tmp_path / "old", b"new")
    placement.write(tmp_path / "old", b"newer")
    placement.write(tmp_path / "a" / "b" / "c", b"c")
    placement.remove(tmp_path / "stale")
    placement.remove(tmp_path / "nothing")
    assert (tmp_path / "old").read_text() == "newer"
    assert not (tmp_path / "stale").exists()
    placement.undo()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "old", "stale": "stale"}


def test_kept_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    placement = Placement()
    placement.write(tmp_path / "old", b"new")
    placement.remove(tmp_path / "none")
    placement.keep()
    placement.undo()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "new"}


def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    placement = Placement()
    with pytest.raises(OSError, match="Not a directory"):
        placement.write(tmp_path / "file" / "below", b"x")
    with pytest.raises(TypeError):
        placement.write(tmp_path / "text", "no bytes")
    placement.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
