"""The batch script that a submission queues."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from muybridge.slurm.config import SITE_VARIABLE, SlurmConfig
from muybridge.slurm.plan import quoted
from muybridge.slurm.render import NUMBERS_MARKER, RESOURCES_MARKER, TEMPLATE, read_template, render, resource_lines
from muybridge.slurm.submit import main

EXPERIMENTS = sorted(path.stem for path in (TEMPLATE.parents[1] / "configs" / "experiment").glob("*.yaml"))
ALL = SlurmConfig(
    nodes=4,
    gpus_per_node=8,
    cpus_per_process=12,
    memory="0",
    time="1-00:00:00",
    partition="gpu,long",
    account="video",
    qos="high",
    constraint="a100&ib",
    reservation="night",
    exclude="n7,n[10-12]",
    exclusive=True,
    lead_seconds=200,
    requeue=False,
    options=["--gres=nvme:1", "--mail-type=FAIL"],
)


def test_every_setting_becomes_a_line() -> None:
    assert resource_lines(ALL, job_name="run-0a1b2c", is_array=False) == [
        "#SBATCH --job-name=run-0a1b2c",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --mem=0",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --partition=gpu,long",
        "#SBATCH --account=video",
        "#SBATCH --qos=high",
        "#SBATCH --constraint=a100&ib",
        "#SBATCH --reservation=night",
        "#SBATCH --exclude=n7,n[10-12]",
        "#SBATCH --output=slurm/log-%j.txt",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR2@200",
        "#SBATCH --exclusive",
        "#SBATCH --no-requeue",
        "#SBATCH --gres=nvme:1",
        "#SBATCH --mail-type=FAIL",
    ]


def test_what_is_not_set_is_left_to_the_site() -> None:
    lines = resource_lines(SlurmConfig(gpus_per_node=0), job_name="x", is_array=True)
    names = {line.removeprefix("#SBATCH --").partition("=")[0] for line in lines}
    assert names == {"job-name", "nodes", "ntasks-per-node", "output", "open-mode", "signal", "requeue"}
    assert "#SBATCH --output=slurm/log-%A_%a.txt" in lines
    assert "#SBATCH --ntasks-per-node=1" in lines


def test_lines_and_numbers_go_where_the_markers_are() -> None:
    template = f"#!/bin/bash\n{RESOURCES_MARKER}\nA=1\n{NUMBERS_MARKER}\necho $A\n"
    filled = render(template, resources=["#SBATCH --nodes=2"], numbers={"A": 5, "B": 0})
    assert filled == "#!/bin/bash\n#SBATCH --nodes=2\nA=1\nA=5\nB=0\necho $A\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "cannot be read"),
        ("", f"must have one line '{RESOURCES_MARKER}'"),
        (f"#!/bin/bash\n{RESOURCES_MARKER}\n", f"must have one line '{NUMBERS_MARKER}'"),
        (f"#!/bin/bash\n{RESOURCES_MARKER}\n{RESOURCES_MARKER}\n{NUMBERS_MARKER}\n", "must have one line"),
        (f"{RESOURCES_MARKER}\n{NUMBERS_MARKER}\n", "must begin with a line such as #!/bin/bash"),
        (f"#!/bin/bash\ncd /\n{RESOURCES_MARKER}\n{NUMBERS_MARKER}\n", "above its first command"),
        (f"#!/bin/bash\n{RESOURCES_MARKER}\n{NUMBERS_MARKER}\nif true\n", "must be a script that bash can read"),
    ],
)
def test_a_template_of_a_sites_own_is_looked_at(tmp_path: Path, text: str | None, fault: str) -> None:
    path = tmp_path / "own.sbatch"
    if text is not None:
        path.write_text(text)
    found = read_template(SlurmConfig(template=str(path)), "slurm.template")[1]
    assert any(fault in line and str(path) in line for line in found)


def test_the_template_of_the_package_has_no_faults() -> None:
    text, faults = read_template(SlurmConfig(), "slurm.template")
    assert (text, faults) == (TEMPLATE.read_text(), [])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_be_looked_at_without_a_cluster(
    experiment: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs = {name: shutil.which(name) for name in ("bash", "shellcheck")}
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    monkeypatch.setenv("HOME", str(tmp_path))  # no settings of a site
    monkeypatch.delenv(SITE_VARIABLE, raising=False)
    folder = f"{tmp_path}/it's $(here)"
    argv = [f"+experiment={experiment}", f"run_dir={quoted(folder)}"]
    assert main([*argv, "slurm.nodes=2", "slurm.time=8:00:00", "--dry-run"]) == 0
    command, _, script = capsys.readouterr().out.partition("\n")
    assert shlex.split(command)[2:] == [f"--chdir={folder}", "--dependency=singleton", f"{folder}/slurm/train.sbatch"]
    assert "#SBATCH --nodes=2\n" in script
    assert "$(here)" not in script
    assert os.listdir(tmp_path) == []
    check(["bash", "-n"], programs["bash"], script)
    if programs["shellcheck"] is None:
        pytest.skip("shellcheck is not installed")
    check(["shellcheck", "--severity=warning", "-"], programs["shellcheck"], script)


def check(command: list[str], program: str | None, script: str) -> None:
    """Run a program that reads the script and finds nothing wrong."""
    assert program is not None
    done = subprocess.run([program, *command[1:]], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
