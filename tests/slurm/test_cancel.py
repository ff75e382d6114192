"""`muybridge cancel`: what it leaves behind, and what it never touches."""

import json
from pathlib import Path

import pytest

from muybridge.slurm import cancel
from muybridge.slurm.cancel import main
from muybridge.tests.slurm.cluster import Cluster
from muybridge.tests.slurm.programs import FakeSlurm
from muybridge.tests.slurm.stub_run import StubRun
from muybridge.tests.slurm.submitted import muybridge, set_facts, set_queue, write_job, write_life

# Trains until it is asked to stop, then saves.
HEEDS_STOP = 'until [ -e "$run_dir/STOP" ]; do sleep 0.1; done; save step-00000005; leave 75 user'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    set_queue(fake)
    monkeypatch.setattr(cancel, "_POLL_SECONDS", 0.05)
    return fake


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    write_job(folder, [7, 8])
    return folder


def test_what_waits_is_cancelled_and_what_runs_is_asked(
    slurm: FakeSlurm, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_queue(slurm, "7|RUNNING|None|1:00|n[1-2]|mb-run", "8|PENDING|Dependency|0:00||mb-run")
    assert main([str(run_dir), "--no-wait"]) == 0
    assert slurm.calls("scancel") == [["8"]]
    assert (run_dir / "slurm" / "cancelled").exists()
    assert (run_dir / "STOP").exists()
    printed = capsys.readouterr().out
    assert "job 8 was cancelled" in printed
    assert "job 7 saves and ends after the step it is at" in printed


def test_nobody_is_asked_to_stop_where_none_runs(slurm: FakeSlurm, run_dir: Path) -> None:
    set_queue(slurm, "7|PENDING|BeginTime|0:00||mb-run")
    assert main([str(run_dir), "--no-wait"]) == 0
    assert (run_dir / "slurm" / "cancelled").exists()
    assert not (run_dir / "STOP").exists()  # the next submission would stop at its first step


def test_now_cancels_all_at_once(slurm: FakeSlurm, run_dir: Path) -> None:
    set_queue(slurm, "7|RUNNING|None|1:00|n[1-2]|mb-run", "8|PENDING|Dependency|0:00||mb-run")
    assert main([str(run_dir), "--now", "--no-wait"]) == 0
    assert slurm.calls("scancel") == [["7", "8"]]
    assert not (run_dir / "STOP").exists()


def test_jobs_of_others_are_not_touched(slurm: FakeSlurm, run_dir: Path) -> None:
    set_queue(
        slurm,
        "7|PENDING|Resources|0:00||mb-run",
        "8|PENDING|Resources|0:00||other",  # of a cluster that was set up anew, where numbers began again
        "8_3|PENDING|Resources|0:00||mb-run",  # of a sweep
        "70|PENDING|Resources|0:00||mb-run",  # of a run of the same name in another folder
    )
    set_facts(slurm, "JobId=70 JobState=PENDING Command=/elsewhere/slurm/train.sbatch WorkDir=/elsewhere")
    assert main([str(run_dir), "--no-wait"]) == 0
    assert slurm.calls("scancel") == [["7"]]


def test_only_its_own_task_of_a_sweep_is_cancelled(slurm: FakeSlurm, tmp_path: Path) -> None:
    for index in (0, 1):
        write_job(tmp_path / "sweep" / str(index), [20], index=index, submit_dir=tmp_path / "sweep")
    # Slurm gives the last task of an array the array's own number: to cancel 20 would cancel both.
    write_life(tmp_path / "sweep" / "1", "20.0", 1000.0)
    set_queue(slurm, "20_0|PENDING|JobArrayTaskLimit|0:00||mb-run", "20_1|PENDING|BeginTime|0:00||mb-run")
    assert main([str(tmp_path / "sweep" / "1"), "--no-wait"]) == 0
    assert slurm.calls("scancel") == [["20_1"]]
    assert not (tmp_path / "sweep" / "0" / "slurm" / "cancelled").exists()
    assert main([str(tmp_path / "sweep"), "--no-wait"]) == 0
    assert slurm.calls("scancel")[1:] == [["20_0"], ["20_1"]]


def test_a_job_that_submitted_itself_a_moment_ago_is_found(slurm: FakeSlurm, run_dir: Path) -> None:
    set_queue(slurm, "9|PENDING|Dependency|0:00||mb-run")
    set_facts(slurm, f"JobId=9 JobState=PENDING Command={run_dir}/slurm/train.sbatch WorkDir={run_dir}")
    assert main([str(run_dir), "--no-wait"]) == 0
    assert slurm.calls("scancel") == [["9"]]


def test_a_run_whose_jobs_are_over_stays_as_it_is(
    slurm: FakeSlurm, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_dir)]) == 0
    assert "Slurm has no job of it, nothing was changed" in capsys.readouterr().out
    assert not (run_dir / "slurm" / "cancelled").exists()
    assert not (run_dir / "STOP").exists()
    assert slurm.calls("scancel") == []


