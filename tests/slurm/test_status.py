"""`muybridge status`: of runs that wait, train, are over or are damaged, with and without Slurm."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from muybridge.slurm.status import main
from muybridge.tests.scripts.run_story import RunStory
from muybridge.tests.slurm.cluster import Cluster
from muybridge.tests.slurm.programs import FakeSlurm
from muybridge.tests.slurm.stub_run import StubRun
from muybridge.tests.slurm.submitted import SUBMITTED, muybridge, set_facts, set_queue, write_job, write_life

FACTS = (
    "JobId=7 JobName=mb-run UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 RunTime=00:40:00 "
    "TimeLimit=02:00:00 StartTime={start} EndTime={end} ExcNodeList=n[3-4] NodeList=n[1-2] Command=/runs/a b/slurm/train.sbatch"
)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    set_queue(fake)
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("COLUMNS", "100")
    return fake


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStory]:
    """A run of 1 s a step, now; `trained` has lives like one."""
    made = RunStory(tmp_path / "run", monkeypatch)
    (made.run_dir / "config.yaml").write_text("steps: 10000\ntracking:\n  project: films\n")
    made.now = time.time() - 1200
    yield made
    made.leave()


def status_of(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """As JSON, and as text with its blanks and line breaks made one."""
    capsys.readouterr()
    assert main([str(run_dir), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["runs"][0]
    assert main([str(run_dir)]) == 0
    return facts, " ".join(capsys.readouterr().out.split())


def test_a_running_job(slurm: FakeSlurm, story: RunStory, capsys: pytest.CaptureFixture[str]) -> None:
    write_job(story.run_dir, [7])
    write_life(story.run_dir, "7.0", story.now, story.now + 400, why="training ended with code 75: asked to stop")
    story.start(life="7.0")
    story.train(300)
    save(story, 300)
    story.end(75, "", on_request=True)
    story.pass_time(100)
    write_life(story.run_dir, "7.1", story.now)
    story.start(300, life="7.1")
    story.train(600)
    now, begin = time.time(), time.time() - 2400
    set_queue(slurm, "7|RUNNING|None|40:00|n[1-2]|mb-run")
    set_facts(slurm, FACTS.format(start=slurm_time(begin), end=slurm_time(begin + 7200)))
    facts, text = status_of(story.run_dir, capsys)
    assert facts["state"] == "running"
    job = facts["jobs"][0]
    assert (job["id"], job["nodes"], job["restarts"], job["excluded_nodes"]) == ("7", "n[1-2]", 2, "n[3-4]")
    assert job["limit"] - job["start"] == pytest.approx(7200)
    progress = facts["progress"]
    assert (progress["step"], progress["steps"]) == (600, 10000)
    # At a second a step, less what has passed since the last row.
    assert progress["eta_seconds"] == pytest.approx(9400 - (now - story.now), abs=5)
    assert facts["checkpoint"]["step"] == 300
    first, second = facts["history"]
    assert (first["life"], first["attempt"], first["start_step"], first["step"]) == ("7.0", 1, 0, 300)
    assert (second["life"], second["attempt"], second["start_step"], second["end"]) == ("7.1", 2, 300, None)
    for words in (
        "7, on n[1-2], 16 processes, since",
        "1 h 19 min left",
        "start 3",
        "6.0 %, step 600 of 10,000, about 2 h",
        "1 s a step, 8 samples/s, 20 % of it waiting for data",
        "back into the queue: training ended with code 75: asked to stop",
        "it goes on",
        "left out n[3-4]",
        f"muybridge cancel {story.run_dir} saves and stops it",
    ):
        assert words in text, words


def test_a_job_that_waits_says_why(slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_job(tmp_path / "run", [7])
    set_queue(slurm, "7|PENDING|Priority|0:00||mb-run")
    facts, text = status_of(tmp_path / "run", capsys)
    assert facts["state"] == "waiting"
    assert "waiting in the queue: jobs of higher priority are before it" in text
    write_life(tmp_path / "run", "7.0", 1000.0, 1100.0)
    set_queue(slurm, "7|PENDING|BeginTime|0:00||mb-run")
    _, text = status_of(tmp_path / "run", capsys)
    assert "back in the queue: its time has not come; a requeued job waits about two minutes" in text
    for reason, words in {
        "QOSMaxJobsPerUserLimit": "a limit of its QOS or account is used up (QOSMaxJobsPerUserLimit)",
        "(ReqNodeNotAvail, UnavailableNodes:n3)": "is down, drained or reserved (ReqNodeNotAvail, UnavailableNodes:n3)",
        "SomethingNew": "back in the queue: SomethingNew",
    }.items():
        set_queue(slurm, f"7|PENDING|{reason}|0:00||mb-run")
        assert words in status_of(tmp_path / "run", capsys)[0]["words"]


def test_a_job_that_writes_nothing_is_suspected_to_hang(
    slurm: FakeSlurm, story: RunStory, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(story.run_dir, [7])
    write_life(story.run_dir, "7.0", story.now)
    story.start(life="7.0")
    story.train(300)
    set_queue(slurm, "7|RUNNING|None|40:00|n[1-2]|mb-run")
    facts, text = status_of(story.run_dir, capsys)
    assert facts["progress"]["is_quiet"]
    assert "does it hang?" in text
    assert "--now" in text


@pytest.mark.parametrize(
    ("decision", "code", "state", "words"),
    [
        ("done", 0, "done", "muybridge report run="),
        ("give_up", 77, "gave_up", "a lower optimizer.lr or other data may help; then the same `muybridge submit`"),
        ("stopped", 75, "stopped", "the same `muybridge submit` goes on from step 300"),
        ("slurm", 75, "stopped", "ended by Slurm (scancel, or its time was over)"),
        ("requeue", 1, "lost", "where Slurm has no job of it"),
    ],
)
def test_a_run_that_is_over_says_how_it_ended_and_what_to_do(
    decision: str,
    code: int,
    state: str,
    words: str,
    slurm: FakeSlurm,
    story: RunStory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_job(story.run_dir, [7])
    write_life(story.run_dir, "7.0", story.now, story.now + 400, decision=decision, code=code, why="the reason")
    if decision == "give_up":
        (story.run_dir / "slurm" / "gave_up").write_text("the training diverged\n")
    story.start(life="7.0")
    story.train(300)
    save(story, 300)
    story.end(code, "")
    facts, text = status_of(story.run_dir, capsys)
    assert (facts["state"], facts["code"]) == (state, code)
    assert words in text


def test_a_job_that_was_cancelled_and_killed_is_not_lost(
    slurm: FakeSlurm, story: RunStory, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(story.run_dir, [7])
    write_life(story.run_dir, "7.0", SUBMITTED + 10)
    assert status_of(story.run_dir, capsys)[0]["state"] == "lost"
    (story.run_dir / "slurm" / "cancelled").touch()
    assert status_of(story.run_dir, capsys)[0]["state"] == "cancelled"
    set_queue(slurm, "7|COMPLETING|None|40:00|n[1-2]|mb-run")
    assert status_of(story.run_dir, capsys)[0]["state"] == "ending"


def test_a_run_that_was_done_and_submitted_again_waits(
    slurm: FakeSlurm, story: RunStory, capsys: pytest.CaptureFixture[str]
) -> None:
    write_life(story.run_dir, "7.0", SUBMITTED - 1000, SUBMITTED - 100, decision="done", code=0)
    write_job(story.run_dir, [8])
    set_queue(slurm, "8|PENDING|Resources|0:00||mb-run")
    assert status_of(story.run_dir, capsys)[0]["state"] == "waiting"
    set_queue(slurm)
    facts, text = status_of(story.run_dir, capsys)
    assert facts["state"] == "lost"
    assert "Slurm has no job of it, and none has begun" in text
    write_life(story.run_dir, "8.0", SUBMITTED + 10, SUBMITTED + 100, decision="done", code=0)
    set_queue(slurm, "9|PENDING|Dependency|0:00||mb-run")  # of a chain, and ends at once
    assert status_of(story.run_dir, capsys)[0]["state"] == "done"


def test_where_to_look_at_the_run_in_w_and_b(
    slurm: FakeSlurm, story: RunStory, capsys: pytest.CaptureFixture[str]
) -> None:
    (story.run_dir / "wandb_run_id.txt").write_text("abcd1234")
    assert status_of(story.run_dir, capsys)[0]["wandb"] is None  # it is off
    folder = story.run_dir / "wandb" / "offline-run-20261101_000000-abcd1234"
    folder.mkdir(parents=True)
    (folder / "run-abcd1234.wandb").write_bytes(b"rows")
    _, text = status_of(story.run_dir, capsys)
    assert "run abcd1234 of project films, offline" in text
    assert f"muybridge sync {story.run_dir} hands what is offline to W&B" in text
    (folder / "run-abcd1234.wandb.synced").touch()
    (story.run_dir / "wandb_url.txt").write_text("https://wandb.ai/someone/films/runs/abcd1234")
    facts, text = status_of(story.run_dir, capsys)
    assert "W&B https://wandb.ai/someone/films/runs/abcd1234, offline, all handed over" in text
    assert not facts["wandb"]["is_online"]
    (story.run_dir / "wandb" / "run-20261102_000000-abcd1234").mkdir()
    assert status_of(story.run_dir, capsys)[0]["wandb"]["is_online"]


def test_without_slurm_the_files_speak(
    story: RunStory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    monkeypatch.setenv("COLUMNS", "160")
    write_job(story.run_dir, [7])
    write_life(story.run_dir, "7.0", story.now)
    story.start(life="7.0")
    story.train(300)
    facts, text = status_of(story.run_dir, capsys)
    assert "squeue is not on PATH" in facts["slurm_fault"]
    assert facts["state"] == "lost"
    assert "Slurm does not say whether it does" in text
    (story.run_dir / "lock.json").touch()
    assert "running, as far as its files say" in status_of(story.run_dir, capsys)[1]


def test_a_controller_that_is_away_is_said(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path / "run", [7])
    slurm.answer("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    facts, text = status_of(tmp_path / "run", capsys)
    assert facts["state"] == "waiting"
    assert "Slurm's controller cannot be reached" in text
    assert "below is what the files say" in text


def test_a_run_without_slurm(slurm: FakeSlurm, story: RunStory, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(story.run_dir, capsys)[0]["state"] == "new"
    story.start()
    story.train(300)
    story.leave()
    facts, text = status_of(story.run_dir, capsys)
    assert facts["state"] == "lost"
    assert "attempts" in text
    assert "without a word: killed, or its node went down" in text
    story.start(0)
    story.train(20)
    (story.run_dir / "lock.json").touch()
    facts, text = status_of(story.run_dir, capsys)
    assert facts["state"] == "running"
    assert f"touch {story.run_dir}/STOP" in text
    assert slurm.calls("squeue") == []


def test_damaged_files_are_named_and_the_rest_is_shown(
    slurm: FakeSlurm, story: RunStory, capsys: pytest.CaptureFixture[str]
) -> None:
    write_life(story.run_dir, "7.0", story.now, story.now + 400, decision="stopped")
    (story.run_dir / "slurm" / "job.json").write_text('{"jobs": [7')
    story.start(life="7.0")
    story.train(100)
    story.leave()
    with (story.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": "x"}\n{"step": 110, "loss": null}\n{"step": 12')
    (story.run_dir / "config.yaml").write_text("steps: [")
    folder = story.run_dir / "checkpoints" / "step-00000100"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{")
    facts, text = status_of(story.run_dir, capsys)
    assert facts["state"] == "stopped"
    assert "job.json cannot be read" in text
    assert "config.yaml cannot be read" in text
    assert "its MANIFEST.json cannot be read" in text


def test_words_of_a_run_move_no_cursor(slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "[bold]run"
    write_job(run_dir, [7])
    write_life(run_dir, "7.0", 1000.0, 1100.0, decision="give_up", code=64, why="\x1b[2J[red]bad")
    (run_dir / "slurm" / "bad_nodes").write_text("n1\t\x1b[2J\n")
    _, text = status_of(run_dir, capsys)
    assert "\x1b[2J" not in text
    assert "[bold]run" in text
    assert "[red]bad" in text


def test_several_runs_are_a_table_and_one_question(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        write_job(tmp_path / "sweep" / f"lr-{index}", [20], index=index, submit_dir=tmp_path / "sweep")
    set_queue(slurm, "20_0|RUNNING|None|1:00|n1|mb-run", "20_1|PENDING|JobArrayTaskLimit|0:00||mb-run")
    assert main([str(tmp_path / "sweep")]) == 0
    text = capsys.readouterr().out
    assert [line.split()[:2] for line in text.splitlines() if "lr-" in line][:3] == [
        ["lr-0", "running"],
        ["lr-1", "waiting"],
        ["lr-2", "lost"],
    ]
    assert "lr-2: gone: Slurm has no job of it, and none has begun" in text
    assert "3 runs: 1 running, 1 waiting, 1 lost" in text
    assert len(slurm.calls("squeue")) == 1
    with pytest.raises(ValueError, match="must be the directory of a run"):
        main([str(tmp_path / "bin")])


def test_status_answers_without_torch_and_from_the_end_of_large_files(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"event": "start", "attempt": 1, "unix_seconds": 1000, "host": "n1"}\n')
    row = '{"step": 5, "attempt": 1, "unix_seconds": 1010, "loss": 0.5, "seconds_per_step": 1}\n'
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        os.truncate(file.fileno(), 2**32)  # a hole that would take long to read
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + row.encode())
    program = (
        "import sys; from muybridge.slurm.status import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy', 'wandb', 'hydra'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "step 5" in answer
    assert answer.splitlines()[-1] == "[]"


def test_jobs_of_a_real_cluster(cluster: Cluster, tmp_path: Path) -> None:
    running = StubRun(cluster, tmp_path / "running", train="sleep 300")
    waiting = StubRun(cluster, tmp_path / "waiting")
    requeued = StubRun(cluster, tmp_path / "requeued", train="leave 75 scheduler")
    write_job(running.run_dir, [running.submit("--nodes=2", "--time=30")], name="stub")
    write_job(waiting.run_dir, [waiting.submit("--nodes=1", "--begin=now+1hour")], name="stub")
    write_job(requeued.run_dir, [requeued.submit("--nodes=1", "--time=30")], name="stub")
    running.wait_for_phase("train")
    requeued.wait_until(
        lambda: requeued.decisions() and cluster.state(requeued.job) == "PENDING", "a life that was requeued"
    )
    text = muybridge(cluster, "status", str(running.run_dir), "--json")
    job = json.loads(text)["runs"][0]["jobs"][0]
    assert job["state"] == "RUNNING"
    assert job["nodes"] == "n[1-2]"
    assert job["limit"] - job["start"] == pytest.approx(1800)
    runs = [str(run.run_dir) for run in (waiting, requeued)]
    first, second = json.loads(muybridge(cluster, "status", *runs, "--json"))["runs"]
    assert first["state"] == second["state"] == "waiting"
    assert "waiting in the queue" in first["words"]
    assert "back in the queue" in second["words"]
    assert second["history"][0]["decision"] == "requeue"


def save(story: RunStory, step: int) -> None:
    story.save()
    folder = story.run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text('{"run.json": {"bytes": 1000, "crc32": 1}}')


def slurm_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))
