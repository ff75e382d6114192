"""A real Slurm cluster for the tests of this folder, and one training at a time on this machine."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from muybridge.slurm.config import SITE_VARIABLE
from muybridge.slurm.plan import quoted
from muybridge.slurm.submit import main
from muybridge.tests.slurm.cluster import Cluster, why_no_cluster
from muybridge.tests.slurm.programs import FakeSlurm
from muybridge.tests.slurm.stub_run import MakeRun, StubRun
from muybridge.tests.slurm.submitted import Submit


def require_cluster() -> None:
    """Skip where no cluster can run; where MUYBRIDGE_REQUIRE_SLURM=1 is set, fail instead."""
    if reason := why_no_cluster():
        if os.environ.get("MUYBRIDGE_REQUIRE_SLURM") == "1":
            pytest.fail(f"MUYBRIDGE_REQUIRE_SLURM=1, and {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster of this process, for all its tests."""
    require_cluster()
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster of three idle nodes, n1-n3, with four GPUs each that are none; afterwards jobs are cancelled and nodes mended."""
    yield session_cluster
    session_cluster.mend()


@pytest.fixture
def make_run(cluster: Cluster, tmp_path: Path) -> MakeRun:
    """Makes run directories for the batch script with a stub for the trainer; those of one test have names of their own."""
    return lambda name="run", **phases: StubRun(cluster, tmp_path / name, **phases)


@pytest.fixture
def one_training_at_a_time() -> Iterator[None]:
    """Nobody else on this machine trains in a test of Slurm meanwhile: its processes would wait for each other."""
    with (Path(tempfile.gettempdir()) / f"muybridge-one-training-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's programs on PATH, without a Slurm."""
    slurm = FakeSlurm(tmp_path / "fake_slurm")
    monkeypatch.setenv("PATH", slurm.path)
    return slurm


@pytest.fixture
def no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SITE_VARIABLE, raising=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run that is not there yet."""
    return tmp_path / "runs" / "first"


@pytest.fixture
def submit(no_site: None, tiny_run: list[str], run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Submit:
    """Submits a run that takes seconds, with more of its settings; returns what was printed."""

    def call(*arguments: str, folder: Path = run_dir) -> str:
        capsys.readouterr()
        fast = ["slurm.gpus_per_node=2", "slurm.snapshot_code=false"]
        assert main([*tiny_run, *fast, f"run_dir={quoted(str(folder))}", *arguments]) == 0
        return capsys.readouterr().out

    return call