def test_without_the_controller_the_marks_are_made_and_the_exit_code_says_try_again(
    slurm: FakeSlurm, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    assert main([str(run_dir)]) == 75
    assert "what trains stops all the same" in capsys.readouterr().err
    assert (run_dir / "slurm" / "cancelled").exists()
    assert (run_dir / "STOP").exists()


def test_folders_without_jobs_are_refused(slurm: FakeSlurm, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RUN=.*bin must be the directory of a run"):
        main([str(slurm.folder)])
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    (by_hand / "attempts.jsonl").touch()
    with pytest.raises(ValueError, match="was not submitted to Slurm"):
        main([str(by_hand)])
    (by_hand / "lock.json").touch()
    with pytest.raises(ValueError, match=r"`touch .*by_hand/STOP` stops"):
        main([str(by_hand)])
    (by_hand / "slurm").mkdir()
    (by_hand / "slurm" / "job.json").write_text('{"jobs": [1')
    with pytest.raises(ValueError, match=r"job\.json cannot be read"):
        main([str(by_hand)])
    with pytest.raises(ValueError, match="unknown option --force"):
        main([str(by_hand), "--force"])


def test_a_running_job_saves_and_does_not_come_back(cluster: Cluster, tmp_path: Path) -> None:
    run = StubRun(cluster, tmp_path / "run", train=HEEDS_STOP)
    other = StubRun(cluster, tmp_path / "other", train="sleep 300")
    job = run.submit("--nodes=1")
    waiting = cluster.sbatch([f"--chdir={run.run_dir}", f"--dependency=afterany:{job}", run.folder / "train.sbatch"])
    write_job(run.run_dir, [job, waiting], name="stub")
    other.submit("--nodes=1")
    write_job(other.run_dir, [other.job], name="stub")
    run.wait_for_phase("train")
    printed = muybridge(cluster, "cancel", str(run.run_dir))
    assert f"job {waiting} was cancelled" in printed
    assert "the same `muybridge submit`" in printed
    assert cluster.state(job) == "FAILED"  # so that what waits for a good end of it does not begin
    assert cluster.state(waiting) == "CANCELLED"
    assert run.decisions() == ["cancelled"]
    assert (run.run_dir / "checkpoints" / "LATEST").read_text() == "step-00000005\n"
    assert not (run.run_dir / "STOP").exists()
    assert cluster.state(other.job) == "RUNNING"
    state = json.loads(muybridge(cluster, "status", str(run.run_dir), "--json"))["runs"][0]["state"]
    assert state == "cancelled"


def test_a_job_that_does_not_heed_ends_with_now(cluster: Cluster, tmp_path: Path) -> None:
    run = StubRun(cluster, tmp_path / "run", train="sleep 300")
    write_job(run.run_dir, [run.submit("--nodes=1")], name="stub")
    run.wait_for_phase("train")
    assert f"job {run.job} was cancelled" in muybridge(cluster, "cancel", str(run.run_dir), "--now")
    assert cluster.state(run.job) == "CANCELLED"
    assert not cluster.run(["squeue", "-h"]).stdout.strip()


def test_a_job_that_waits_is_gone_at_once(cluster: Cluster, tmp_path: Path) -> None:
    run = StubRun(cluster, tmp_path / "run")
    write_job(run.run_dir, [run.submit("--nodes=1", "--begin=now+1hour")], name="stub")
    assert f"job {run.job} was cancelled" in muybridge(cluster, "cancel", str(run.run_dir))
    assert cluster.state(run.job) == "CANCELLED"
    assert run.events("start") == []
