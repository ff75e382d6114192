"""What Slurm's programs are asked, and what is made of their answers and their silence."""

from pathlib import Path

import pytest

from muybridge.slurm import scheduler
from muybridge.slurm.scheduler import Job, SchedulerAway, SchedulerError
from muybridge.tests.slurm.cluster import Cluster
from muybridge.tests.slurm.programs import FakeSlurm, real_programs


def test_arguments_reach_sbatch_as_they_are_and_its_number_comes_back(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    hostile = ["--chdir=/a b/$(touch x)`id`;'\"\n*", "script;rm"]
    fake_slurm.answer("sbatch", "echo '4711;other'; exit 0")
    assert scheduler.sbatch(hostile) == 4711
    assert fake_slurm.calls("sbatch") == [["--parsable", *hostile]]


def test_an_answer_without_a_number_is_an_error(fake_slurm: FakeSlurm) -> None:
    fake_slurm.answer("sbatch", "echo welcome; exit 0")
    with pytest.raises(SchedulerError, match="must answer with the job's number, and said: 'welcome'"):
        scheduler.sbatch(["script"])


def test_nothing_of_a_job_around_us_reaches_slurms_programs(
    fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SQUEUE_FORMAT", "SLURM_CONF", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "of-the-shell")
    scheduler.sbatch(["script"])
    seen = {name for name, value in fake_slurm.environment("sbatch").items() if value == "of-the-shell"}
    # A job has the environment of whoever submits it, keys included.
    assert seen == {"SLURM_CONF", "WANDB_API_KEY"}


def test_a_refusal_is_told_in_slurms_words(fake_slurm: FakeSlurm) -> None:
    fake_slurm.answer("sbatch", "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    with pytest.raises(SchedulerError, match=r"^invalid partition specified: nope$"):
        scheduler.sbatch(["script"])
    fake_slurm.answer("sbatch", "exit 3")
    with pytest.raises(SchedulerError, match="sbatch ended with 3 and without a word"):
        scheduler.sbatch(["script"])


def test_a_controller_that_is_away_is_told_from_a_refusal(
    fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm.answer(
        "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    )
    with pytest.raises(SchedulerAway, match=r"cannot be reached: .*connect failure"):
        scheduler.queued([1])
    monkeypatch.setattr(scheduler, "TIMEOUT_SECONDS", 0.3)
    fake_slurm.answer("scontrol", "exec sleep 20")
    with pytest.raises(SchedulerAway, match="scontrol did not answer within"):
        scheduler.job_facts(1)


def test_a_machine_without_slurm_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerError, match=r"squeue is not on PATH: .* a login node"):
        scheduler.queued([1])
    (tmp_path / "squeue").write_text("no program")
    (tmp_path / "squeue").chmod(0o755)
    with pytest.raises(SchedulerError, match="squeue cannot be started"):
        scheduler.queued([1])


def test_the_queue_is_read_with_tasks_and_odd_reasons(fake_slurm: FakeSlurm) -> None:
    fake_slurm.answer(
        "squeue", "echo '12_3|PENDING|Resources|0:00||a|b'; echo '13|RUNNING|None|1-02:03:04|n[1-2]|c'; echo noise"
    )
    assert scheduler.queued([12, "13"]) == [
        Job("12_3", "PENDING", "Resources", "0:00", "", "a|b"),
        Job("13", "RUNNING", "None", "1-02:03:04", "n[1-2]", "c"),
    ]
    assert scheduler.queued([12])[0].number == 12
    assert fake_slurm.calls("squeue")[0][-1] == "--jobs=12,13"
    scheduler.queued(name="run-0a1b2c")
    assert fake_slurm.calls("squeue")[-1][-1] == "--name=run-0a1b2c"


def test_jobs_that_slurm_has_forgotten_are_no_error(fake_slurm: FakeSlurm) -> None:
    for program in ("squeue", "scontrol"):
        fake_slurm.answer(program, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    fake_slurm.answer(
        "scancel", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1"
    )
    assert scheduler.queued([7]) == []
    assert scheduler.job_facts(7) is None
    scheduler.cancel([7])


def test_nothing_to_ask_for_asks_nothing(fake_slurm: FakeSlurm) -> None:
    assert scheduler.queued([]) == []
    scheduler.cancel([])
    assert not fake_slurm.calls("squeue")
    assert not fake_slurm.calls("scancel")


def test_jobs_and_tasks_are_cancelled_in_one_call(fake_slurm: FakeSlurm) -> None:
    scheduler.cancel([7, "8_1"])
    assert fake_slurm.calls("scancel") == [["7", "8_1"]]


def test_values_of_scontrol_may_hold_blanks() -> None:
    line = "JobId=7 JobName=x-0a UserId=me(1) CPUs/Task=1 Command=/a b/c=d.sh NtasksPerN:B:S:C=0:0:*:* WorkDir=/a b Power= "
    facts = scheduler.parse_facts(f"{line}JobName=other")
    assert (facts["JobName"], facts["WorkDir"], facts["Power"]) == ("x-0a", "/a b", "")
    assert (facts["CPUs/Task"], facts["NtasksPerN:B:S:C"]) == ("1", "0:0:*:*")


def test_a_real_slurm_is_understood(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", real_programs(cluster, tmp_path / "bin"))
    script = tmp_path / "sleep.sh"
    script.write_text("#!/bin/bash\nsleep 100\n")
    job = scheduler.sbatch([f"--chdir={tmp_path}", "--job-name=abc", "--array=0-1", str(script)])
    cluster.wait_for(lambda: {task.state for task in scheduler.queued([job])} == {"RUNNING"}, 30, "both tasks to run")
    assert [task.id for task in sorted(scheduler.queued(name="abc"), key=lambda task: task.id)] == [
        f"{job}_0",
        f"{job}_1",
    ]
    facts = scheduler.job_facts(f"{job}_1")
    assert facts is not None
    assert (facts["JobState"], facts["WorkDir"]) == ("RUNNING", str(tmp_path))
    scheduler.cancel([job])
    cluster.wait_for(lambda: not scheduler.queued([job]), 30, "the end of the job")
    assert scheduler.job_facts(99999) is None
    cluster.controller_stop()
    monkeypatch.setattr(scheduler, "TIMEOUT_SECONDS", 3.0)
    with pytest.raises(SchedulerAway):
        scheduler.queued([job])
