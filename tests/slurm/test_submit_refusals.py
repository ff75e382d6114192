"""A run that must not be queued, and a failure in the middle: each leaves no trace."""

import json
import os
import resource
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.models.dit import DiT
from muybridge.slurm.submit import main
from muybridge.tests.slurm.programs import FakeSlurm
from muybridge.tests.slurm.submitted import Submit, files_below
from muybridge.train import run_lock
from muybridge.train.config import load_train_config
from muybridge.train.fragments import FORMAT_VERSION

pytestmark = pytest.mark.usefixtures("no_site")


def test_what_slurm_refuses_is_told_with_the_settings_and_leaves_no_trace(
    fake_slurm: FakeSlurm, submit: Submit, tmp_path: Path, run_dir: Path
) -> None:
    fake_slurm.answer("sbatch", "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    with pytest.raises(ValueError, match=r"Slurm does not take the job: invalid .*: nope \(slurm.partition=nope,"):
        submit("slurm.partition=nope")
    assert sorted(os.listdir(tmp_path)) == ["fake_slurm"]
    # Of a run that was submitted before, what that left stays as it was.
    fake_slurm.answer("sbatch", "")
    submit()
    for name in ("gave_up", "fruitless", "cancelled"):
        (run_dir / "slurm" / name).write_text(name)
    before = files_below(run_dir)
    fake_slurm.answer("sbatch", "echo 'sbatch: error: Requested node configuration is not available' >&2; exit 1")
    with pytest.raises(ValueError, match=r"slurm.nodes=9, slurm.gpus_per_node=2"):
        submit("slurm.nodes=9")
    assert files_below(run_dir) == before


def test_an_interrupted_submission_is_taken_back_and_says_how_to_look(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A second job of a chain is being queued when somebody types Ctrl-C.
    fake_slurm.answer("sbatch", "[ $number = 1 ] || { kill -INT $PPID; sleep 20; }")
    # Tests that run in the background of a shell ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            submit("slurm.chain=2")
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert fake_slurm.calls("scancel") == [["101"]]
    assert (
        "interrupted, and the files are as they were; job 101, which was queued before, was cancelled; `squeue --"
        in said
    )
    assert "`squeue --name=first-" in said
    assert not run_dir.exists()


def test_a_controller_that_is_away_has_an_exit_code_of_its_own(
    fake_slurm: FakeSlurm, tiny_run: list[str], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm.answer(
        "sbatch", "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller' >&2; exit 1"
    )
    assert main([*tiny_run, f"run_dir={run_dir}"]) == 75
    said = capsys.readouterr().err
    assert "Slurm's controller cannot be reached" in said
    assert "`squeue --name=first-" in said
    assert "says whether Slurm took the job nevertheless; where it did not, submit again" in said
    assert not run_dir.exists()
    (run_dir / "slurm").mkdir(parents=True)
    (run_dir / "slurm" / "lives.jsonl").write_text(
        '{"event": "start", "life": "9.0", "job": 9, "unix_seconds": 1, "nodes": "n1"}'
    )
    fake_slurm.answer("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert main([*tiny_run, f"run_dir={run_dir}"]) == 75
    assert capsys.readouterr().err.endswith("; nothing was queued, try again later\n")


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED", "TIMEOUT"])
def test_a_job_that_can_no_longer_end_well_is_not_waited_for(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, state: str
) -> None:
    fake_slurm.answer("scontrol", f"echo JobId=77 JobState={state}")
    with pytest.raises(
        ValueError, match=f"slurm.after=77 must be a job that can still end well, and it ended: {state}"
    ):
        submit("slurm.after=77")
    fake_slurm.answer("scontrol", "echo JobId=77 JobState=COMPLETED")
    submit("slurm.after=77")


@pytest.mark.parametrize("cancels", [True, False])
def test_a_chain_that_breaks_is_taken_back(fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, cancels: bool) -> None:
    fake_slurm.answer("sbatch", "[ $number -lt 3 ] || { echo 'sbatch: error: Job violates limits' >&2; exit 1; }")
    fake_slurm.answer("scancel", "" if cancels else "echo 'scancel: error: Access denied' >&2; exit 1")
    said = "was cancelled" if cancels else r"could not be cancelled \(Access denied\): scancel 101 102"
    with pytest.raises(ValueError, match=f"Job violates limits.*; job 101, 102.* {said}"):
        submit("slurm.chain=4")
    assert fake_slurm.calls("scancel") == [["101", "102"]]
    assert not run_dir.exists()


def test_a_run_with_a_job_in_the_queue_is_refused(fake_slurm: FakeSlurm, submit: Submit, run_dir: Path) -> None:
    submit()
    name = json.loads((run_dir / "slurm" / "job.json").read_text())["name"]
    before = files_below(run_dir)
    fake_slurm.answer("squeue", f"echo '101|PENDING|Priority|0:00||{name}'")
    with pytest.raises(ValueError, match=r"first has a job in the queue already: 101 \(PENDING\).* muybridge cancel "):
        submit()
    assert files_below(run_dir) == before
    # The number has gone to somebody else's job.
    fake_slurm.answer("squeue", "echo '101|RUNNING|None|0:10|n1|other'")
    submit()
    # A job that its batch script queued to go on counts as well.
    lives = ['{"event": "start", "life": "102.0", "job": 102, "unix_seconds": 1, "nodes": "n1"}']
    lives += ['{"event": "resubmit", "life": "102.0", "job": 130, "unix_seconds": 2}']
    (run_dir / "slurm" / "lives.jsonl").write_text("\n".join(lives))
    fake_slurm.answer("squeue", f"echo '130|PENDING|Dependency|0:00||{name}'")
    with pytest.raises(ValueError, match="has a job in the queue already: 130"):
        submit()
    assert fake_slurm.calls("squeue")[-1][-1] == "--jobs=102,130"


def test_a_run_at_work_outside_of_slurm_is_refused(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir.mkdir(parents=True)
    holder = asdict(run_lock._this_process())
    (run_dir / "lock.json").write_text(json.dumps(holder))
    with pytest.raises(ValueError, match=rf"is in use by another attempt \(process {os.getpid()} on"):
        submit()
    # One that another machine left, and that nobody keeps up, is no obstacle.
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    (run_dir / "lock.json").write_text(json.dumps({**holder, "boot": "another"}))
    submit()


def test_a_run_of_other_settings_is_not_gone_on_with(fake_slurm: FakeSlurm, submit: Submit, run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    saved = {"seed": "0", "global_batch": "8", "task": "text_to_video", "expert": "none", "conditioning.form": "none"}
    (checkpoint / "run.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **saved}))
    with pytest.raises(ValueError, match="cannot be continued, these changed: seed: 0 saved, 5 now"):
        submit("seed=5")
    with pytest.raises(ValueError, match="resume=never: there are checkpoints"):
        submit("resume=never")
    with pytest.raises(ValueError, match="resume=20: there is no checkpoint of that step"):
        submit("resume=20")
    assert fake_slurm.calls("sbatch") == []
    submit()


def test_a_run_of_another_model_is_not_gone_on_with(
    fake_slurm: FakeSlurm, submit: Submit, tiny_run: list[str], run_dir: Path
) -> None:
    config = load_train_config([*tiny_run, f"run_dir={run_dir}"])
    with torch.device("meta"):
        parameters = DiT(config.model).named_parameters()
    finish(run_dir, 10, code=75)
    state = run_dir / "checkpoints" / "step-00000010" / "run.json"
    shapes = {f"transformer.{name}": list(parameter.shape) for name, parameter in parameters}
    state.write_text(json.dumps({**json.loads(state.read_text()), "shapes": shapes}))
    submit("steps=20")
    dim, layers = config.model.dim, config.model.num_layers
    for other, words in [
        (
            f"model.dim={2 * dim}",
            rf"step-00000010 cannot be continued, the model .* \[.*{dim}.*\] saved, \[.*{2 * dim}.*\] now",
        ),
        (f"model.num_layers={layers + 1}", f"the model is another one: {layers} blocks saved, {layers + 1} now"),
    ]:
        with pytest.raises(ValueError, match=words):
            submit("steps=20", other)
    assert len(fake_slurm.calls("sbatch")) == 1


def finish(run_dir: Path, step: int, *, code: int = 0) -> None:
    """A run whose last attempt ended at a step with this exit code."""
    saved = {"seed": "0", "global_batch": "8", "task": "text_to_video", "expert": "none", "conditioning.form": "none"}
    checkpoint = run_dir / "checkpoints" / f"step-{step:08}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **saved}))
    rows: list[dict[str, Any]] = [
        {"event": "start"},
        {"event": "begin", "step": 0, "resume": "auto"},
        {"event": "end", "exit_code": code},
    ]
    lines = [json.dumps({**row, "attempt": 1, "unix_seconds": 1.0}) + "\n" for row in rows]
    (run_dir / "attempts.jsonl").write_text("".join(lines))


def test_a_run_that_is_done_is_not_queued_again(fake_slurm: FakeSlurm, submit: Submit, run_dir: Path) -> None:
    finish(run_dir, 20)
    with pytest.raises(ValueError, match=r"first is done \(step 20, and steps=20\): set steps higher to train on"):
        submit("steps=20")
    with pytest.raises(ValueError, match=r"is done \(step 20, and steps=10\)"):
        submit("steps=10", "resume=must")
    assert fake_slurm.calls("sbatch") == []
    submit("steps=21")
    # Stopped on request after the last step, it may have something left to do.
    shutil.rmtree(run_dir)
    finish(run_dir, 20, code=75)
    submit("steps=20")


def test_a_sweep_goes_on_where_some_of_its_runs_are_done(
    fake_slurm: FakeSlurm, submit: Submit, tiny_run: list[str], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["--multirun", "steps=20", "optimizer.lr=0.1,0.2"]
    finish(run_dir / "lr_0.1", 20)
    assert main([*tiny_run, *sweep, f"run_dir={run_dir}", "slurm.snapshot_code=false"]) == 0
    assert "1 of 2 runs are done already, and their tasks will end at once" in capsys.readouterr().err
    finish(run_dir / "lr_0.2", 20)
    with pytest.raises(ValueError, match=r"lr_0.1 is done .*steps=20"):
        submit(*sweep)


def test_a_folder_that_cannot_be_written_is_named(fake_slurm: FakeSlurm, submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir=.*/file/run cannot be read \(Not a directory\)"):
        submit(folder=tmp_path / "file" / "run")
    assert fake_slurm.calls("sbatch") == []


def test_a_disk_that_fills_up_leaves_no_half_submission(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))  # longer than some of the package's files may be
    try:
        with pytest.raises(ValueError, match=r"first cannot be written \(File too large\): nothing is queued$"):
            submit("slurm.snapshot_code=true")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert fake_slurm.calls("sbatch") == []
    assert os.listdir(tmp_path) == ["fake_slurm"]
