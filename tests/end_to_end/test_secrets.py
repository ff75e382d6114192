"""Canaries in the environment, a real run that ends well and one that fails: nothing that is left or said holds any of them."""

import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import pytest

from muybridge.tests.patience import PATIENCE
from muybridge.train.outputs import OUTPUTS

# The last is a login that W&B would note down with all else that Slurm says.
CANARIES = {
    "WANDB_API_KEY": "0" * 8 + "canary" + "a1b2" * 6 + "ff",
    "AWS_ACCESS_KEY_ID": "AKIACANARY0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret/0123456789",
    "HF_TOKEN": "hf_canary0123456789012345678901234567",
    "DATABASE_PASSWORD": 'canary "db" 0123456789',
    "SLURM_JWT": "eyJcanary0123456789.eyJcanary0123456789.canary-0123",
}
PROXY = "http://someone:canaryproxy0123@proxy:3128"


@pytest.fixture(scope="module")
def environment(command_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With canaries, a Slurm job's variables, and a home in which we can look for what libraries leave there."""
    home = tmp_path_factory.mktemp("home")
    own = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "SLURM_JOB_ID": "77", "https_proxy": PROXY, "no_proxy": "*"}
    (home / "tmp").mkdir()
    return {**command_env, **CANARIES, **own}


def needles() -> list[bytes]:
    """The canaries, and their parts and disguises that would be as good."""
    found = [*CANARIES.values(), "canaryproxy0123"]
    found += [quote(text, safe="") for text in found] + [b64encode(text.encode()).decode() for text in found]
    return [text.encode() for text in found] + [b"canary", b"CANARY"]


def find_canaries(*folders: Path) -> list[str]:
    """Files that hold one or are named like one."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        f"{path}: {needle!r}"
        for path in files
        for needle in needles()
        if needle in path.read_bytes() or needle in str(path).encode()
    ]


def settings(tiny_run: list[str], run_dir: Path) -> list[str]:
    """A run with everything that writes: W&B, checkpoints, validation videos, latents read by a decoderless loader."""
    return [
        *tiny_run,
        *(f"run_dir={run_dir}", "tracking.wandb=offline", "steps=4", "checkpoint.every_steps=2", "sampler.steps=1"),
        *("validation.every_steps=4", "validation.prompts=[a red circle]"),
    ]


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, check=False, env=environment, timeout=120 * PATIENCE
    )


def said(answer: subprocess.CompletedProcess[bytes]) -> list[bytes]:
    return [needle for needle in needles() if needle in answer.stdout + answer.stderr]


def test_a_run_leaves_no_secret_behind(tiny_run: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    answer = run(["-m", "muybridge.train", *settings(tiny_run, run_dir)], environment)
    assert answer.returncode == 0, answer.stderr.decode()
    assert not said(answer)
    assert list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))  # W&B was on, and its binary file is searched as well
    assert list(run_dir.glob("checkpoints/step-00000004/run.json"))
    assert not find_canaries(run_dir, Path(environment["HOME"]))
    # What is written is what `outputs` knows of, and guards against links.
    assert {path.name for path in run_dir.iterdir()} <= set(OUTPUTS)


def test_a_failing_run_leaves_no_secret_behind(
    tiny_run: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    program = str(Path(__file__).with_name("failing_program.py"))
    answer = run([program, *settings(tiny_run, run_dir)], environment)
    assert answer.returncode == 1, answer.stderr.decode()
    assert b"printed before the failure: " in answer.stdout
    assert b"RuntimeError: cannot log in with " in answer.stderr
    for name in CANARIES:
        assert f"[{name}]".encode() in answer.stderr, name
    assert not said(answer)
    assert "cannot log in with" in (run_dir / "attempts.jsonl").read_text()
    assert not find_canaries(run_dir, Path(environment["HOME"]))


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    for number, needle in enumerate(needles()):
        (tmp_path / f"{number}.bin").write_bytes(b"\x00\xff" + needle + b"\x00")
    assert len({line.split(":")[0] for line in find_canaries(tmp_path)}) == len(needles())
