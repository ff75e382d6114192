"""A run reads the same with copies of its shards as without, whatever becomes of the copies."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.data import staged
from muybridge.data.batch import VideoBatch
from muybridge.data.config import DataConfig, build_buckets
from muybridge.data.index import ClipIndex
from muybridge.data.indexing import IndexSettings, build_index
from muybridge.data.loader import VideoLoader
from muybridge.data.media_bytes import DatasetChangedError
from muybridge.data.staged import STAGED_VARIABLE, shard_copy, staging_folder, stream_copy
from muybridge.data.storage import file_facts
from muybridge.data.stream_samples import BadSample, StreamSample, read_shard
from muybridge.tests.data import test_latent_cache as latents
from muybridge.tests.data import test_stream as streams

FIELDS = ("slots", "datasets", "rows", "weights", "frames", "latents")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the copies of this test lie."""
    monkeypatch.setenv(STAGED_VARIABLE, str(tmp_path / "disk"))
    return staging_folder(str(tmp_path / "disk"))


@pytest.fixture
def own(dataset: ClipIndex, tmp_path: Path) -> ClipIndex:
    """The dataset of all tests, to be damaged by this one."""
    shutil.copytree(dataset.folder, tmp_path / "train")
    return ClipIndex.open(tmp_path / "train")


def stage(index: ClipIndex, place: Path) -> list[Path]:
    found = []
    for number, shard in enumerate(index.shards):
        copy = shard_copy(place, index, number)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shard, copy)
        found.append(copy)
    return found


def stage_stream(shard: Path, place: Path) -> Path:
    copy = stream_copy(place, str(shard), file_facts(str(shard)))
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(shard, copy)
    return copy


def raw_loader(index: ClipIndex, **changes: Any) -> VideoLoader:
    config = DataConfig(**{"path": str(index.folder), "frames": 5, "workers": 0, "caption_dropout": 0.3, **changes})
    return VideoLoader(
        config,
        buckets=build_buckets(config, global_batch=4, micro_batch=2, world_size=1),
        rank=0,
        world_size=1,
        seed=3,
    )


def batches(loader: VideoLoader, steps: int = 3) -> list[VideoBatch]:
    return [batch for step in islice(loader.steps(0), steps) for batch in step]


def assert_same(found: list[VideoBatch], expected: list[VideoBatch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.keys, one.captions) == (other.keys, other.captions)
        for name in FIELDS:
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None and b is None) or torch.equal(a, b), name


