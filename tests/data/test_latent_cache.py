"""Cached latents come back bit for bit, and never for another autoencoder, text encoder, transform or dataset."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muybridge.data.buckets import Bucket
from muybridge.data.config import Access, DataConfig, build_buckets
from muybridge.data.decode import DecodeError
from muybridge.data.draws import MIDDLE
from muybridge.data.index import Clip, ClipIndex
from muybridge.data.latent_cache import CacheOrigin, LatentBucket, LatentCache, cache_description, check_cache
from muybridge.data.latent_writer import EncodedClip, LatentWriter
from muybridge.data.loader import VideoLoader
from muybridge.data.media_bytes import DatasetChangedError
from muybridge.data.row_filter import select_rows
from muybridge.data.shards import DatasetWriter
from muybridge.data.urls import EXTRAS

VIDEO = DataConfig(frames=9, fps=8.0, height=64, width=64)
BUCKET = Bucket(9, 64, 64, global_batch=1, micro_batch=1)
SHAPE = (4, 3, 2, 2)
DIM = 6
CACHED = CacheOrigin(vae_fingerprint="vae-1")
WITH_TEXT = CacheOrigin(vae_fingerprint="vae-1", text_fingerprint="text-1")


def latents_of(row: int) -> torch.Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(row))


def text_of(caption: str) -> torch.Tensor:
    """What a text encoder might make of a caption: a row for each of its words, and one at the end."""
    rows = len(caption.split()) + 1
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(len(caption))).bfloat16()


def write(
    folder: Path,
    source: ClipIndex,
    *,
    config: DataConfig = VIDEO,
    has_text: bool = False,
    broken: tuple[int, ...] = (),
) -> ClipIndex:
    buckets = np.full(len(source), -1, dtype=np.int16)
    buckets[select_rows(source, config.filter or "")] = 0
    about = cache_description(source, config, vae_fingerprint="vae-1", text_fingerprint="text-1" if has_text else None)
    writer = LatentWriter(
        folder, source, about, bucket_table=[LatentBucket("9x64x64", SHAPE)], bucket_of_row=buckets, shard_bytes=400
    )
    if has_text:
        writer.write_empty_text(text_of(""))
    for shard in writer.missing_shards():
        clips = []
        for row in writer.rows(shard).tolist():
            text = [text_of(caption) for caption in source.captions(row)] if has_text else []
            fine = EncodedClip(row, latents_of(row), text)
            clips.append(EncodedClip(row, None, reason="it is a cake") if row in broken else fine)
        writer.write_shard(shard, clips)
    index = writer.close()
    assert index is not None
    return index


def settings(folder: Path, **changes: Any) -> DataConfig:
    own = {"path": str(folder), "latents": str(folder.parent), "access": Access.latents, "caption_dropout": 0.0}
    return DataConfig(**{**own, **changes})


def build(folder: Path, *, origin: CacheOrigin = CACHED, **changes: Any) -> VideoLoader:
    config = settings(folder, **changes)
    return build_for(config, origin=origin)


def build_for(
    config: DataConfig, *, origin: CacheOrigin = CACHED, global_batch: int = 4, rank: int = 0, world_size: int = 1
) -> VideoLoader:
    buckets = build_buckets(config, global_batch=global_batch, micro_batch=2, world_size=world_size)
    return VideoLoader(config, buckets=buckets, rank=rank, world_size=world_size, seed=3, **vars(origin))


def test_latents_come_back_rounded_to_bfloat16_with_their_captions(dataset: ClipIndex, tmp_path: Path) -> None:
    cache = write(tmp_path / "latents", dataset)
    assert len(cache.shards) > 1
    loader = build(tmp_path / "latents")
    rows = []
    for micro_steps in islice(loader.steps(0), 6):
        assert len(micro_steps) == 2
        for batch in micro_steps:
            assert batch.frames is None
            assert batch.text is None
            assert batch.latents is not None
            for row, caption, latents in zip(batch.rows.tolist(), batch.captions, batch.latents):
                assert torch.equal(latents, latents_of(row).bfloat16())
                assert caption == dataset.text("caption", row)
                rows.append(row)
    assert {rows.count(row) for row in range(11)} == {2, 3}  # 24 places: two passes and two more
    assert cache.clip(3).label_values == dataset.clip(3).label_values


def test_each_caption_comes_with_its_own_features(dataset: ClipIndex, tmp_path: Path) -> None:
    write(tmp_path / "latents", dataset, has_text=True)
    loader = build(tmp_path / "latents", origin=WITH_TEXT, caption_dropout=0.5)
    seen = set()
    for batch in (batch for micro_steps in islice(loader.steps(0), 12) for batch in micro_steps):
        assert batch.text is not None
        for caption, features in zip(batch.captions, batch.text, strict=True):
            assert torch.equal(features, text_of(caption))
            seen.add(caption)
    assert "" in seen  # a dropped caption has the features of the empty one
    assert len(seen) > 8
    assert build(tmp_path / "latents").each_once(1) is not None  # and a run that needs no features reads none


def test_of_several_captions_the_one_that_is_drawn_has_its_features(tmp_path: Path) -> None:
    captions = ["short", "a longer one", "the longest of them all"]
    with DatasetWriter(tmp_path / "clips", kind="raw", description={"source": "test"}) as clips:
        for number in range(6):
            clip = Clip(
                f"{number}", captions[0], 99, 8, 1, 9.0, 64, 64, seekable=True, caption_choices=json.dumps(captions)
            )
            clips.add(clip, b"video", extension="mp4")
        source = clips.close()
    write(tmp_path / "latents", source, has_text=True)
    loader = build(tmp_path / "latents", origin=WITH_TEXT)
    seen = set()
    for batch in (batch for micro_steps in islice(loader.steps(0), 8) for batch in micro_steps):
        for caption, features in zip(batch.captions, batch.text, strict=True):
            assert torch.equal(features, text_of(caption))
            seen.add(caption)
    assert seen == set(captions)


def test_a_batch_of_ghosts_has_the_shape_of_the_others(dataset: ClipIndex, tmp_path: Path) -> None:
    write(tmp_path / "latents", dataset, has_text=True)
    loader = build(tmp_path / "latents", origin=WITH_TEXT)
    *_, last = loader.each_once(5)  # in batches of two
    assert last.latents is not None
    assert last.text is not None
    assert (last.weights.tolist(), last.latents.shape) == ([1.0, 0.0], (2, *SHAPE))
    assert not last.latents[1].any()
    assert torch.equal(last.text[1], text_of(""))
    other = build_for(settings(tmp_path / "latents"), global_batch=1, rank=1, world_size=2)
    [ghosts] = next(other.steps(0))
    assert ghosts.weights.tolist() == [0.0, 0.0]
    assert torch.equal(ghosts.latents, torch.zeros(2, *SHAPE, dtype=torch.bfloat16))


def test_videos_and_their_latents_are_drawn_in_the_same_order(dataset: ClipIndex, tmp_path: Path) -> None:
    """Also where a filter leaves clips out, even one on the size of the videos, which the latents do not have."""
    chosen = replace(VIDEO, filter=f"size > {int(np.median(dataset.column('size')))}")
    for name, config in (("all", VIDEO), ("some", chosen)):
        write(tmp_path / name, dataset, config=config)
        from_latents = build(tmp_path / name, filter=config.filter, caption_dropout=0.3)
        from_videos = build(dataset.folder, access=Access.raw, workers=0, filter=config.filter, caption_dropout=0.3)
        assert len(from_latents) == len(from_videos) == {"all": 11, "some": 5}[name]
        for latents, videos in islice(zip(from_latents.steps(5), from_videos.steps(5)), 3):
            for ours, theirs in zip(latents, videos, strict=True):
                assert torch.equal(ours.rows, theirs.rows)
                assert ours.keys == theirs.keys
                assert ours.captions == theirs.captions


def test_a_clip_that_could_not_be_encoded_is_unreadable_for_the_same_reason(
    dataset: ClipIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = write(tmp_path / "latents", dataset, broken=(4,))
    with pytest.raises(DecodeError, match="it is a cake"):
        LatentCache(index, reads_text=False).read(4, BUCKET, MIDDLE)
    loader = build(tmp_path / "latents")
    batches = [batch for micro_steps in islice(loader.steps(0), 6) for batch in micro_steps]
    assert all((batch.weights == 1).all() for batch in batches)
    assert 4 not in torch.cat([batch.rows for batch in batches]).tolist()
    assert "000004_clip: it is a cake" in caplog.text


def test_stale_latents_are_refused(dataset: ClipIndex, tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    index = write(folder, dataset)

    def check(origin: CacheOrigin, **changes: Any) -> None:
        check_cache(index, settings(folder, **changes), "", origin)

    check(CacheOrigin("vae-1", videos={"": str(dataset.folder)}))
    check(CacheOrigin("vae-1", videos={"": "gone"}))
    words = r"is stale: its vae_fingerprint is vae-1, not vae-2; make it again with: muybridge encode --overwrite"
    with pytest.raises(ValueError, match=words):
        check(CacheOrigin("vae-2"))
    words = rf"its source_fingerprint is {dataset.fingerprint}, not {index.fingerprint}, its text_fingerprint is None, not umt5"
    with pytest.raises(ValueError, match=words):
        check(CacheOrigin("vae-1", "umt5", {"": str(folder)}))  # a dataset, but not that of the videos
    words = r"its transform\.buckets is \['9x64x64'\], not \['9x32x64'\], its transform\.fps is 8\.0, not 4\.0, its filter is None"
    with pytest.raises(ValueError, match=words):
        check(CacheOrigin(), height=32, fps=4.0, filter="size > 0")
    with pytest.raises(ValueError, match=r"holds latents; set data\.access=latents"):
        build(folder, access=Access.raw)


def test_a_cache_of_the_first_format_is_refused_with_the_remedy(dataset: ClipIndex, tmp_path: Path) -> None:
    write(tmp_path / "latents", dataset)
    path = tmp_path / "latents" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("cache_format", "text_fingerprint"):
        del manifest["description"][name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"its cache_format is 1, not 2; make it again with: muybridge encode --over"):
        build(tmp_path / "latents")


def test_missing_and_unfinished_latents_are_named_with_a_remedy(dataset: ClipIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone does not exist; make it with: muybridge encode"):
        build(tmp_path / "gone")
    about = cache_description(dataset, VIDEO, vae_fingerprint="vae-1", text_fingerprint=None)
    table = [LatentBucket("9x64x64", SHAPE)]
    LatentWriter(tmp_path / "begun", dataset, about, bucket_table=table, bucket_of_row=np.zeros(11, dtype=np.int16))
    with pytest.raises(ValueError, match="is unfinished; make it with: muybridge encode"):
        build(tmp_path / "begun")


def test_damaged_latents_end_the_run(dataset: ClipIndex, tmp_path: Path) -> None:
    cache = write(tmp_path / "latents", dataset)
    clip = cache.clip(6)
    with cache.shards[clip.shard].open("r+b") as file:
        file.seek(clip.offset + clip.size - 8)
        file.write(b"\xff" * 8)
    loader = build(tmp_path / "latents")
    shard = str(cache.shards[clip.shard])
    with pytest.raises(
        DatasetChangedError, match=f"changed under the run: {re.escape(shard)}, clip 000006_clip: the checksum"
    ):
        list(islice(loader.steps(0), 6))


def test_damaged_features_of_the_empty_caption_end_the_run(dataset: ClipIndex, tmp_path: Path) -> None:
    write(tmp_path / "latents", dataset, has_text=True)
    [path] = (tmp_path / "latents").glob("empty-text-*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DatasetChangedError, match="clip of the empty caption: the checksum"):
        build(tmp_path / "latents", origin=WITH_TEXT)


def test_remote_shards_are_read_by_range(dataset: ClipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is what reads remote shards here")
    monkeypatch.setitem(EXTRAS, "memory", "fsspec")
    index = write(tmp_path / "latents", dataset, has_text=True)
    path = tmp_path / "latents" / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard, local in zip(manifest["shards"], index.shards, strict=True):
        fsspec.filesystem("memory").pipe_file(f"/latents/{shard['name']}", local.read_bytes())
        local.unlink()
        shard["name"] = f"memory://latents/{shard['name']}"
    path.write_text(json.dumps(manifest))
    loader = build(tmp_path / "latents", origin=WITH_TEXT)
    for batch in loader.every_row(4):
        for row, caption, latents, text in zip(batch.rows.tolist(), batch.captions, batch.latents, batch.text):
            assert torch.equal(latents, latents_of(row).bfloat16())
            assert torch.equal(text, text_of(caption))


def test_more_shards_than_can_be_mapped_at_a_time(
    dataset: ClipIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muybridge.data.latent_cache._MAPPED_SHARDS", 1)
    index = write(tmp_path / "latents", dataset)
    cache = LatentCache(index, reads_text=False)
    clips = [cache.read(row, BUCKET, MIDDLE) for row in range(11)]  # kept while others take their maps' places
    for row, clip in enumerate(clips):
        assert np.array_equal(clip.latents, latents_of(row).bfloat16().view(torch.int16).numpy())
