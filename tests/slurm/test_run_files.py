"""The files of a run's Slurm jobs, whole, missing and damaged."""

import os
from pathlib import Path

import pytest

from muybridge.slurm.run_files import BadNode, Ended, is_at_work, is_run_dir, read_run_files, run_dirs
from muybridge.tests.slurm.submitted import write_job, write_life


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_job(tmp_path, [7, 8])
    slurm = tmp_path / "slurm"
    write_life(tmp_path, "7.0", 1000.0, 1100.0, why='a "quoted" cause')
    write_life(tmp_path, "7.1", 1200.0)
    with (slurm / "lives.jsonl").open("a") as file:
        file.write('{"event": "resubmit", "life": "7.1", "job": 9, "unix_seconds": 1300}\n')
    (slurm / "lives" / "7.0" / "ended").write_text("75\nscheduler\nstopped by SIGUSR2\n")
    (slurm / "lives" / "7.1" / "bad_nodes").write_text("n3\tGPU 2 is gone\n")
    (slurm / "bad_nodes").write_text("n1\tdisk full\nn3\told\n")
    (slurm / "log-7.txt").touch()
    (slurm / "fruitless").write_text("2\nstep-00000005\n")
    (slurm / "gave_up").write_text("the training diverged\n")
    files = read_run_files(tmp_path)
    assert files.faults == []
    assert files.job is not None
    assert (files.job.ids, files.job.name, files.job.lead_seconds) == ([7, 8], "mb-run", 300)
    first, second = files.lives
    assert (first.begin, first.end, first.code, first.decision, first.why) == (
        1000,
        1100,
        75,
        "requeue",
        'a "quoted" cause',
    )
    assert first.ended == Ended(75, "scheduler", "stopped by SIGUSR2")
    assert (second.end, second.successor, second.nodes) == (None, 9, "n[1-2]")
    assert files.job_ids() == {7, 8, 9}
    assert files.bad_nodes == [BadNode("n1", "disk full"), BadNode("n3", "GPU 2 is gone")]
    assert (files.fruitless, files.gave_up, files.is_cancelled) == (
        1,
        "the training diverged",
        False,
    )  # the last life goes on
    assert files.log() == slurm / "log-7.txt"


def test_a_sweeps_task_has_the_log_of_its_array(tmp_path: Path) -> None:
    run_dir = tmp_path / "1"
    write_job(run_dir, [20], index=1, submit_dir=tmp_path)
    write_life(run_dir, "22.0", 1000.0)  # its plain number is another one
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "log-20_1.txt").touch()
    (tmp_path / "slurm" / "log-20_0.txt").touch()
    assert read_run_files(run_dir).log() == tmp_path / "slurm" / "log-20_1.txt"


def test_a_run_without_slurm_has_nothing(tmp_path: Path) -> None:
    files = read_run_files(tmp_path)
    assert (files.job, files.lives, files.job_ids(), files.log(), files.faults) == (None, [], set(), None, [])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"jobs": 7}', '{"jobs": ["x"]}', '{"jobs": [7], "array_index": null}', "\x00\xff"]
)
def test_a_damaged_job_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.json").write_text(text)
    files = read_run_files(tmp_path)
    assert files.job is None
    assert [fault for fault in files.faults if "job.json cannot be read" in fault]


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    write_life(tmp_path, "7.0", 1000.0, 1100.0)
    slurm = tmp_path / "slurm"
    with (slurm / "lives.jsonl").open("a") as file:
        file.write('{"event": "end", "life": "9.0", "code": 1, "decision": "done", "why": "", "unix_seconds": 1}\n')
        file.write('{"event": "start", "life": "8.0", "job": "x", "nodes": "n1", "unix_seconds": 1}\n')
        file.write('{"event": "start", "life": "8.0", "job": 8, "nodes": "n1", "unix_seconds": NaN}\n')
        file.write('{"event": "start"}\nnonsense\n[]\n{"event": "start", "life": "8.1", "jo')
    (slurm / "lives" / "7.0" / "ended").write_text("seventy\n")
    (slurm / "fruitless").write_text("many")
    (slurm / "bad_nodes").write_bytes(b"\n\tno name\nn\xff1\tx\n")
    files = read_run_files(tmp_path)
    assert [life.name for life in files.lives] == ["7.0"]
    assert files.lives[0].ended is None
    assert files.fruitless == 0
    assert any("fruitless does not hold a number" in fault for fault in files.faults)
    assert [node.name for node in files.bad_nodes] == ["n\ufffd1"]


def test_folders_of_runs(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for index in (0, 1):
        write_job(sweep / str(index), [20], index=index, submit_dir=sweep)
    assert run_dirs(sweep) == [sweep / "0", sweep / "1"]
    (sweep / "slurm").mkdir()
    (sweep / "slurm" / "tasks").write_bytes(b"".join(f"{sweep}/{index}".encode() + b"\0" for index in (1, 0)))
    assert run_dirs(sweep) == [sweep / "1", sweep / "0"]  # in the order of the tasks
    assert run_dirs(sweep / "1") == [sweep / "1"]
    assert not is_run_dir(tmp_path)
    for wrong in (tmp_path, tmp_path / "absent", sweep / "1" / "slurm" / "job.json"):
        with pytest.raises(ValueError, match="must be the directory of a run"):
            run_dirs(wrong)


def test_an_attempt_is_at_work_as_long_as_its_lock_is_touched(tmp_path: Path) -> None:
    assert not is_at_work(tmp_path, 1000.0)
    (tmp_path / "lock.json").touch()
    os.utime(tmp_path / "lock.json", (1000, 1000))
    assert is_at_work(tmp_path, 1030.0)
    assert not is_at_work(tmp_path, 1100.0)
