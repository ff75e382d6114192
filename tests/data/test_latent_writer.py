"""A latent cache is written in whole shards, by any number of processes, and what was there is kept or refused, never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load

from muybridge.data import latent_writer
from muybridge.data.config import DataConfig
from muybridge.data.index import Clip, ClipIndex, read_manifest
from muybridge.data.latent_cache import LatentBucket, cache_description
from muybridge.data.latent_writer import EncodedClip, LatentWriter
from muybridge.data.shards import DatasetWriter

BUCKET = LatentBucket("9x64x64", (4, 3, 2, 2))
SHARD_BYTES = 2 * 48 * 4  # four clips


def latents_of(row: int) -> torch.Tensor:
    return torch.randn(*BUCKET.latent_shape, generator=torch.Generator().manual_seed(row))


def open_writer(folder: Path, source: ClipIndex, *, overwrite: bool = False, **changes: Any) -> LatentWriter:
    bucket_of_row = changes.pop("bucket_of_row", np.zeros(len(source), dtype=np.int16))
    about = cache_description(source, DataConfig(), **{"vae_fingerprint": "vae-1", "text_fingerprint": None, **changes})
    return LatentWriter(
        folder,
        source,
        about,
        bucket_table=[BUCKET],
        bucket_of_row=bucket_of_row,
        shard_bytes=SHARD_BYTES,
        overwrite=overwrite,
    )


def fill(writer: LatentWriter, shards: list[int]) -> None:
    for shard in shards:
        writer.write_shard(shard, [EncodedClip(row, latents_of(row)) for row in writer.rows(shard).tolist()])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_shards_are_webdataset_tars_of_bfloat16_latents(dataset: ClipIndex, tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "cache", dataset)
    assert [len(writer.rows(shard)) for shard in writer.missing_shards()] == [4, 4, 3]
    fill(writer, writer.missing_shards())
    index = writer.close()
    assert index is not None
    stock = webdataset.WebDataset([str(path) for path in index.shards], shardshuffle=False, empty_check=False)
    samples = list(stock)
    assert [sample["__key__"] for sample in samples] == [dataset.text("key", row) for row in range(11)]
    for row, sample in enumerate(samples):
        assert load(sample["latents.safetensors"]).keys() == {"latents"}
        assert torch.equal(load(sample["latents.safetensors"])["latents"], latents_of(row).bfloat16())
        assert sample["txt"].decode() == dataset.text("caption", row)
        assert sample["json"].decode() == dataset.text("labels", row)
        found, source = index.clip(row), dataset.clip(row)
        assert (found.key, found.captions, found.frames, found.width) == (
            source.key,
            source.captions,
            source.frames,
            source.width,
        )


def test_however_many_processes_write_it_it_comes_out_the_same(dataset: ClipIndex, tmp_path: Path) -> None:
    alone = open_writer(tmp_path / "alone", dataset)
    fill(alone, alone.shards_of(0, 1))
    assert alone.close() is not None
    writers = [open_writer(tmp_path / "together", dataset) for _ in range(2)]
    fill(writers[1], writers[1].shards_of(1, 2))
    assert writers[1].close() is None  # the other one has not written its shards
    assert not read_manifest(tmp_path / "together")["complete"]
    fill(writers[0], writers[0].shards_of(0, 2))
    assert writers[0].close() is not None
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


KILLED = """
import os, signal, sys
from pathlib import Path
from muybridge.data.index import ClipIndex
from muybridge.data.latent_writer import EncodedClip
import importlib.util
spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
writer = helpers.open_writer(Path(sys.argv[3]), ClipIndex.open(sys.argv[2]))
helpers.fill(writer, [0])
def clips():
    for row in writer.rows(1).tolist():
        if row == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        yield EncodedClip(row, helpers.latents_of(row))
