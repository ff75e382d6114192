"""Queueing a run: what a job is given, and the mistakes that are named before anything is written."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from muybridge.slurm.config import SITE_VARIABLE
from muybridge.slurm.plan import quoted
from muybridge.slurm.run_checks import path_fault
from muybridge.slurm.submit import main
from muybridge.tests.slurm.programs import FakeSlurm
from muybridge.tests.slurm.stub_run import read_fields
from muybridge.tests.slurm.submitted import Submit, files_below
from muybridge.train.config import load_train_config

pytestmark = pytest.mark.usefixtures("no_site")


HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned`; rm -rf * & | ? [x] {y} é #'


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
