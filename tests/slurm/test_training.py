"""Real training on a real Slurm: two nodes with two processes each, ZeRO 2 over gloo, submitted, stopped, broken and continued.

Whatever befalls a run on its way, its losses and weights are those of a run that nothing befell.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muybridge.tests.faults.run_folder import Story, leftovers, read_rows, read_story
from muybridge.tests.patience import PATIENCE
from muybridge.tests.slurm.cluster import Cluster

STEPS = 100
SETTINGS = [
    *("deepspeed=zero2", f"steps={STEPS}", "global_batch=16", "micro_batch=4"),
    *("checkpoint.every_steps=10", "optimizer.warmup_steps=5"),
]
NODES = ["slurm.nodes=2", "slurm.gpus_per_node=0", "slurm.processes_per_node=2", "slurm.cpus_per_process=1"]
START_SECONDS, REQUEUE_SECONDS, TIME_LIMIT_SECONDS = 150, 60, 120
TRAINER = "muybridge[.]train"  # as pgrep looks for it, without finding itself

pytestmark = [pytest.mark.timeout(600 * PATIENCE), pytest.mark.usefixtures("one_training_at_a_time")]
Submit = Callable[..., "Run"]


class Run:
    """A run that was submitted, as its user and its cluster see it."""

    def __init__(self, cluster: Cluster, run_dir: Path) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        self.job_file = json.loads((run_dir / "slurm" / "job.json").read_text())
        self.job = str(self.job_file["jobs"][0])

    def facts(self) -> dict[str, str]:
        return self.cluster.job(self.job)

    def wait_for_step(self, step: int, *, life: int = 0) -> None:
        """Until an attempt of this life has logged the step."""

        def reached() -> bool:
            attempts = [row["attempt"] for row in events(self.run_dir, "attempts.jsonl") if row.get("life") == name]
            rows = events(self.run_dir, "metrics.jsonl")
            return any(row["attempt"] in attempts and row["step"] >= step for row in rows)

        name = f"{self.job}.{life}"
        self.cluster.wait_for(reached, START_SECONDS, f"step {step} of life {name}")

    def wait_for_state(self, *states: str) -> None:
        self.cluster.wait_for(lambda: self.facts()["JobState"] in states, START_SECONDS, f"job {self.job} {states}")

    def wait_for_restart(self, life: int) -> None:
        """Until Slurm has taken the job back for this life, and let it begin without the usual minutes of waiting."""
        self.cluster.wait_for(
            lambda: self.facts()["Restarts"] == str(life) or self.facts()["JobState"] == "PENDING",
            REQUEUE_SECONDS,
            f"life {life} of job {self.job}",
        )
        self.cluster.hurry(self.job)

    def ends(self) -> list[tuple[str, str]]:
        """Life and decision of each end that the batch script wrote down."""
        rows = events(self.run_dir, "slurm/lives.jsonl")
        return [(row["life"].partition(".")[2], row["decision"]) for row in rows if row["event"] == "end"]

    def status(self) -> dict[str, Any]:
        answer = self.cluster.run([*MUYBRIDGE, "status", str(self.run_dir), "--json"])
        (run,) = json.loads(answer.stdout)["runs"]
        return run


MUYBRIDGE = [sys.executable, "-m", "muybridge.scripts.cli"]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; [] before there is one."""
    path = run_dir / name
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="session")
def submit(session_cluster: Cluster, command_env: dict[str, str], tiny_run: list[str]) -> Submit:
    """`muybridge submit` of the settings on the cluster's login host, and the run that comes of it."""

    def run(run_dir: Path, *overrides: str) -> Run:
        command = [*MUYBRIDGE, "submit", *tiny_run, *SETTINGS, *NODES, f"run_dir={run_dir}", *overrides]
        session_cluster.run(command, env=command_env)
        return Run(session_cluster, run_dir)

    return run


