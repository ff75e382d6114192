"""Cached latents come back bit for bit, and never for another autoencoder, transform or dataset."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.data.config import Access, DataConfig, build_buckets
from muybridge.data.index import ClipIndex
from muybridge.data.latent_cache import LatentWriter, has_latents
from muybridge.data.loader import VideoLoader
from muybridge.data.media_bytes import DatasetChangedError

VIDEO = DataConfig(frames=9, fps=8.0, height=64, width=64)


def latents_of(row: int) -> torch.Tensor:
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(row))


def write(folder: Path, source: ClipIndex, dtype: torch.dtype = torch.float32) -> ClipIndex:
    with LatentWriter(folder, source, VIDEO, vae_fingerprint="vae-1", shard_bytes=2000) as writer:
        for row in range(len(source)):
            writer.add(row, latents_of(row).to(dtype))
        return writer.close()


def build(folder: Path, *, vae_fingerprint: str | None = "vae-1", **changes: Any) -> VideoLoader:
    config = DataConfig(
        **{
            "path": str(folder),
            "latents": str(folder.parent),
            "access": Access.latents,
            "caption_dropout": 0.0,
            **changes,
        }
    )
    return VideoLoader(
        config,
        buckets=build_buckets(config, global_batch=4, micro_batch=2, world_size=1),
        rank=0,
        world_size=1,
        seed=3,
        vae_fingerprint=vae_fingerprint,
    )


def test_latents_come_back_with_their_captions(dataset: ClipIndex, tmp_path: Path) -> None:
    cache = write(tmp_path / "latents", dataset)
    assert len(cache.shards) > 1
    loader = build(tmp_path / "latents")
    rows = []
    for micro_steps in islice(loader.steps(0), 6):
        assert len(micro_steps) == 2
        for batch in micro_steps:
            assert batch.frames is None
            assert batch.latents is not None
            assert batch.latents.dtype == torch.float32
            for row, caption, latents in zip(batch.rows.tolist(), batch.captions, batch.latents):
                assert torch.equal(latents, latents_of(row))
                assert caption == dataset.text("caption", row)
                rows.append(row)
    assert {rows.count(row) for row in range(11)} == {2, 3}  # 24 places: two passes and two more
    assert cache.clip(3).label_values == dataset.clip(3).label_values


def test_a_batch_of_ghosts_has_the_shape_of_the_others(dataset: ClipIndex, tmp_path: Path) -> None:
    write(tmp_path / "latents", dataset)
    loader = build(tmp_path / "latents")
    *_, last = loader.each_once(5)  # in batches of two
    assert last.latents is not None
    assert (last.weights.tolist(), last.latents.shape) == ([1.0, 0.0], (2, 4, 3, 2, 2))
    assert not last.latents[1].any()
    config = DataConfig(path=str(tmp_path / "latents"), latents="x", access=Access.latents)
    other = VideoLoader(
        config, buckets=build_buckets(config, global_batch=1, micro_batch=2, world_size=2), rank=1, world_size=2, seed=0
    )
    [ghosts] = next(other.steps(0))
    assert ghosts.weights.tolist() == [0.0, 0.0]
    assert torch.equal(ghosts.latents, torch.zeros(2, 4, 3, 2, 2))


def test_half_precision_latents_are_read_as_float32(dataset: ClipIndex, tmp_path: Path) -> None:
    write(tmp_path / "latents", dataset, torch.float16)
    batch = next(build(tmp_path / "latents").every_row(11))
    assert batch.latents is not None
    assert torch.equal(batch.latents, torch.stack([latents_of(row).half().float() for row in range(11)]))


def test_videos_and_their_latents_are_drawn_in_the_same_order(dataset: ClipIndex, tmp_path: Path) -> None:
    write(tmp_path / "latents", dataset)
    from_latents = build(tmp_path / "latents").steps(5)
    from_videos = build(dataset.folder, access=Access.raw, workers=0, vae_fingerprint=None).steps(5)
    for _ in range(3):
        for latents, videos in zip(next(from_latents), next(from_videos)):
            assert torch.equal(latents.rows, videos.rows)
            assert latents.keys == videos.keys


def test_stale_latents_are_refused(dataset: ClipIndex, tmp_path: Path) -> None:
    write(tmp_path / "latents", dataset)
    build(tmp_path / "latents", vae_fingerprint=None)
    with pytest.raises(
        ValueError, match=r"is stale: its vae_fingerprint is vae-1, not vae-2; make it again with: muybridge encode"
    ):
        build(tmp_path / "latents", vae_fingerprint="vae-2")
    with pytest.raises(ValueError, match=r"is stale: its transform is .*9x64x64.*, not .*9x32x64"):
        build(tmp_path / "latents", height=32)
    with pytest.raises(ValueError, match=r"holds latents; set data\.access=latents"):
        build(tmp_path / "latents", access=Access.raw)


def test_a_cache_of_chosen_clips_is_for_the_same_filter(dataset: ClipIndex, tmp_path: Path) -> None:
    chosen = replace(VIDEO, filter="size > 0 and width > 1")
    with LatentWriter(tmp_path / "latents", dataset, chosen, vae_fingerprint="vae-1") as writer:
        for row in (1, 4):
            writer.add(row, latents_of(row))
        writer.close()
    loader = build(tmp_path / "latents", filter=chosen.filter)
    assert [key for batch in loader.every_row(2) for key in batch.keys] == ["000001_clip", "000004_clip"]
    with pytest.raises(ValueError, match=r"is stale: its filter is size > 0 and width > 1, not None"):
        build(tmp_path / "latents")
    assert has_latents(tmp_path / "latents", dataset, chosen, vae_fingerprint="vae-1")
    assert not has_latents(tmp_path / "latents", dataset, VIDEO, vae_fingerprint="vae-1")


def test_a_finished_cache_is_recognised(dataset: ClipIndex, tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    assert not has_latents(folder, dataset, VIDEO, vae_fingerprint="vae-1")
    with LatentWriter(folder, dataset, VIDEO, vae_fingerprint="vae-1") as writer:
        writer.add(0, latents_of(0))  # and no close, as if interrupted
    assert not has_latents(folder, dataset, VIDEO, vae_fingerprint="vae-1")
    with pytest.raises(ValueError, match="is unfinished; make it with: muybridge encode"):
        build(folder)
    write(folder, dataset)  # what an interrupted writer left is replaced
    assert has_latents(folder, dataset, VIDEO, vae_fingerprint="vae-1")
    assert not has_latents(folder, dataset, VIDEO, vae_fingerprint="vae-2")
    assert not has_latents(folder, dataset, DataConfig(frames=5), vae_fingerprint="vae-1")


def test_a_video_dataset_is_not_overwritten(dataset: ClipIndex) -> None:
    with pytest.raises(ValueError, match="is not empty and holds no latents"):
        LatentWriter(dataset.folder, dataset, VIDEO, vae_fingerprint="vae-1")
    ClipIndex.open(dataset.folder)


def test_missing_latents_are_named_with_a_remedy(dataset: ClipIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone does not exist; make it with: muybridge encode"):
        build(tmp_path / "gone")


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
