"""A run whose trainer is a few lines of bash, under the real batch script on a real cluster."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from muybridge.slurm.render import TEMPLATE, render
from muybridge.tests.slurm.cluster import Cluster

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
ONE = ("--nodes=1", "--ntasks-per-node=1")
# The first life trains until it is asked to stop, the second to the end.
TWO_LIVES = '[ "$life" = 0 ] || leave 0; wait_for "$life_dir/stop"; leave 75 scheduler "asked to stop"'
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_SECONDS = 60


class StubRun:
    """One run directory with what `muybridge submit` would have written there, and what its job did."""

    def __init__(
        self,
        cluster: Cluster,
        run_dir: Path,
        *,
        train: str = "leave 0",
        health: str | None = None,
        stage: str | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        """`train`, `health` and `stage` are lines of bash for stub_python.sh; a phase that is None is left out."""
        self.cluster, self.run_dir, self.folder = cluster, run_dir, run_dir / "slurm"
        self.phases = {"train": train, "health": health, "stage": stage}
        self.job = 0
        self.folder.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("stub_python.sh"), run_dir / "python")
        (run_dir / "python").chmod(0o755)
        for phase, lines in self.phases.items():
            if lines is not None:
                (run_dir / phase).write_text(lines)
        staged = "" if stage is None else str(run_dir / "staged")
        fields = [str(run_dir), str(run_dir / "python"), str(self.folder / "code"), staged, *overrides]
        write_fields(self.folder / "command", fields)
        write_fields(self.folder / "tasks", [str(run_dir)])
        (self.folder / "submission").write_text("first\n")

    def write_script(self, *resources: str, limit: int = 3, lead: int = 60, set_up: str = "") -> Path:
        """The batch script; `set_up` are lines where a site has its own, and each of `resources` is an option of sbatch."""
        lines = [f"#SBATCH {option}" for option in ("--job-name=stub", *resources)]
        numbers = {"LEAD_SECONDS": lead, "RESTART_LIMIT": limit, "HEALTH": int(self.phases["health"] is not None)}
        text = render(TEMPLATE.read_text(), resources=lines, numbers=numbers)
        script = self.folder / "train.sbatch"
        script.write_text(text.replace("# module purge", f"{set_up}\n# module purge", 1))
        return script

    def submit(
        self, *resources: str, limit: int = 3, lead: int = 60, set_up: str = "", options: Sequence[str] = ()
    ) -> int:
        """Queue a job; `options` go to sbatch itself."""
        script = self.write_script(*resources, limit=limit, lead=lead, set_up=set_up)
        self.job = self.cluster.sbatch([f"--chdir={self.run_dir}", *options, script])
        return self.job

    def warn(self) -> None:
        """What Slurm sends before the time limit, or before a job is preempted."""
        self.cluster.run(["scancel", "--batch", "--signal=USR2", str(self.job)])

    def life_dir(self, life: int = 0) -> Path:
        return self.folder / "lives" / f"{self.job}.{life}"

    def given(self, phase: str, rank: int, *, life: int = 0) -> list[str]:
        """The arguments a task was started with."""
        return read_fields(self.life_dir(life) / f"given-{phase}-{rank}.argv")

    def environment(self, phase: str, rank: int, *, life: int = 0) -> dict[str, str]:
        """The environment a task was started in."""
        fields = read_fields(self.life_dir(life) / f"given-{phase}-{rank}.env")
        return dict(field.split("=", 1) for field in fields)

    def wait_for_phase(self, phase: str, *, ranks: int = 1, life: int = 0) -> None:
        """Until all tasks of it are at work."""
        files = [self.life_dir(life) / f"given-{phase}-{rank}.argv" for rank in range(ranks)]
        self.wait_until(lambda: all(file.exists() for file in files), f"{phase} of life {life}")

    def wait_until(self, condition: Callable[[], object], what: str, *, seconds: float = _SECONDS) -> None:
        """As the cluster's wait, with this job's log where it fails."""

        def holds() -> object:
            self.cluster.state(self.job)
            return condition()

        self.cluster.wait_for(holds, seconds, f"{what}, job {self.job}")

    def to_end(self, *, seconds: float = _SECONDS) -> str:
        """Wait for the job's end, without the waits that Slurm puts before each further life; its last state."""
        state, hurried = "", 0

        def is_over() -> bool:
            nonlocal state, hurried
            facts = self.cluster.job(self.job)
            state = facts["JobState"]
            restarts = int(facts["Restarts"])
            if state == "PENDING" and restarts > hurried:
                self.cluster.hurry(self.job)
                hurried = restarts
            return state in FINAL

        self.cluster.wait_for(is_over, seconds, f"the end of job {self.job}")
        return state

    def events(self, name: str = "end") -> list[dict[str, object]]:
        """The lines of lives.jsonl of one kind."""
        file = self.folder / "lives.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [row for row in rows if row["event"] == name]

    def decisions(self) -> list[object]:
        """What the batch script decided at the end of each life."""
        return [row["decision"] for row in self.events()]

    def fruitless(self) -> int:
        """Lives in a row without a new checkpoint, as the script counts them."""
        return int((self.folder / "fruitless").read_text().split("\n")[0])

    def log(self) -> str:
        """The job's log."""
        return (self.folder / f"log-{self.job}.txt").read_text()


def write_fields(path: Path, fields: Sequence[str]) -> None:
    """As `muybridge submit` hands text to bash."""
    path.write_bytes(b"".join(field.encode() + b"\0" for field in fields))


def read_fields(path: Path) -> list[str]:
    """What `write_fields` wrote."""
    return path.read_bytes().decode().split("\0")[:-1]


MakeRun = Callable[..., StubRun]
