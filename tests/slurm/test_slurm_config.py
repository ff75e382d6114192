"""The rules for what a job asks Slurm for."""

import sys
from pathlib import Path
from typing import Any

import pytest

from muybridge.slurm.config import SlurmConfig, limit_seconds


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
