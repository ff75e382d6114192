"""A Slurm cluster of three nodes for tests: real daemons, started by cluster.sh in namespaces of their own."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from muybridge.tests.patience import PATIENCE

_SCRIPT = Path(__file__).with_name("cluster.sh")
_COMMAND_SECONDS = 120.0
_LOG_LINES = 40
# What a Slurm job around the tests, a user's presets or the tests before would tell the programs.
_PRESETS = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SRUN_", "TRITON_", "TORCH")

NODES = ("n1", "n2", "n3")


def why_no_cluster() -> str:
    """What keeps this machine from running a cluster, in a line; empty where one can be started."""
    if not sys.platform.startswith("linux"):
        return "a Slurm cluster for tests needs Linux"
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root (for network namespaces)"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
    if missing := [name for name in programs if shutil.which(name, path=path) is None]:
        return f"Slurm is not installed ({', '.join(missing)}): make slurm-packages"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"]
    if subprocess.run(
        probe, capture_output=True, env={**os.environ, "PATH": path}, timeout=_COMMAND_SECONDS
    ).returncode:
        return "a Slurm cluster for tests needs namespaces and network bridges, which this container does not allow"
    return ""


class Cluster:
    """Three nodes n1-n3 with fake GPUs, partitions `train` (preemptible) and `urgent`; files are those of this machine."""

    def __init__(self, folder: Path, **settings: str) -> None:
        """Nothing runs yet. Settings are those of cluster.sh: GRACE="0", PREEMPT_SIGNAL="no", ..."""
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_PRESETS)}
        own = {"DIR": str(folder), "OWNER": str(os.getpid()), "KILLWAIT": str(5 * PATIENCE), **settings}
        self._env = {**kept, **{f"SLURM_TEST_{name}": value for name, value in own.items()}}
        self._job_logs: dict[Path, None] = {}  # of the jobs that the test asked about, in order

    def start(self) -> None:
        """Return when all nodes are idle. It ends by itself where this process is gone."""
        self._script("start")

    def stop(self) -> None:
        """End every daemon and every job; for a second time, nothing."""
        self._script("stop", check=False)

    def run(
        self, argv: Sequence[str | Path], *, check: bool = True, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as a user on the head host; with `check` its failure fails the test, with what it printed."""
        return self._script("exec", *map(str, argv), check=check, env=env)

    def on(self, node: str, argv: Sequence[str | Path], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program inside a node, among its processes."""
        return self._script("on", node, *map(str, argv), check=check)

    def crash(self, node: str) -> None:
        """Power off: every process of the node is gone at once."""
        self._script("crash", node)

    def boot(self, node: str) -> None:
        """Power on again; nothing where it is on."""
        self._script("boot", node)

    def cut(self, node: str) -> None:
        """Pull the network cable; what runs on the node goes on."""
        self._script("cut", node)

    def heal(self, node: str) -> None:
        """Plug it in again."""
        self._script("heal", node)

    def controller_stop(self) -> None:
        """End slurmctld; jobs go on."""
        self._script("ctl-stop")

    def controller_start(self) -> None:
        """Return when slurmctld answers."""
        self._script("ctl-start")

    def sbatch(self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> int:
        """Queue a job with these arguments; its number."""
        return int(self.run(["sbatch", "--parsable", *argv], env=env).stdout.strip())

    def job(self, job_id: int | str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of a task of an array ("5_1"); empty where there is none of that number."""
        shown = self.run(["scontrol", "show", "job", "-o", str(job_id)], check=False).stdout
        found = list(re.finditer(r"(?:^|\s)([A-Z][A-Za-z/:]*)=", shown))
        ends = [match.start() for match in found[1:]] + [len(shown)]
        facts = {match[1]: shown[match.end() : end].strip() for match, end in zip(found, ends)}
        if "StdOut" in facts:
            self._job_logs[Path(facts["StdOut"])] = None
        return facts

    def state(self, job_id: int | str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, ...; empty where there is none of that number."""
        return self.job(job_id).get("JobState", "")

    def hurry(self, job_id: int | str) -> None:
        """Let a requeued job start in a second: Slurm makes it wait, in production for two minutes.

        Not at once: its nodes refuse a job within the second in which they ended its last life, and it fails.
        """
        self.wait_for(lambda: self.state(job_id) != "COMPLETING", 60, f"job {job_id} to leave its nodes")
        self.run(["scontrol", "update", f"jobid={job_id}", "StartTime=now+1"], check=False)

    def cancel_all(self) -> None:
        """Cancel every job and wait until they have left their nodes."""
        self.run(["scancel", "--user=root"], check=False)
        self.wait_for(lambda: not self.run(["squeue", "-h"]).stdout.strip(), 60, "cancelled jobs to end")

    def mend(self) -> None:
        """Everything as it was at the start: no jobs, all nodes on, connected and idle."""
        if self.run(["scontrol", "ping"], check=False).returncode:
            self.controller_start()
        for node in NODES:
            self.boot(node)
            self.heal(node)
        self.cancel_all()
        self.wait_for(self._is_idle, 90, "all nodes to be idle")
        self._job_logs.clear()

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Poll until the condition holds; else the test fails with the logs of the jobs it asked about and slurmctld's."""
        deadline = time.monotonic() + seconds * PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds * PATIENCE:.0f} s for {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the logs of the jobs that were asked about, and of slurmctld's."""
        files = [*self._job_logs, self.folder / "log" / "slurmctld.log"]
        return "\n".join(f"--- {path}\n{_tail(path)}" for path in files)

    def _is_idle(self) -> bool:
        return self.run(["sinfo", "-h", "-N", "-p", "train", "-o", "%t"], check=False).stdout.split() == ["idle"] * len(
            NODES
        )

    def _script(
        self, *argv: str, check: bool = True, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", str(_SCRIPT), *argv],
            env={**self._env, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS * PATIENCE,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done


def _tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    except OSError as error:
        return str(error)