def overwrite(path: Path, data: bytes, at: int = 0) -> None:
    """Other bytes, and nothing that a look at size and time could tell."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("workers", [0, 1])
def test_clips_come_from_the_copies_in_the_same_batches(own: ClipIndex, place: Path, workers: int) -> None:
    with closing(raw_loader(own, workers=workers)) as loader:
        assert loader.counts()["staged_shards"] == 0
        expected, fingerprint = batches(loader), loader.fingerprint
    stage(own, place)
    for shard in own.shards:
        overwrite(shard, bytes(shard.stat().st_size))
    with closing(raw_loader(own, workers=workers)) as loader:
        assert_same(batches(loader), expected)
        assert loader.fingerprint == fingerprint
        assert loader.counts()["staged_shards"] == len(own.shards) > 2


def test_shards_without_a_copy_are_read_where_they_are(own: ClipIndex, place: Path) -> None:
    with closing(raw_loader(own)) as loader:
        expected = batches(loader)
    for copy in stage(own, place)[1:]:
        copy.unlink()
    overwrite(own.shards[0], bytes(1000))
    with closing(raw_loader(own)) as loader:
        assert_same(batches(loader), expected)
        assert loader.counts()["staged_shards"] == 1


def test_what_is_broken_in_both_is_said_of_the_original(own: ClipIndex, place: Path) -> None:
    for file in (*stage(own, place), *own.shards):
        overwrite(file, bytes(file.stat().st_size))
    with (
        closing(raw_loader(own)) as loader,
        pytest.raises(DatasetChangedError, match=rf"changed under the run: {own.folder}/shard"),
    ):
        batches(loader)


@pytest.mark.parametrize("harm", ["damaged", "cut", "deleted", "a folder"])
def test_a_copy_that_breaks_under_the_run_costs_a_warning(
    own: ClipIndex, place: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(raw_loader(own)) as loader:
        expected = batches(loader, steps=6)
    copy = stage(own, place)[0]
    with closing(raw_loader(own)) as loader:
        size = copy.stat().st_size
        copy.unlink()
        if harm == "damaged":
            copy.write_bytes(bytes(size))
        elif harm == "cut":
            copy.write_bytes(own.shards[0].read_bytes()[:600])
        elif harm == "a folder":
            copy.mkdir()
        with caplog.at_level(logging.WARNING):
            assert_same(batches(loader, steps=6), expected)  # each clip twice
        assert loader.counts()["lost_copies"] == 1
    assert [record.message.split(" cannot be used")[0] for record in caplog.records] == [f"the copy {copy}"]
    assert not copy.is_file()  # so that the next start makes it again


def test_a_disk_that_breaks_does_not_fill_the_log(
    own: ClipIndex, place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "_LOGGED", 2)
    copies = stage(own, place)
    with closing(raw_loader(own)) as loader:
        shutil.rmtree(place)
        batches(loader, steps=6)
        assert loader.counts()["lost_copies"] == len(copies) > 2
    assert len(caplog.records) == 2
    assert caplog.records[1].message.endswith("further ones are only counted")


@pytest.mark.parametrize("fault", ["short", "of another user", "a link"])
def test_what_is_no_copy_of_ours_is_not_read(own: ClipIndex, place: Path, fault: str) -> None:
    copy = stage(own, place)[0]
    if fault == "short":
        os.truncate(copy, copy.stat().st_size - 1)
    elif fault == "of another user":
        if os.geteuid():
            pytest.skip("only root can give files away")
        os.chown(copy, 4321, 4321)
    else:
        copy.unlink()
        copy.symlink_to(own.shards[0])
    with closing(raw_loader(own)) as loader:
        assert loader.counts()["staged_shards"] == len(own.shards) - 1


def test_a_shard_that_changed_and_was_indexed_again_has_no_copy(tmp_path: Path, own: ClipIndex, place: Path) -> None:
    def indexed() -> ClipIndex:
        build_index(
            str(own.folder), tmp_path / "index", settings=IndexSettings(decode=False), workers=1, timeout_seconds=60
        )
        return ClipIndex.open(tmp_path / "index")

    stage(indexed(), place)
    text = own.shards[0].read_bytes()
    overwrite(own.shards[0], text.replace(b"right", b"rigHT"))
    os.utime(own.shards[0])
    changed = indexed()
    with closing(raw_loader(changed)) as loader:
        assert loader.counts()["staged_shards"] == len(own.shards) - 1


def test_latents_come_from_the_copies(dataset: ClipIndex, tmp_path: Path, place: Path) -> None:
    cache = latents.write(tmp_path / "latents", dataset)
    with closing(latents.build(tmp_path / "latents")) as loader:
        expected = batches(loader, steps=6)
    copies = stage(cache, place)
    kept = cache.shards[0].read_bytes()
    for shard in cache.shards:
        overwrite(shard, bytes(shard.stat().st_size))
    with closing(latents.build(tmp_path / "latents")) as loader:
        assert_same(batches(loader, steps=6), expected)
        assert loader.counts()["staged_shards"] == len(cache.shards) > 1
        assert loader.counts()["lost_copies"] == 0
    overwrite(cache.shards[0], kept)
    overwrite(copies[0], bytes(copies[0].stat().st_size))
    with closing(latents.build(tmp_path / "latents")) as loader:
        assert_same(batches(loader, steps=6), expected)
        assert loader.counts()["lost_copies"] == 1
    with closing(latents.build(tmp_path / "latents")) as loader:
        copies[1].unlink()
        with pytest.raises(DatasetChangedError, match=r"000001\.tar, clip"):
            batches(loader, steps=6)


def samples(shard: Path) -> list[tuple[str, bytes]]:
    found: Iterator[StreamSample | BadSample] = read_shard(str(shard))
    return [(item.key, item.data) if isinstance(item, StreamSample) else ("bad", b"") for item in found]


def test_a_stream_comes_from_its_copy_until_the_original_changes(tmp_path: Path, place: Path) -> None:
    folder = streams.write_shards(tmp_path / "tars", streams.pairs(range(6)))
    shard = folder / "000.tar"
    expected = samples(shard)
    stage_stream(shard, place)
    overwrite(shard, bytes(shard.stat().st_size))
    assert samples(shard) == expected
    streams.write_shards(tmp_path / "tars", streams.pairs(range(10, 16)))  # of the same size
    os.utime(shard, ns=(0, 0))
    assert [key for key, _ in samples(shard)] == [f"{number:03d}" for number in range(10, 16)]


def test_the_original_of_a_stream_goes_on_where_its_copy_is_damaged(
    tmp_path: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = streams.write_shards(tmp_path / "tars", streams.pairs(range(6)))
    shard = folder / "000.tar"
    expected = samples(shard)
    copy = stage_stream(shard, place)
    overwrite(copy, b"\x00\x01\x02" * 300, at=copy.stat().st_size // 2)
    assert samples(shard) == expected
    assert not copy.exists()
    assert [record.message.split(" cannot be used")[0] for record in caplog.records] == [f"the copy {copy}"]


def test_a_loader_of_streams_counts_its_copies(tmp_path: Path, place: Path) -> None:
    folder = streams.write_shards(tmp_path / "tars", streams.pairs(range(6)))
    stage_stream(folder / "000.tar", place)
    with closing(streams.build(streams.stream_settings(folder))) as loader:
        assert len(streams.keys(list(islice(loader.steps(0), 3)))) == 6
        assert loader.counts()["staged_reads"] >= 1
        assert loader.counts()["lost_copies"] == 0


def test_the_place_of_copies_may_differ_by_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_DISK", "/mnt/nvme3")
    monkeypatch.delenv("NO_DISK", raising=False)
    assert staging_folder("$LOCAL_DISK/shards") == Path(f"/mnt/nvme3/shards/muybridge-staged-{os.geteuid()}")
    with pytest.raises(ValueError, match=r"\$NO_DISK/shards names an environment variable that is not set"):
        staging_folder("$NO_DISK/shards")
    with pytest.raises(ValueError, match="MUYBRIDGE_STAGED=nvme must be an absolute path"):
        staging_folder("nvme")


def test_the_signature_of_an_address_is_not_in_the_name_of_its_copy(place: Path) -> None:
    url = "https://host/data/a.tar?signature=abcdefghijkl"
    facts = file_facts(__file__)
    assert stream_copy(place, url, facts).name.endswith("-a.tar")
    assert stream_copy(place, url, facts) != stream_copy(place, url.replace("/a.", "/b."), facts)
