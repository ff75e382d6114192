"""The cluster that tests of Slurm run on: where there is none they say so, and nothing of it is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from muybridge.tests.slurm.cluster import Cluster, why_no_cluster
from muybridge.tests.slurm.conftest import require_cluster


def test_without_slurm_tests_skip_and_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("MUYBRIDGE_REQUIRE_SLURM", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(pytest.skip.Exception, match=r"sbatch.*make slurm-packages"):
        require_cluster()
    monkeypatch.setenv("MUYBRIDGE_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match=r"MUYBRIDGE_REQUIRE_SLURM=1, and .*sbatch"):
        require_cluster()


@pytest.mark.parametrize(("user", "platform", "needs"), [(1000, "linux", "root"), (0, "darwin", "Linux")])
def test_a_cluster_needs_root_and_linux(monkeypatch: pytest.MonkeyPatch, user: int, platform: str, needs: str) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setattr(sys, "platform", platform)
    assert needs in why_no_cluster()


def test_a_cluster_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    require_cluster()
    with subprocess.Popen(["sleep", "300"]) as owner:
        cluster = Cluster(tmp_path / "slurm", OWNER=str(owner.pid))
        (tmp_path / "slurm").mkdir()
        try:
            cluster.start()
            job = cluster.sbatch(["--chdir=/tmp", "--output=/dev/null", "--wrap=sleep 300"])
            cluster.wait_for(lambda: cluster.state(job) == "RUNNING", 30, "a job")
            assert processes_of(cluster)
            owner.kill()
            owner.wait()
            cluster.wait_for(lambda: not processes_of(cluster), 60, "its end")
        finally:
            owner.kill()
            cluster.stop()


def processes_of(cluster: Cluster) -> list[str]:
    """The command lines that name the cluster's folder: of its daemons, of nodes, of steps of jobs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if bytes(cluster.folder) in command:
            found.append(command.decode(errors="replace"))
    return found
