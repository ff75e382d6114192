"""Queueing a sweep: one array, a folder for each run."""

import json
import re
from pathlib import Path

import pytest
import yaml

from muybridge.slurm.plan import quoted
from muybridge.slurm.submit import main
from muybridge.slurm.sweep import expand
from muybridge.tests.slurm.programs import FakeSlurm
from muybridge.tests.slurm.stub_run import read_fields
from muybridge.tests.slurm.submitted import Submit

pytestmark = pytest.mark.usefixtures("no_site")


def test_a_sweep_is_one_job_array_with_a_folder_for_each_run(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    printed = submit("--multirun", "seed=1,2", "optimizer.lr=choice(1e-3,1e-4)", "+model.eps=1e-6", "slurm.parallel=3")
    assert fake_slurm.calls("sbatch") == [
        ["--parsable", f"--chdir={run_dir}", "--dependency=singleton", "--array=0-3%3", f"{run_dir}/slurm/train.sbatch"]
    ]
    names = ["seed_1__lr_0.001", "seed_1__lr_0.0001", "seed_2__lr_0.001", "seed_2__lr_0.0001"]
    runs = [run_dir / name for name in names]
    assert read_fields(run_dir / "slurm" / "tasks") == [str(run) for run in runs]
    assert read_fields(runs[2] / "slurm" / "command")[-3:] == [
        "seed=2",
        "optimizer.lr=0.001",
        f"run_dir={quoted(str(runs[2]))}",
    ]
    job = json.loads((runs[3] / "slurm" / "job.json").read_text())
    assert (job["jobs"], job["array_index"], job["submit_dir"]) == ([101], 3, str(run_dir))
    assert yaml.safe_load(next(runs[1].glob("slurm/submissions/*/config.yaml")).read_text())["optimizer"]["lr"] == 1e-4
    assert "#SBATCH --output=slurm/log-%A_%a.txt" in (run_dir / "slurm" / "train.sbatch").read_text()
    for index, name in enumerate(names):
        assert re.search(rf"│ {index} +│ {re.escape(name)} +│ seed=", printed)
    assert f"tail -F {run_dir / 'slurm' / 'log-101_0.txt'}" in printed


def test_a_sweep_with_one_bad_run_queues_none(fake_slurm: FakeSlurm, submit: Submit, run_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"1 fault:\n  - steps=0 must be at least 1 .* \(with steps=0 seed=1\)"):
        submit("--multirun", "steps=5,0", "seed=1,2")
    assert fake_slurm.calls("sbatch") == []
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["seed=1"], "--multirun needs a setting with several values"),
        (["run_dir=a,b"], "run_dir cannot be swept"),
        (["optimizer.lr=interval(0,1)"], "a sweep needs values that can be counted"),
        (["seed=1,1"], "the values of a setting must differ (seed_1 comes twice)"),
        (["seed=1,2", "slurm.nodes=1,2"], "'slurm.nodes=1,2': a sweep needs --multirun"),
        (["seed=1,2", "optimizer.lr=glob(*)"], "a sweep needs values that can be counted"),
        (["seed=1,2", "slurm.parallel=-1"], "slurm.parallel=-1 must be at least 0"),
    ],
)
def test_a_sweep_that_is_none_is_refused(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, overrides: list[str], fault: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(fault)):
        submit("-m", *overrides)
    assert fake_slurm.calls("sbatch") == []


def test_runs_of_a_sweep_have_names_that_are_safe_and_their_own() -> None:
    combinations = expand(["text.path='a b/$(x)','a b/`x`'", "a.lr=1,2", "b.lr=range(1,3)"]).combinations
    names = [combination.name for combination in combinations]
    assert len(set(names)) == 8
    assert all(re.fullmatch(r"path_-a-b-x-__a.lr_\d__b.lr_\d-[0-9a-f]{6}", name) for name in names)
    assert names == [
        combination.name
        for combination in expand(["text.path='a b/$(x)','a b/`x`'", "a.lr=1,2", "b.lr=range(1,3)"]).combinations
    ]
    long = expand([f"text.path={'x' * 300},y"]).combinations[0].name
    assert len(long) == 107


def test_what_a_queued_array_reads_is_not_replaced(fake_slurm: FakeSlurm, submit: Submit, run_dir: Path) -> None:
    submit("--multirun", "seed=1,2")
    name = json.loads((run_dir / "seed_1" / "slurm" / "job.json").read_text())["name"]
    tasks = (run_dir / "slurm" / "tasks").read_bytes()
    fake_slurm.answer("squeue", f"echo '101_1|PENDING|Resources|0:00||{name}'")
    # Another sweep in this folder would give the waiting task another run.
    with pytest.raises(ValueError, match=r"seed_2 has a job in the queue already: 101_1"):
        submit("--multirun", "seed=3,4")
    assert (run_dir / "slurm" / "tasks").read_bytes() == tasks
    # A run of it whose task is over may be submitted by itself, the other one may not.
    submit(folder=run_dir / "seed_1")
    with pytest.raises(ValueError, match=r"seed_2 has a job in the queue already: 101_1"):
        submit(folder=run_dir / "seed_2")


def test_a_dry_run_of_a_sweep_and_a_chain_says_all_of_it(
    submit: Submit, tiny_run: list[str], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*tiny_run, f"run_dir={run_dir}", "seed=1,2", "--multirun", "slurm.chain=2", "--dry-run"]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].split()[4] == "--array=0-1"
    assert f"task 1 is seed=2 in {run_dir / 'seed_2'}" in said.err
    assert "2 such jobs, each after the one before" in said.err
    assert not run_dir.exists()