writer.write_shard(1, clips())
"""


def test_a_killed_writer_is_continued(dataset: ClipIndex, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    program = [sys.executable, "-c", KILLED, __file__, str(dataset.folder), str(folder)]
    assert subprocess.run(program, check=False, timeout=100).returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="is unfinished"):
        ClipIndex.open(folder)
    writer = open_writer(folder, dataset)
    assert writer.missing_shards() == [1, 2]
    first = next(folder.glob("shard-*-000000.tar"))
    before = os.stat(first)
    fill(writer, writer.missing_shards())
    assert writer.close() is not None
    assert os.stat(first) == before
    alone = open_writer(tmp_path / "alone", dataset)
    fill(alone, alone.missing_shards())
    assert alone.close() is not None
    assert contents(folder) == contents(tmp_path / "alone")


def test_a_shard_that_is_gone_or_short_is_written_again(dataset: ClipIndex, tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "cache", dataset)
    fill(writer, writer.missing_shards())
    index = writer.close()
    assert index is not None
    index.shards[0].unlink()
    with open(index.shards[2], "r+b") as file:
        file.truncate(1000)
    writer = open_writer(tmp_path / "cache", dataset)
    assert writer.missing_shards() == [0, 2]
    fill(writer, [0, 2])
    assert writer.close() is not None


def test_a_shard_is_written_by_one_process_at_a_time(dataset: ClipIndex, tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "cache", dataset)

    def clips() -> Any:
        with pytest.raises(ValueError, match="is being written by another process"):
            fill(open_writer(tmp_path / "cache", dataset), [0])
        yield from (EncodedClip(row, latents_of(row)) for row in writer.rows(0).tolist())

    writer.write_shard(0, clips())
    assert writer.missing_shards() == [1, 2]


def test_two_processes_may_begin_the_same_cache(
    dataset: ClipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    begun: list[LatentWriter] = []

    def begun_by_another_meanwhile(folder: Path) -> dict[str, Any] | None:
        found = read_manifest(folder)
        if not begun:
            monkeypatch.setattr(latent_writer, "read_manifest", read_manifest)
            begun.append(open_writer(folder, dataset))
        return found

    monkeypatch.setattr(latent_writer, "read_manifest", begun_by_another_meanwhile)
    second = open_writer(folder, dataset)
    assert len(begun) == 1
    assert second.missing_shards() == [0, 1, 2]


def test_a_shard_that_another_process_finished_just_now_is_left_alone(
    dataset: ClipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (open_writer(tmp_path / "cache", dataset) for _ in range(2))
    lock = latent_writer._lock

    def lock_behind_another(file: Any, *, wait: bool) -> bool:
        monkeypatch.setattr(latent_writer, "_lock", lock)
        fill(first, [0])  # while this one had opened its file and did not have it yet
        return lock(file, wait=wait)

    monkeypatch.setattr(latent_writer, "_lock", lock_behind_another)
    with pytest.raises(ValueError, match="is being written by another process"):
        fill(second, [0])
    assert second.missing_shards() == [1, 2]


def test_rows_that_are_not_encoded_keep_their_places(dataset: ClipIndex, tmp_path: Path) -> None:
    buckets = np.zeros(11, dtype=np.int16)
    buckets[[0, 4, 9, 10]] = -1
    writer = open_writer(tmp_path / "cache", dataset, bucket_of_row=buckets)
    clips = {row: EncodedClip(row, latents_of(row)) for row in range(11)}
    clips[5] = EncodedClip(5, None, reason="it is a cake")
    for shard in writer.missing_shards():
        writer.write_shard(shard, [clips[row] for row in writer.rows(shard).tolist()])
    index = writer.close()
    assert index is not None
    assert len(index) == 11
    assert [index.text("key", row) for row in range(11)] == [dataset.text("key", row) for row in range(11)]
    assert np.flatnonzero(index.column("size") > 0).tolist() == [1, 2, 3, 6, 7, 8]
    assert writer.failures() == [[5, dataset.text("key", 5), "it is a cake"]]


def test_another_cache_is_replaced_only_when_asked(dataset: ClipIndex, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    writer = open_writer(folder, dataset)
    fill(writer, writer.missing_shards())
    assert writer.close() is not None
    before = contents(folder)
    words = r"holds other latents: its vae_fingerprint is vae-1, not vae-2, its text_fingerprint is None, not umt5; --overwrite"
    with pytest.raises(ValueError, match=words):
        open_writer(folder, dataset, vae_fingerprint="vae-2", text_fingerprint="umt5")
    assert contents(folder) == before
    writer = open_writer(folder, dataset, vae_fingerprint="vae-2", overwrite=True)
    assert writer.missing_shards() == [0, 1, 2]
    assert not list(folder.glob("*.tar"))
    fill(writer, [1])
    writer = open_writer(
        folder, dataset, vae_fingerprint="vae-2", overwrite=True
    )  # a second process, or the first again
    assert writer.missing_shards() == [0, 2]
    fill(writer, [0, 2])
    assert writer.close() is not None


@pytest.mark.parametrize("what", ["videos", "thesis"])
def test_what_is_no_cache_is_left_alone(what: str, dataset: ClipIndex, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    if what == "videos":
        folder = dataset.folder
    else:
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
    before = contents(folder)
    with pytest.raises(ValueError, match="is not empty and holds no latents"):
        open_writer(folder, dataset, overwrite=True)
    assert contents(folder) == before


def test_keys_that_lead_elsewhere_or_come_twice_do_not_name_members(tmp_path: Path) -> None:
    keys = ["../../etc/x", "/abs", "twice", "twice", "part/of.it"]
    with DatasetWriter(tmp_path / "clips", kind="raw", description={"source": "test"}, shard_bytes=1) as source_writer:
        for key in keys:
            clip = Clip(key, "a caption", 9, 8, 1, 9 / 8, 64, 64, seekable=True)
            source_writer.add(clip, b"video", extension="mp4")
        source = source_writer.close()
    writer = open_writer(tmp_path / "cache", source)
    fill(writer, writer.missing_shards())
    index = writer.close()
    assert index is not None
    assert [index.text("key", row) for row in range(5)] == keys
    stock = webdataset.WebDataset([str(path) for path in index.shards], shardshuffle=False, empty_check=False)
    names = [sample["__key__"] for sample in stock]
    assert len(set(names)) == 5
    assert names[2] == "twice"
    assert not any(name.startswith(("/", ".")) for name in names)
