"""Saving in the background: what is written is the state at the beginning, and the writer process may die at any time."""

import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from muybridge.data.child_process import JOB_SIGNALS
from muybridge.tests.train.checkpoint_parts import AVERAGE, fake_one_rank, make_checkpointer, names, save
from muybridge.train import checkpoint, snapshot
from muybridge.train.checkpoint import Checkpointer
from muybridge.train.checkpoint_folder import choose_checkpoint
from muybridge.train.fragments import read_weights

DEADLINE_SECONDS = 60.0


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_one_rank(monkeypatch)


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[Checkpointer]:
    """One in the background, of weights that are 1."""
    made = make_checkpointer(tmp_path, 1.0, in_background=True)
    yield made
    made.close()


def writer_pid(checkpointer: Checkpointer) -> int:
    assert checkpointer._writer is not None
    return checkpointer._writer.pid


def is_running(pid: int) -> bool:
    try:
        # The third field; a process that ended and was not waited for is Z.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it ended after its file was opened
        return False


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.01)


def test_what_is_written_is_the_state_at_the_beginning(tmp_path: Path, checkpointer: Checkpointer) -> None:
    os.kill(writer_pid(checkpointer), signal.SIGSTOP)  # as a disk that takes its time
    checkpointer.begin(1, {}, "", {})
    assert checkpointer.in_flight
    assert not checkpointer.is_written()
    checkpointer._engine.shards[0].master.fill_(5.0)
    checkpointer._ema.averages[AVERAGE][0].fill_(5.0)
    os.kill(writer_pid(checkpointer), signal.SIGCONT)
    saved = checkpointer.finish()
    assert saved is not None
    assert saved.failure == ""
    assert choose_checkpoint(tmp_path) == saved.folder
    assert read_weights(saved.folder, "master")["w"].unique().tolist() == [1.0]
    assert read_weights(saved.folder, "ema")["w"].unique().tolist() == [-1.0]


def test_both_ways_write_the_same_bytes(tmp_path: Path, checkpointer: Checkpointer) -> None:
    checkpointer.begin(1, {"seed": 1}, "", {})
    checkpointer.commit()
    other = save(tmp_path / "other", 1)
    for path in (tmp_path / "step-00000001").iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_saves_of_other_sizes_follow_each_other(tmp_path: Path, checkpointer: Checkpointer) -> None:
    # Before the first step there is no optimizer state; then the memory must grow.
    (shard,) = checkpointer._engine.shards
    states = dict(shard.optimizer_state)
    sizes = []
    for step, kept in enumerate([{}, states, {}]):
        shard.optimizer_state.clear()
        shard.optimizer_state.update(kept)
        checkpointer.begin(step, {}, "", {})
        saved = checkpointer.commit()
        assert saved.failure == ""
        assert choose_checkpoint(tmp_path) == saved.folder
        sizes.append(saved.nbytes)
    assert sizes[0] == sizes[2] < sizes[1]


def test_a_writer_that_dies_fails_its_save_and_the_next_one_has_a_new_one(
    tmp_path: Path, checkpointer: Checkpointer
) -> None:
    pid = writer_pid(checkpointer)
    os.kill(pid, signal.SIGSTOP)
    checkpointer.begin(1, {}, "", {})
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    assert checkpointer.is_written()
    saved = checkpointer.commit()
    assert "rank 0: the process that writes checkpoints ended (SIGKILL)" in saved.failure
    assert names(tmp_path) == []
    checkpointer.begin(2, {}, "", {})
    assert checkpointer.commit().failure == ""
    assert writer_pid(checkpointer) != pid


def test_a_writer_that_died_between_saves_costs_none(checkpointer: Checkpointer) -> None:
    os.kill(writer_pid(checkpointer), signal.SIGKILL)
    wait_for_end(writer_pid(checkpointer))
    checkpointer.begin(1, {}, "", {})
    assert checkpointer.commit().failure == ""


