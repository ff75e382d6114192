"""Queueing on a real Slurm."""

import json
import shutil
from pathlib import Path

import pytest

from muybridge.tests.slurm.cluster import Cluster
from muybridge.tests.slurm.programs import real_programs
from muybridge.tests.slurm.stub_run import read_fields
from muybridge.tests.slurm.submitted import Submit

pytestmark = pytest.mark.usefixtures("no_site")


# Instead of the batch script: what it would read goes to RUN_DIR/seen, and it waits.
STUB = """\
#!/bin/bash
# @resources@
# @numbers@
mapfile -d '' -t tasks <slurm/tasks
run_dir=${tasks[${SLURM_ARRAY_TASK_ID:-0}]}
mapfile -d '' -t fields <"$run_dir/slurm/command"
printf '%s\\0' "${fields[@]}" "$SLURM_NTASKS" "$LEAD_SECONDS" >"$run_dir/seen.tmp" && mv "$run_dir/seen.tmp" "$run_dir/seen"
echo ready
sleep 600
"""


HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned`; rm -rf * & | ? [x] {y} é #'


def test_a_real_slurm_takes_a_run_and_refuses_what_it_does_not_have(
    cluster: Cluster, submit: Submit, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", real_programs(cluster, tmp_path / "bin"))
    monkeypatch.setenv("SLURM_JOB_ID", "of-a-shell-in-a-job")
    template = tmp_path / "stub.sbatch"
    template.write_text(STUB)
    for wrong, words in [
        ("slurm.partition=nope", r"nvalid partition .*\(slurm.partition=nope"),
        ("slurm.gpus_per_node=5", r"node configuration is not available .*slurm.gpus_per_node=5"),
        # Slurm itself takes this one, and lets it wait.
        (
            "slurm.gpus_per_node=64",
            r"would wait for ever, for PartitionConfig: its partition has .*slurm.gpus_per_node=64.* was cancelled",
        ),
        ("slurm.after=99999", r"slurm.after=99999 must be a job that Slurm knows"),
    ]:
        with pytest.raises(ValueError, match=words):
            submit(f"slurm.template={template}", wrong)
        assert not run_dir.exists()
    folder = tmp_path / HOSTILE
    submit(f"slurm.template={template}", "slurm.nodes=2", "slurm.time=1:00:00", folder=folder)
    job = json.loads((folder / "slurm" / "job.json").read_text())["jobs"][0]
    log = folder / "slurm" / f"log-{job}.txt"
    cluster.wait_for(lambda: log.exists() and "ready\n" in log.read_text(), 60, f"job {job} to run")
    assert read_fields(folder / "seen") == [*read_fields(folder / "slurm" / "command"), "4", "300"]
    with pytest.raises(ValueError, match=rf"has a job in the queue already: {job} \(RUNNING\)"):
        submit(f"slurm.template={template}", folder=folder)
    facts = cluster.job(job)
    assert (facts["TimeLimit"], facts["Requeue"], facts["WorkDir"]) == ("01:00:00", "1", str(folder))
    assert not list(tmp_path.rglob("pwned"))


def test_a_real_slurm_runs_the_tasks_of_a_sweep_side_by_side_and_a_chain_in_turn(
    cluster: Cluster, submit: Submit, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", real_programs(cluster, tmp_path / "bin"))
    template = tmp_path / "stub.sbatch"
    template.write_text(STUB)
    submit(f"slurm.template={template}", "--multirun", "seed=1,2", "slurm.chain=2", "slurm.gpus_per_node=1")
    first, second = json.loads((run_dir / "seed_1" / "slurm" / "job.json").read_text())["jobs"]
    seen = [run_dir / f"seed_{seed}" / "seen" for seed in (1, 2)]
    cluster.wait_for(lambda: all(path.exists() for path in seen), 60, "both tasks to run at once")
    assert [cluster.state(f"{second}_{index}") for index in (0, 1)] == ["PENDING", "PENDING"]
    for path in seen:
        path.unlink()
    cluster.run(["scancel", str(first)])
    cluster.wait_for(lambda: all(path.exists() for path in seen), 60, "the next job of the chain")


def test_a_chain_of_sweeps_goes_on_where_jobs_cannot_be_requeued_and_no_job_is_queued_twice(
    cluster: Cluster, submit: Submit, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", real_programs(cluster, tmp_path / "bin"))
    python = tmp_path / "python"
    shutil.copy(Path(__file__).with_name("stub_python.sh"), python)
    python.chmod(0o755)
    runs = [run_dir / f"seed_{seed}" for seed in (1, 2)]
    for run in runs:
        run.mkdir(parents=True)
        (run / "train").write_text('[ ! -e "$run_dir/begun" ] || leave 0\n: >"$run_dir/begun"\nleave 75 scheduler\n')
    chain = ["slurm.chain=2", "slurm.requeue=false", "slurm.health=false", f"slurm.python={python}"]
    submit("--multirun", "seed=1,2", "slurm.gpus_per_node=1", *chain)
    jobs = json.loads((runs[0] / "slurm" / "job.json").read_text())["jobs"]
    tasks = [f"{jobs[1]}_{index}" for index in (0, 1)]
    cluster.wait_for(lambda: {cluster.state(task) for task in tasks} == {"COMPLETED"}, 90, "the last job of the chain")
    for run in runs:
        events = [json.loads(line) for line in (run / "slurm" / "lives.jsonl").read_text().splitlines()]
        assert [row["event"] for row in events] == ["start", "end", "start", "end"]
        assert [row["decision"] for row in events[1::2]] == ["resubmit", "done"]
