"""Queueing a run: what is refused before anything is written, what a job is given, and that a failure leaves no trace."""

import contextlib
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from muybridge.models.dit import DiT
from muybridge.slurm.config import SITE_VARIABLE, SlurmConfig, limit_seconds
from muybridge.slurm.plan import quoted
from muybridge.slurm.run_checks import path_fault
from muybridge.slurm.submit import main
from muybridge.slurm.sweep import expand
from muybridge.tests.slurm.cluster import Cluster
from muybridge.tests.slurm.programs import FakeSlurm, real_programs
from muybridge.tests.slurm.stub_run import read_fields
from muybridge.train import run_lock
from muybridge.train.config import load_train_config
from muybridge.train.fragments import FORMAT_VERSION

Submit = Callable[..., str]
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


@pytest.fixture(autouse=True)
def no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SITE_VARIABLE, raising=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


@pytest.fixture
def submit(tiny_run: list[str], run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Submit:
    """Submits a run that takes seconds, with more of its settings; returns what was printed."""

    def call(*arguments: str, folder: Path = run_dir) -> str:
        capsys.readouterr()
        fast = ["slurm.gpus_per_node=2", "slurm.snapshot_code=false"]
        assert main([*tiny_run, *fast, f"run_dir={quoted(str(folder))}", *arguments]) == 0
        return capsys.readouterr().out

    return call


def files_below(folder: Path) -> dict[str, bytes]:
    """The files of a folder but for the copy of the code."""
    found = (path for path in folder.rglob("*") if path.is_file() and "code" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_run_is_queued_with_everything_its_job_reads(fake_slurm: FakeSlurm, submit: Submit, run_dir: Path) -> None:
    printed = submit("slurm.nodes=4", "slurm.time=24:00:00", "slurm.snapshot_code=true")
    slurm_dir = run_dir / "slurm"
    script = slurm_dir / "train.sbatch"
    assert fake_slurm.calls("sbatch") == [
        ["--parsable", f"--chdir={run_dir}", "--dependency=singleton", str(script)],
    ]
    assert read_fields(slurm_dir / "tasks") == [str(run_dir)]
    work, python, code, stage, *overrides = read_fields(slurm_dir / "command")
    assert (work, python, stage) == (os.getcwd(), sys.executable, "")
    assert (Path(code) / "muybridge" / "train" / "trainer.py").is_file()
    assert overrides[-1] == f"run_dir={quoted(str(run_dir))}"
    assert not [text for text in overrides if text.startswith("slurm.")]
    job = json.loads((slurm_dir / "job.json").read_text())
    assert re.fullmatch(r"first-[0-9a-f]{6}", job.pop("name"))
    assert job.pop("submitted_unix_seconds") > 1.7e9
    assert job == {
        "jobs": [101],
        "array_index": None,
        "submit_dir": str(run_dir),
        "nodes": 4,
        "processes": 8,
        "lead_seconds": 300,
    }
    text = script.read_text()
    assert "#SBATCH --nodes=4\n" in text
    assert "#SBATCH --time=24:00:00\n" in text
    assert "\nLEAD_SECONDS=300\nRESTART_LIMIT=3\nHEALTH=1\nPROCESSES_PER_NODE=2\n" in text
    assert "Queued job 101 as first-" in printed
    assert printed.splitlines()[-3:] == [
        f"Next: muybridge status {run_dir}",
        f"      tail -F {slurm_dir / 'log-101.txt'}",
        f"      muybridge cancel {run_dir}",
    ]


def test_the_record_of_a_submission_says_what_it_was(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", secret := "0123456789abcdef0123456789abcdef01234567")
    submit("seed=7", "slurm.snapshot_code=true")
    submit("seed=7", "slurm.nodes=2", "slurm.snapshot_code=true")
    first, second = sorted((run_dir / "slurm" / "submissions").iterdir())
    assert yaml.safe_load((first / "config.yaml").read_text())["seed"] == 7
    assert "seed=7" in json.loads((second / "overrides.json").read_text())
    facts = json.loads((second / "submission.json").read_text())
    assert facts["slurm"]["nodes"] == 2
    assert json.loads((first / "job.json").read_text())["jobs"] == [101]
    assert (second / "train.sbatch").read_text() == (run_dir / "slurm" / "train.sbatch").read_text()
    assert (second / "changes.diff").exists()
    assert len(list((run_dir / "slurm" / "code").iterdir())) == 1
    assert not [name for name, content in files_below(run_dir).items() if secret.encode() in content]
    # The job itself has it, as it has the rest of the environment.
    assert fake_slurm.environment("sbatch")["WANDB_API_KEY"] == secret


def test_hostile_text_reaches_no_shell(fake_slurm: FakeSlurm, submit: Submit, tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE
    prompt = HOSTILE + "\nand a line"
    submit(f"validation.prompts=[{quoted(prompt)}]", "validation.every_steps=5", folder=folder)
    arguments = fake_slurm.calls("sbatch")[0]
    assert arguments[1:] == [f"--chdir={folder}", "--dependency=singleton", f"{folder}/slurm/train.sbatch"]
    script = (folder / "slurm" / "train.sbatch").read_text()
    assert re.search(r"#SBATCH --job-name=it-s-a-touch-pwned[\w-]+\n", script)  # its safe words, and no more
    assert not any(sign in script for sign in ("touch pwned", "rm -rf *"))
    overrides = read_fields(folder / "slurm" / "command")[4:]
    config = load_train_config(overrides)
    assert (config.run_dir, config.validation.prompts) == (str(folder), [prompt])
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "name", ["partition", "account", "qos", "constraint", "reservation", "exclude", "memory", "time"]
)
@pytest.mark.parametrize(
    "text", ["a b", "a\n#SBATCH --uid=0", "a;b", "$(x)", "`x`", 'a"', "a'", "%j", "\\", "", "a\t", "é"]
)
def test_a_setting_that_is_more_than_a_word_is_refused(name: str, text: str) -> None:
    faults = SlurmConfig(**{name: text}).faults("slurm")
    assert len(faults) == 1
    assert faults[0].startswith(f"slurm.{name}={text!r} must be ")


RULES = [
    ({"nodes": 0}, "slurm.nodes=0 must be at least 1"),
    ({"gpus_per_node": -1}, "slurm.gpus_per_node=-1 must be at least 0"),
    ({"gpus_per_node": 2, "processes_per_node": 3}, "slurm.processes_per_node=3 must be at most slurm.gpus_per_node=2"),
    ({"chain": 0}, "slurm.chain=0 must be at least 1"),
    ({"parallel": -1}, "slurm.parallel=-1 must be at least 0"),
    ({"time": "9"}, "slurm.time=9 must be at least 600 s: slurm.lead_seconds=300"),
    ({"time": "0:09:59"}, "slurm.time=0:09:59 must be at least 600 s"),
    ({"time": "tomorrow"}, "slurm.time='tomorrow' must be minutes, H:M:S or D-H:M:S"),
    ({"lead_seconds": 0}, "slurm.lead_seconds=0 must be in 1..65535"),
    ({"lead_seconds": 70000}, "slurm.lead_seconds=70000 must be in 1..65535"),
    ({"options": ["-p x"]}, "slurm.options='-p x' must be --NAME or --NAME=VALUE"),
    ({"options": ["--comment=a b"]}, "must be --NAME or --NAME=VALUE"),
    ({"options": ["--job-name=x"]}, "must not be --job-name: set slurm.name instead"),
    ({"options": ["--depend=x"]}, "must not be --dependency: set slurm.after and slurm.chain instead"),
    ({"options": ["--gpu-bind=single:1"]}, "must not be --gpu-bind: every process must see all GPUs"),
    ({"options": ["--ntasks-per-gpu=1"]}, "must not be --ntasks-per-gpu: every process must see all GPUs"),
    ({"options": ["--gpus-per-s=1"]}, "must not be --gpus-per-socket: every process must see all GPUs"),
    ({"options": ["--wrap=x"]}, "must not be --wrap: the job depends on it"),
    ({"name": "a b"}, "slurm.name='a b' must be 1 to 64 letters"),
    ({"after": "x"}, "slurm.after='x' must be the number of a job"),
    ({"python": "python"}, "slurm.python='python' must be an absolute path"),
    ({"stage_to": "scratch"}, "slurm.stage_to='scratch' must be an absolute path or begin with a variable"),
    ({"template": "nowhere"}, "slurm.template='nowhere' must be a file"),
]


@pytest.mark.parametrize(("settings", "fault"), RULES)
def test_a_setting_of_slurm_that_breaks_a_rule_is_named(settings: dict[str, Any], fault: str) -> None:
    found = SlurmConfig(**settings).faults("slurm")
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize("settings", [{"cpus_per_process": 4}, {"exclusive": True}, {"options": ["--cpus-per-gpu=4"]}])
def test_cpus_that_somebody_has_thought_of_are_not_warned_about(settings: dict[str, Any]) -> None:
    assert len(SlurmConfig().warnings()) == 1
    assert SlurmConfig(**settings).warnings() == []


def test_a_python_that_is_not_here_is_warned_about(tmp_path: Path) -> None:
    assert SlurmConfig(exclusive=True, python=sys.executable).warnings() == []
    warnings = SlurmConfig(exclusive=True, python=f"{tmp_path}/python").warnings()
    assert warnings == [f"slurm.python={tmp_path}/python is not on this machine: make sure that it is on the nodes"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("1-0", 86400), ("1-12:30", 131400), ("1-12:30:05", 131405)],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("slurm.nodess=2", "slurm.nodess is not a setting of slurm, did you mean slurm.nodes?"),
        ("slurm.nodes=two", "slurm.nodes=two"),
        ("slurm.nodes=0", "slurm.nodes=0 must be at least 1"),
        ("slurm.after=12,", "'slurm.after=12,' is not KEY=VALUE"),
        ("slurm.parallel=2", "slurm.parallel=2 must be 0 without --multirun"),
        ("slurm.nodes=1,2", "a sweep needs --multirun"),
        ("stpes=3", "stpes is not a setting of TrainConfig, did you mean steps?"),
        ("steps=0", "steps=0 must be at least 1"),
        ("data.path=nowhere", "data.latents"),
        ("data.access=raw", "data.path"),
        ("vae.path=nowhere", "vae.path=nowhere must be a folder with config.json"),
        ("validation.path=nowhere", "validation.path=nowhere must be there"),
        ("run_dir='a%jb'", "must be without '%'"),
        ("run_dir='a\nb'", "must be without '\\n'"),
        ("model=huge", "huge"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(
    fake_slurm: FakeSlurm, submit: Submit, tmp_path: Path, override: str, fault: str
) -> None:
    gone = [f"data.path={tmp_path}/gone", f"data.latents={tmp_path}/gone"] if override.startswith("data.") else []
    with pytest.raises(ValueError, match=re.escape(fault)):
        submit(*gone, override)
    assert fake_slurm.calls("sbatch") == []
    assert os.listdir(tmp_path) == ["fake_slurm"]


def test_all_mistakes_come_in_one_message(
    fake_slurm: FakeSlurm, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.yaml").write_text("partitoin: gpu\naccount: a b\n")
    monkeypatch.setenv(SITE_VARIABLE, str(tmp_path / "site.yaml"))
    with pytest.raises(ValueError, match="the configuration has 6 faults") as caught:
        submit("slurm.nodes=0", "optimizer.lrr=1", "vae.path=nowhere", "slurm.qoss=x")
    message = str(caught.value)
    assert f"{tmp_path}/site.yaml: partitoin is not a setting of SlurmConfig, did you mean partition?" in message
    assert f"{tmp_path}/site.yaml: slurm.account='a b' must be" in message
    for part in ("slurm.nodes=0", "optimizer.lrr", "vae.path=nowhere", "slurm.qoss"):
        assert part in message


def test_a_sites_settings_hold_until_the_command_line_says_otherwise(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / ".config" / "muybridge"
    home.mkdir(parents=True)
    (home / "slurm.yaml").write_text("partition: gpu\ntime: 24:00:00\noptions: [--gres=nvme:1]\nnodes: 3\n")
    submit("slurm.nodes=2")
    lines = (run_dir / "slurm" / "train.sbatch").read_text().splitlines()
    # YAML by itself takes 24:00:00 for the number 86400, which Slurm would take for 60 days.
    assert {"#SBATCH --partition=gpu", "#SBATCH --time=24:00:00", "#SBATCH --gres=nvme:1"} <= set(lines)
    assert "#SBATCH --nodes=2" in lines
    (home / "slurm.yaml").write_text("partition: gpu\noptions: [a\nnodes: 3\n")
    with pytest.raises(ValueError, match=r"slurm.yaml cannot be used: line 3: expected ',' or ']'"):
        submit()
    monkeypatch.setenv(SITE_VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"MUYBRIDGE_SLURM_SITE=.*none.yaml must be a YAML file"):
        submit()


def test_a_secret_among_the_settings_is_refused_and_not_repeated(
    submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", secret := "s3cr3t-s3cr3t-s3cr3t")
    for override in (f"slurm.python=/{secret}", f"slurm.nodess={secret}", f"steps={secret}"):
        with pytest.raises(ValueError, match="must not be the value of the environment variable MY_TOKEN") as caught:
            submit(override)
        assert secret not in str(caught.value)


def test_without_slurm_one_line_says_what_to_do(
    submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"sbatch is not on PATH: .* login node .* --dry-run") as caught:
        submit()
    assert "\n" not in str(caught.value)
    command, *script = submit("--dry-run").splitlines()
    assert command.startswith("sbatch --parsable --chdir=")
    assert script[0] == "#!/bin/bash"
    assert submit("dry_run=true").splitlines() == [command, *script]
    assert os.listdir(tmp_path) == []


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


def test_a_new_submission_takes_away_what_would_stop_it(fake_slurm: FakeSlurm, submit: Submit, run_dir: Path) -> None:
    (run_dir / "slurm").mkdir(parents=True)
    for name in ("gave_up", "fruitless", "bad_lives", "cancelled", "lives.jsonl"):
        (run_dir / "slurm" / name).write_text("")
    submit()
    left = {path.name for path in (run_dir / "slurm").iterdir()}
    assert left == {"lives.jsonl", "train.sbatch", "tasks", "command", "job.json", "submission", "submissions"}


def test_copies_of_the_code_do_not_pile_up(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, tmp_path: Path
) -> None:
    submit("slurm.snapshot_code=true")
    code = run_dir / "slurm" / "code"
    current = os.listdir(code)
    for name in ("0123456789ab", "notes"):
        (code / name / "muybridge").mkdir(parents=True)
        (code / name / "muybridge" / "__init__.py").write_text("")
    name = json.loads((run_dir / "slurm" / "job.json").read_text())["name"]
    for answer in (f"echo '101|RUNNING|None|0:10|n1|{name}'", "echo 'Unable to contact slurm controller' >&2; exit 1"):
        fake_slurm.answer("squeue", answer)
        with contextlib.suppress(ValueError, AssertionError):
            submit("slurm.snapshot_code=true")
        assert sorted(os.listdir(code)) == sorted([*current, "0123456789ab", "notes"])
    fake_slurm.answer("squeue", "")
    fake_slurm.answer("sbatch", "echo 'sbatch: error: no' >&2; exit 1")
    with pytest.raises(ValueError, match="Slurm does not take the job"):
        submit("slurm.snapshot_code=true")
    assert sorted(os.listdir(code)) == sorted([*current, "0123456789ab", "notes"])
    fake_slurm.answer("sbatch", "")
    submit("slurm.snapshot_code=true")
    assert sorted(os.listdir(code)) == sorted([*current, "notes"])
    submit("slurm.snapshot_code=false")
    assert os.listdir(code) == ["notes"]


def test_an_interrupted_submission_is_taken_back_and_says_how_to_look(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A second job of a chain is being queued when somebody types Ctrl-C.
    fake_slurm.answer("sbatch", "[ $number = 1 ] || { kill -INT $PPID; sleep 20; }")
    with pytest.raises(KeyboardInterrupt):
        submit("slurm.chain=2")
    said = capsys.readouterr().err
    assert fake_slurm.calls("scancel") == [["101"]]
    assert (
        "interrupted, and the files are as they were; job 101, which was queued before, was cancelled; `squeue --"
        in said
    )
    assert "`squeue --name=first-" in said
    assert not run_dir.exists()


def test_each_submission_has_a_name_of_its_own_for_all_its_runs(
    fake_slurm: FakeSlurm, submit: Submit, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1_790_000_000.25)  # all at the same moment
    names = []
    for _ in range(2):
        submit("--multirun", "seed=1,2")
        names.append((run_dir / "seed_1" / "slurm" / "submission").read_text())
        assert (run_dir / "seed_2" / "slurm" / "submission").read_text() == names[-1]
        assert (run_dir / "seed_1" / "slurm" / "submissions" / names[-1].strip() / "job.json").is_file()
    assert names[0] != names[1]
    assert all(re.fullmatch(r"20260921T141320\.250Z-[0-9a-f]{6}\n", name) for name in names)
    before = files_below(run_dir)
    fake_slurm.answer("sbatch", "echo 'sbatch: error: no' >&2; exit 1")
    with pytest.raises(ValueError, match="Slurm does not take the job: no"):
        submit("--multirun", "seed=1,2")
    assert files_below(run_dir) == before


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


@pytest.mark.parametrize(("run_dir_name", "sign"), [("100% done", "%"), ("a\\b", "\\"), ("a\tb", "\t")])
def test_a_name_that_slurm_would_read_otherwise_is_told_with_the_sign(run_dir_name: str, sign: str) -> None:
    assert f"must be without {sign!r}" in path_fault(f"/runs/{run_dir_name}")


def test_a_chain_is_queued_one_after_the_other(fake_slurm: FakeSlurm, submit: Submit, run_dir: Path) -> None:
    fake_slurm.answer("scontrol", "echo JobId=77 JobState=RUNNING")
    printed = submit("slurm.chain=3", "slurm.after=77")
    dependencies = [call[2] for call in fake_slurm.calls("sbatch")]
    assert dependencies == [
        "--dependency=singleton,afterok:77",
        "--dependency=singleton,afterany:101",
        "--dependency=singleton,afterany:102",
    ]
    assert json.loads((run_dir / "slurm" / "job.json").read_text())["jobs"] == [101, 102, 103]
    assert "Queued jobs 101, 102, 103, one after the other, as" in printed


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


def test_batches_that_leave_processes_idle_and_a_short_warning_are_told(
    fake_slurm: FakeSlurm, tiny_run: list[str], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*tiny_run, f"run_dir={run_dir}", "slurm.nodes=2", "slurm.lead_seconds=30"])
    said = capsys.readouterr().err
    assert "slurm.lead_seconds=30 is short" in said
    assert "Slurm gives each process one CPU, which the workers of its loader must share" in said
    assert "88% of the GPUs' work is for nothing: 8 samples" in said


def test_help_and_wrong_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["+experiment=quickstart", "-h"]):
        assert main(argv) == 0
        assert capsys.readouterr().out.startswith("usage: muybridge submit +experiment=NAME")
    with pytest.raises(ValueError, match="unknown option --dryrun"):
        main(["+experiment=quickstart", "--dryrun"])


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
