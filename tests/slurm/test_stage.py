"""Shards are copied to a machine's own disk whole or not at all, whatever happens, and training reads the same from there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from muybridge.data.index import ClipIndex, write_manifest
from muybridge.data.staged import STAGED_VARIABLE, staging_folder
from muybridge.slurm import copying, stage
from muybridge.tests.data import test_latent_cache as latents
from muybridge.tests.data.conftest import write_synthetic
from muybridge.tests.data.test_shards_remote import FileServer, Handler
from muybridge.tests.data.test_staged import assert_same, batches, overwrite, raw_loader
from muybridge.tests.data.web_server import serving
from muybridge.train.compose import compose_config
from muybridge.train.config import SCHEMA_NAME, TrainConfig


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NNODES", "SLURMD_NODENAME", STAGED_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> ClipIndex:
    """Eleven clips in several shards."""
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "train", 11)


@pytest.fixture
def own(synthetic: ClipIndex, tmp_path: Path) -> ClipIndex:
    """A dataset for this test to damage."""
    shutil.copytree(synthetic.folder, tmp_path / "train")
    return ClipIndex.open(tmp_path / "train")


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Twelve shards without an index, of 100 kB each."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.tar").write_bytes(bytes([number]) * 100_000)
    return folder


def copies(place: Path) -> list[Path]:
    return sorted(path for path in staging_folder(str(place)).rglob("*") if path.is_file())


def started(place: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "muybridge.slurm.stage", str(place), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def settings(*overrides: str) -> TrainConfig:
    found = compose_config(list(overrides), config_class=TrainConfig, config_name="train", schema_name=SCHEMA_NAME)
    assert isinstance(found, TrainConfig)
    return found


def test_training_reads_what_was_staged(
    own: ClipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(raw_loader(own)) as loader:
        expected = batches(loader)
    place = tmp_path / "disk"
    assert stage.main([str(place), f"data.path={own.folder}"]) == 0
    said = capsys.readouterr().out
    assert f"copied {len(own.shards)} shards" in said
    assert f"{STAGED_VARIABLE}={place}" in said
    for shard in own.shards:
        overwrite(shard, bytes(shard.stat().st_size))
    monkeypatch.setenv(STAGED_VARIABLE, str(place))
    with closing(raw_loader(own)) as loader:
        assert_same(batches(loader), expected)
    before = [path.stat().st_mtime_ns for path in copies(place)]
    assert stage.main([str(place), f"data.path={own.folder}"]) == 0
    assert f"copied 0 shards (0.0 MB, 0 s, 0 MB/s); {len(own.shards)} were there" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in copies(place)] == before


def test_all_that_a_run_reads_is_found(synthetic: ClipIndex, own: ClipIndex, tars: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk"

    def names(*overrides: str) -> list[str]:
        found = stage.find_shards(settings(*overrides), folder)
        assert not found.faults
        return [shard.name for shard in found.shards]

    ours, others = list(map(str, own.shards)), list(map(str, synthetic.shards))
    mixture = [f"data.datasets={{a: {{path: {own.folder}, weight: 1.0}}, b: {{path: {tars}, weight: 0.0}}}}"]
    assert names(*mixture) == ours
    key = own.text("key", 0)
    assert names(f"data.path={own.folder}", "data.filter='size <= " + str(own.clip(0).size) + "'")[0] == ours[0], key
    assert names(f"data.path={tars}", "data.access=stream") == [str(tars / f"{n:02d}.tar") for n in range(12)]
    cache = latents.write(tmp_path / "latents" / "train", own)
    latent = [f"data.path={own.folder}", "data.access=latents", f"data.latents={tmp_path / 'latents'}"]
    assert names(*latent) == list(map(str, cache.shards))
    # The same bytes twice are copied once: these are the shards of the session under another name.
    validation = f"validation.path={synthetic.folder}"
    assert names(f"data.path={own.folder}", validation, "validation.every_steps=10") == others
    assert names(f"data.path={own.folder}", validation, "validation.every_steps=0") == ours


def test_machines_begin_at_different_shards(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(f"data.path={tars}", "data.access=stream")
    firsts = []
    monkeypatch.setenv("SLURM_NNODES", "4")
    for number in range(4):
        monkeypatch.setenv("SLURM_PROCID", str(number))
        found = stage.find_shards(config, tmp_path / "disk").shards
        assert len({shard.name for shard in found}) == 12
        firsts.append(Path(found[0].name).name)
    assert firsts == ["00.tar", "03.tar", "06.tar", "09.tar"]


def test_shards_come_over_http(own: ClipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FileServer()
    with serving(server, monkeypatch):
        server.files |= {shard.name: shard.read_bytes() for shard in own.shards}
        shards = [{**shard, "name": f"{server.url}/{shard['name']}"} for shard in own.manifest["shards"]]
        write_manifest(own.folder, {**own.manifest, "shards": shards})
        assert stage.main([str(tmp_path / "disk"), f"data.path={own.folder}"]) == 0
    assert sorted(path.read_bytes() for path in copies(tmp_path / "disk")) == sorted(server.files.values())


class SlowHandler(Handler):
    """Serves the content of a file for a permit."""

    permits = threading.Semaphore(0)

    def do_GET(self) -> None:
        if self.headers["Range"] is None:  # whether it can be read at all
            return self._answer(200, {}, self.server.files[self.path.lstrip("/")])
        if self.headers["Range"] != "bytes=0-0":  # which asks for the size
            self.permits.acquire()
        return super().do_GET()


@pytest.fixture
def slow_server(tars: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serves the tars; each needs one permit."""
    SlowHandler.permits = threading.Semaphore(0)
    server = FileServer()
    server.RequestHandlerClass = SlowHandler
    server.files |= {path.name: path.read_bytes() for path in tars.iterdir()}
    with serving(server, monkeypatch):
        yield server
        SlowHandler.permits.release(1000)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_all_copied(place: Path, tars: Path) -> None:
    assert sorted(path.read_bytes()[:1] for path in copies(place)) == [bytes([n]) for n in range(12)]
    assert all(path.read_bytes() == path.read_bytes()[:1] * 100_000 for path in copies(place))


