"""The shards are stock WebDataset tars, and the index finds every clip's bytes in them."""

from __future__ import annotations

import json
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from muybridge.data.index import INDEX_NAME, MANIFEST_NAME, Clip, ClipIndex, read_manifest
from muybridge.data.shards import DatasetWriter, json_labels, remove_dataset, shard_key

CLIPS = [
    Clip(
        key=shard_key(n, f"clip.{n} ü/x"),
        caption=f"caption {n} – ü",
        frames=n + 1,
        fps_numerator=30000,
        fps_denominator=1001,
        duration_seconds=n / 3,
        width=64 + n,
        height=32,
        seekable=n % 2 == 0,
        labels=json_labels({"colour": "red", "number": n}) if n != 2 else "",
    )
    for n in range(7)
]
MEDIA = [bytes([n]) * (300 * n + 1) for n in range(7)]


def write(folder: Path, clips: list[Clip] = CLIPS, shard_bytes: int = 2000) -> ClipIndex:
    with DatasetWriter(folder, kind="raw", description={"source": "test"}, shard_bytes=shard_bytes) as writer:
        for clip, media in zip(clips, MEDIA):
            writer.add(clip, media, extension="mp4")
        return writer.close()


def test_every_clip_comes_back(tmp_path: Path) -> None:
    index = write(tmp_path)
    assert len(index) == 7
    assert len(index.shards) > 2
    for row, (clip, media) in enumerate(zip(CLIPS, MEDIA)):
        found = index.clip(row)
        data = index.shards[found.shard].read_bytes()[found.offset : found.offset + found.size]
        assert data == media
        assert found.checksum == zlib.crc32(media)
        assert replace(found, shard=-1, offset=-1, size=-1, checksum=0) == clip
        assert index.text("caption", row) == clip.caption
    assert index.clip(3).label_values == {"colour": "red", "number": 3}
    assert index.clip(2).label_values == {}
    assert index.column("frames").tolist() == list(range(1, 8))


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    index = write(tmp_path)
    samples = list(webdataset.WebDataset([str(path) for path in index.shards], shardshuffle=False))
    assert [s["mp4"] for s in samples] == MEDIA
    assert [s["txt"].decode() for s in samples] == [clip.caption for clip in CLIPS]
    assert json.loads(samples[3]["json"]) == {"colour": "red", "number": 3}
    assert samples[0]["__key__"] == "000000_clip_0_x"


def test_the_same_clips_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    for path in first.shards:
        assert path.read_bytes() == (second.folder / path.name).read_bytes()
    assert (first.folder / INDEX_NAME).read_bytes() == (second.folder / INDEX_NAME).read_bytes()
    with tarfile.open(first.shards[0]) as tar:
        assert {member.mtime for member in tar} == {0}


def test_the_fingerprint_is_that_of_content_and_order(tmp_path: Path) -> None:
    plain = write(tmp_path / "a")
    assert write(tmp_path / "b", shard_bytes=10**6).fingerprint == plain.fingerprint
    recaptioned = [replace(CLIPS[0], caption="other"), *CLIPS[1:]]
    reordered = [CLIPS[1], CLIPS[0], *CLIPS[2:]]
    others = {write(tmp_path / "c", recaptioned).fingerprint, write(tmp_path / "d", reordered).fingerprint}
    assert len({plain.fingerprint, *others}) == 3


def test_an_unfinished_dataset_is_refused(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "out", kind="raw", description={})
    writer.add(CLIPS[0], MEDIA[0], extension="mp4")
    with pytest.raises(ValueError, match=r"data\.path=.*out is unfinished"):
        ClipIndex.open(tmp_path / "out")
    writer.abandon()
    assert not (tmp_path / "out").exists()


def test_missing_parts_are_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.*gone does not exist; make it with: muybridge prepare SRC"):
        ClipIndex.open(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"vae\.path=.* is no dataset \(it has no manifest\.json of ours\); make it"):
        ClipIndex.open(tmp_path, field="vae.path")
    write(tmp_path / "all" / "train")
    with pytest.raises(ValueError, match=r"did you mean .*all/train\?"):
        ClipIndex.open(tmp_path / "all")


def test_changed_shards_are_all_named(tmp_path: Path) -> None:
    index = write(tmp_path)
    index.shards[0].write_bytes(index.shards[0].read_bytes()[:-1])
    index.shards[1].unlink()
    with pytest.raises(ValueError, match=r"shard-000000\.tar has \d+ bytes, not \d+, shard-000001\.tar is missing"):
        ClipIndex.open(tmp_path)


def test_another_index_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a")
    other = write(tmp_path / "b", CLIPS[:3])
    (other.folder / INDEX_NAME).rename(tmp_path / "a" / INDEX_NAME)
    with pytest.raises(ValueError, match="does not belong"):
        ClipIndex.open(tmp_path / "a")


def test_only_our_own_files_are_removed(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    remove_dataset(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / MANIFEST_NAME).write_text('{"format": "something else"}')
    remove_dataset(tmp_path)
    assert read_manifest(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 2