@pytest.fixture(scope="module")
def uninterrupted(submit: Submit, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run to which the others are compared."""
    run = submit(tmp_path_factory.mktemp("uninterrupted") / "run")
    run.wait_for_state("COMPLETED", "FAILED")
    return run


@pytest.fixture(scope="module")
def reference(uninterrupted: Run) -> Story:
    return read_story(uninterrupted.run_dir)


def assert_equal(run: Run, reference: Story) -> None:
    story = read_story(run.run_dir)
    assert story.rows == reference.rows
    assert story.shards == reference.shards


def test_a_run_is_submitted_trains_and_is_done(uninterrupted: Run) -> None:
    assert uninterrupted.facts()["JobState"] == "COMPLETED", uninterrupted.cluster.logs()
    assert [row["step"] for row in read_rows(uninterrupted.run_dir)] == list(range(1, STEPS + 1))
    assert uninterrupted.ends() == [("0", "done")]
    (attempt,) = [row for row in events(uninterrupted.run_dir, "attempts.jsonl") if row["event"] == "start"]
    assert attempt["world_size"] == 4
    assert (uninterrupted.run_dir / "slurm" / "health.json").exists()
    status = uninterrupted.status()
    assert (status["state"], status["progress"]["step"], status["checkpoint"]["step"]) == ("done", STEPS, STEPS)


def test_a_run_that_much_befalls_ends_as_if_nothing_had(
    submit: Submit, cluster: Cluster, reference: Story, tmp_path: Path
) -> None:
    tracked = ["slurm.health=false", "tracking.wandb=offline"]
    run = submit(tmp_path / "run", *tracked, "slurm.time=0:30:00", "slurm.lead_seconds=60")

    # The time limit. One rank is held where it is until Slurm, which looks twice a minute, has warned.
    run.wait_for_step(10)
    cluster.on("n2", ["pkill", "-STOP", "-o", "-f", TRAINER])
    minutes = int((seconds(run.facts()["RunTime"]) + 45) / 60) + 1
    cluster.run(["scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}"])
    stop = run.run_dir / "slurm" / "lives" / f"{run.job}.0" / "stop"
    cluster.wait_for(stop.exists, TIME_LIMIT_SECONDS, "the warning before the time limit")
    cluster.on("n2", ["pkill", "-CONT", "-f", TRAINER])
    run.wait_for_restart(1)
    assert run.ends() == [("0", "requeue")]
    assert (stop.parent / "ended").read_text().split("\n")[:2] == ["75", "scheduler"]
    cluster.run(["scontrol", "update", f"JobId={run.job}", "TimeLimit=30"])

    # An administrator.
    run.wait_for_step(20, life=1)
    cluster.run(["scontrol", "requeue", run.job])
    run.wait_for_restart(2)

    # All processes of a node, without a word.
    run.wait_for_step(33, life=2)
    cluster.on("n2", ["pkill", "-KILL", "-f", TRAINER])
    run.wait_for_restart(3)
    assert run.ends()[-1] == ("2", "requeue")

    # A node, with all that runs on it. Slurm finds that out by itself, too, after half a minute here and five in production.
    run.wait_for_step(43, life=3)
    cluster.crash("n2")
    cluster.run(["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test"])
    run.wait_for_restart(4)
    run.wait_for_step(53, life=4)
    assert run.facts()["NodeList"] == "n[1,3]"

    # The user.
    cluster.run(["scancel", run.job])
    run.wait_for_state("CANCELLED")
    assert run.facts()["Restarts"] == "4"
    assert not [decision for life, decision in run.ends() if life == "4" and decision in ("requeue", "resubmit")]

    # Who submits it again later.
    again = submit(tmp_path / "run", *tracked)
    assert again.job != run.job
    again.wait_for_state("COMPLETED", "FAILED")
    assert run.facts()["JobState"] == "CANCELLED"
    assert_equal(again, reference)
    assert leftovers(again.run_dir) == []
    attempts = [row for row in events(again.run_dir, "attempts.jsonl") if row["event"] == "start"]
    assert [row["life"] for row in attempts] == [*(f"{run.job}.{life}" for life in range(5)), f"{again.job}.0"]
    wandb = sorted((again.run_dir / "wandb").glob("offline-run-*"))
    assert len(wandb) == len(attempts)
    assert len({folder.name.rpartition("-")[2] for folder in wandb}) == 1  # one run for W&B


def test_a_life_on_a_node_that_was_cut_off_spoils_nothing(
    submit: Submit, cluster: Cluster, reference: Story, tmp_path: Path
) -> None:
    one_node = ["slurm.nodes=1", "slurm.processes_per_node=4", "slurm.health=false"]
    run = submit(tmp_path / "run", *one_node)
    run.wait_for_step(10)
    node = run.facts()["NodeList"]
    cluster.on(node, ["pkill", "-STOP", "-f", TRAINER])
    cluster.cut(node)
    try:
        run.wait_for_restart(1)
        run.wait_for_step(30, life=1)
        assert run.facts()["NodeList"] != node
        cluster.on(node, ["pkill", "-CONT", "-f", TRAINER])  # all of the first life, which knows of nothing
        gone = lambda: cluster.on(node, ["pgrep", "-f", TRAINER], check=False).returncode  # noqa: E731
        cluster.wait_for(gone, START_SECONDS, "the end of the life on the node that was cut off")
        run.wait_for_state("COMPLETED", "FAILED")
    finally:
        cluster.heal(node)
    assert_equal(run, reference)
    first, second = [row["attempt"] for row in events(run.run_dir, "attempts.jsonl") if row["event"] == "start"]
    history = [
        (row["attempt"], row["event"])
        for row in events(run.run_dir, "attempts.jsonl")
        if row["event"] in ("start", "commit")
    ]
    assert (first, "commit") not in history[history.index((second, "start")) :]


def test_a_mistake_that_only_the_job_can_find_is_not_tried_again(
    submit: Submit, cluster: Cluster, toy_folder: Path, tmp_path: Path
) -> None:
    # All ranks find it, and the first one that leaves has the others ended: the cause is told all the same.
    latents = shutil.copytree(toy_folder / "latents", tmp_path / "latents")
    two = "slurm.processes_per_node=1"
    run = submit(tmp_path / "run", f"data.latents={latents}", "slurm.health=false", "slurm.options=[--hold]", two)
    shutil.rmtree(latents)
    cluster.run(["scontrol", "release", run.job])
    run.wait_for_state("FAILED", "COMPLETED")
    assert run.ends() == [("0", "give_up")]
    status = run.status()
    assert (status["state"], status["code"]) == ("gave_up", 64)
    assert str(latents) in status["gave_up"]


def test_a_run_that_ends_before_its_first_checkpoint_again_and_again_is_given_up(
    submit: Submit, cluster: Cluster, tmp_path: Path
) -> None:
    run = submit(tmp_path / "run", "slurm.health=false", "slurm.processes_per_node=1", "restart_limit=2")
    for life in (0, 1):
        if life:
            run.wait_for_restart(life)
        began = lambda: cluster.on("n1", ["pkill", "-KILL", "-f", TRAINER], check=False).returncode == 0  # noqa: E731
        cluster.wait_for(began, START_SECONDS, f"the processes of life {life}")
    run.wait_for_state("FAILED", "COMPLETED")
    assert run.ends() == [("0", "requeue"), ("1", "give_up")]
    assert "2" in run.status()["gave_up"]


def seconds(run_time: str) -> int:
    """Of Slurm's [DAYS-]HH:MM:SS."""
    days, _, clock = run_time.rpartition("-")
    hours, minutes, rest = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