def test_a_signal_to_the_whole_job_leaves_the_writer_at_work(checkpointer: Checkpointer) -> None:
    # From its first moment on, in which it has set up nothing.
    for number in JOB_SIGNALS:
        os.kill(writer_pid(checkpointer), number)
    checkpointer.begin(1, {}, "", {})
    for number in JOB_SIGNALS:
        os.kill(writer_pid(checkpointer), number)
    assert checkpointer.commit().failure == ""
    # Ours are heard as before.
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(JOB_SIGNALS)


def test_the_writer_ends_with_its_checkpointer(checkpointer: Checkpointer) -> None:
    pid = writer_pid(checkpointer)
    checkpointer.begin(1, {}, "", {})
    checkpointer.close()
    assert not is_running(pid)
    assert not checkpointer.in_flight


def test_the_writer_ends_when_training_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, signal; from muybridge.train.checkpoint_writer import WriterProcess;"
        "writer = WriterProcess(os.memfd_create('test')); print(writer.pid, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    answer = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=False)
    assert answer.returncode == -signal.SIGKILL
    wait_for_end(int(answer.stdout))


def test_the_writer_has_no_secrets_and_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-in-a-coal-mine")
    checkpointer = make_checkpointer(tmp_path, in_background=True)
    checkpointer.begin(1, {}, "", {})
    checkpointer.commit()  # by now it has loaded all that it needs
    process = Path(f"/proc/{writer_pid(checkpointer)}")
    assert b"canary" not in (process / "environ").read_bytes()
    assert "torch" not in (process / "maps").read_text()
    checkpointer.close()


def test_without_room_for_the_copy_training_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(snapshot, "available_memory", lambda: 100)
    monkeypatch.setattr(checkpoint, "WriterProcess", None)
    with caplog.at_level(logging.WARNING):
        checkpointer = make_checkpointer(tmp_path, in_background=True)
        for step in (1, 2):
            checkpointer.begin(step, {}, "", {})
            assert checkpointer.is_written()
            assert checkpointer.commit().failure == ""
    assert (
        caplog.text.count("training waits for its checkpoints to be written: rank 0: the copies of this machine's") == 1
    )


def test_all_ranks_have_room_for_their_copies_or_none_takes_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "WriterProcess", None)
    monkeypatch.setattr(checkpoint, "from_all_ranks", lambda own: [own, "no memory"] if own == "" else [own, own])
    with caplog.at_level(logging.WARNING):
        checkpointer = make_checkpointer(tmp_path, in_background=True)
    assert not checkpointer.in_background
    assert checkpointer._image is None
    assert "rank 1: no memory" in caplog.text


def test_a_run_that_saves_at_its_end_only_takes_no_memory_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SharedImage", None)
    monkeypatch.setattr(checkpoint, "WriterProcess", None)
    checkpointer = make_checkpointer(tmp_path, in_background=True, every_steps=0)
    checkpointer.begin(1, {}, "", {})
    assert checkpointer.commit().failure == ""


def test_memory_that_cuda_will_not_lock_costs_no_later_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointer: Checkpointer
) -> None:
    waiting = []  # as CUDA's last error, which the next kernel raises

    class Runtime:
        def cudaHostRegister(self, *_: int) -> int:
            waiting.append("operation not permitted")
            return 800

    def kernel(*_: object, **__: object) -> None:
        if waiting:
            raise RuntimeError(waiting.pop())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=kernel))
    monkeypatch.setattr(torch, "ones", kernel)
    checkpointer.begin(1, {}, "", {})
    assert checkpointer.commit().failure == ""


def test_a_full_disk_in_the_writer_fails_the_save(tmp_path: Path, checkpointer: Checkpointer) -> None:
    resource.prlimit(writer_pid(checkpointer), resource.RLIMIT_FSIZE, (100, 100))
    checkpointer.begin(1, {}, "", {})
    assert "File too large" in checkpointer.commit().failure
    assert names(tmp_path) == []