def test_a_copy_that_was_killed_leaves_nothing_that_counts(
    slow_server: FileServer, tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"data.path='{slow_server.url}/{{00..11}}.tar'", "data.access=stream"]
    place = tmp_path / "disk"
    process = started(place, *overrides)
    SlowHandler.permits.release(3)
    wait_for(lambda: sum(not path.name.endswith(".partial") for path in copies(place)) == 3, process)
    wait_for(lambda: any(path.name.endswith(".partial") for path in copies(place)), process)
    process.kill()
    process.communicate()
    assert any(path.name.endswith(".partial") for path in copies(place))
    stale = copies(place)[0].with_name("of-another-run.tar.partial")
    stale.write_bytes(b"half")
    SlowHandler.permits.release(1000)
    assert stage.main([str(place), *overrides]) == 0
    assert "copied 9 shards" in capsys.readouterr().out
    assert_all_copied(place, tars)


def test_two_jobs_on_one_machine_share_the_work(slow_server: FileServer, tars: Path, tmp_path: Path) -> None:
    overrides = [f"data.path='{slow_server.url}/{{00..11}}.tar'", "data.access=stream"]
    place = tmp_path / "disk"
    processes = [started(place, *overrides) for _ in range(2)]
    # Both are at it: eight copies at a time each, of twelve.
    wait_for(lambda: len(copies(place)) == 12, processes[0])
    SlowHandler.permits.release(1000)
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert_all_copied(place, tars)
    counts = [int(text.partition("copied ")[2].split()[0]) for text in said]
    assert sum(counts) == 12
    assert min(counts) >= 1
    whole = [request for request in slow_server.requests if request.endswith("bytes=0-99999")]
    assert len(whole) == len(set(whole)) == 12  # nothing was asked for twice


def test_what_does_not_fit_stays_where_it_is(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk takes root to mount")
    try:
        assert stage.main([str(place), f"data.path={tars}", "data.access=stream"]) == 0
        assert "copied 9 shards (0.9 MB" in (said := capsys.readouterr().out)
        assert "3 do not fit and stay where they are (0.3 MB)" in said
        assert len(copies(place)) == 9
        assert shutil.disk_usage(place).free >= copying.KEPT_FREE_SHARE * 2**20
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_a_disk_that_is_full_or_a_quota_ends_nothing(
    call: str, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, call, full)
    assert stage.main([str(tmp_path / "disk"), f"data.path={tars}", "data.access=stream"]) == 0
    assert "12 do not fit" in capsys.readouterr().out
    assert not copies(tmp_path / "disk")


def test_broken_shards_cost_a_line_each(own: ClipIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(own.shards[1], bytes(1000), at=own.clip(int((own.column("shard") == 1).argmax())).offset)
    assert stage.main([str(tmp_path / "disk"), f"data.path={own.folder}"]) == 0
    said = capsys.readouterr().out
    assert f"copied {len(own.shards) - 1} shards" in said
    assert f"left out: {own.shards[1]}: its bytes from" in said
    assert len(copies(tmp_path / "disk")) == len(own.shards) - 1


def test_a_stream_that_changes_meanwhile_is_not_kept(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_and_change(name: str, offset: int, size: int) -> bytes:
        os.utime(name, ns=(0, 0))
        return bytes(size)

    monkeypatch.setattr(copying, "read_range", read_and_change)
    assert stage.main([str(tmp_path / "disk"), f"data.path={tars}", "data.access=stream"]) == 0
    assert ".tar: it changed while it was copied" in (said := capsys.readouterr().out)
    assert "and 7 more" in said
    assert not copies(tmp_path / "disk")


def test_data_that_are_not_there_and_a_disk_that_is_none_are_left_to_the_training(
    own: ClipIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage.main([str(tmp_path / "disk"), f"data.path={tmp_path}/nothing"]) == 0
    assert "nothing does not exist" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert stage.main([str(tmp_path / "file"), f"data.path={own.folder}"]) == 0
    assert "nothing can be copied there" in capsys.readouterr().out


def test_wrong_settings_are_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.main(["nvme", "data.path=x"]) == 64
    assert "TO=nvme must be an absolute path" in capsys.readouterr().err
    assert stage.main(["/nvme", "data.pth=x"]) == 64
    assert "data.pth is not a setting" in capsys.readouterr().err
    assert stage.main(["/nvme", "data.access=stream", "data.path=x", "data.workers=0"]) == 64
    assert "data.workers=0 must be at least 1" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert stage.main(["nvme", "data.path=x"]) == 64
    assert not capsys.readouterr().err


def test_help_says_how_to_clean_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.main(["--help"]) == 0
    assert "-atime +30 -delete" in capsys.readouterr().out


def test_a_lock_on_a_file_that_was_renamed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, target = tmp_path / "a.partial", tmp_path / "a"
    flock = fcntl.flock

    def finished_first(file: object, operation: int) -> None:
        if not target.exists():  # another process had the lock, and renames its work before it gives it up
            partial.write_bytes(b"whole")
            partial.rename(target)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", finished_first)
    found = copying._locked(partial)
    assert found is not None
    with found:
        assert copying._locked(partial) is None
        found.write(b"x")
    assert target.read_bytes() == b"whole"
    assert partial.read_bytes() == b"x"
