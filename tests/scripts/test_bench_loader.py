"""`muybridge bench loader` on a few small clips: what it reports, and that its contestants read the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from muybridge.data.decode import Decoder
from muybridge.scripts import bench_loader, cli
from muybridge.scripts import bench_loader_contestants as contestants
from muybridge.scripts.bench_loader_contestants import BATCH, FIRST_BATCHES, WORK_NAME, Material

MATERIAL = Material(
    clips=9,
    frames=13,
    height=48,
    width=80,
    fps=24.0,
    clip_frames=5,
    clip_height=32,
    clip_width=64,
    clip_fps=16.0,
    latents={"latents": [16, 2, 4, 8]},
    cache_bytes=2**20,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The material of a small benchmark."""
    folder = tmp_path_factory.mktemp("bench")
    contestants.write_material(folder, MATERIAL, lambda: None)
    contestants.write_work(folder, MATERIAL, 3)
    return folder


@pytest.mark.parametrize("decoder", [Decoder.decord, Decoder.pyav])
def test_the_bare_loop_reads_the_frames_of_the_loader(folder: Path, decoder: Decoder) -> None:
    from muybridge.data.index import ClipIndex
    from muybridge.data.loader import VideoLoader

    pytest.importorskip({Decoder.decord: "decord", Decoder.pyav: "av"}[decoder])
    loader = VideoLoader(MATERIAL.config(folder, decoder), buckets=[MATERIAL.bucket()], rank=0, world_size=1, seed=0)
    steps = loader.steps(0)
    batches = [next(steps)[0] for _ in range(3)]
    loader.close()
    frames = np.concatenate([batch.frames.numpy() for batch in batches if batch.frames is not None])
    work = json.loads((folder / WORK_NAME).read_text())
    assert [row for row, *_ in work] == [row for batch in batches for row in batch.rows.tolist()]
    index = ClipIndex.open(folder / "videos")
    for (row, *place), theirs in zip(work, frames, strict=True):
        clip = index.clip(row)
        data = index.shards[clip.shard].read_bytes()[clip.offset : clip.offset + clip.size]
        assert (contestants._decoded(data, MATERIAL, decoder, *place) == theirs).all()


def test_every_contestant_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bare", "webdataset", "ours"):
        contestants.main([str(folder), name, "pyav", str(FIRST_BATCHES + 1)])
    capsys.readouterr()
    for name in ("webdataset_cached", "ours_cached"):
        contestants.main([str(folder), name, "latents"])
        assert float(capsys.readouterr().out) > 0


def test_a_cache_has_clips_for_one_pass(folder: Path) -> None:
    from muybridge.data.index import ClipIndex

    assert len(ClipIndex.open(folder / "latents")) == BATCH * MATERIAL.cached_batches("latents") == 24


def test_ratios_of_pairs_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_loader, "CACHES", MATERIAL.latents)
    out = tmp_path / "figures" / "loader.json"
    sizes = ["--clips", "8", "--frames", "13", "--height", "40", "--width", "64", "--cache-megabytes", "1"]
    assert (
        cli.main(
            ["bench", "loader", "--pairs", "1", "--batches", "1", *sizes, "--decoders", "pyav", "--json", str(out)]
        )
        == 0
    )
    figures = json.loads(out.read_text())
    assert (figures["pairs"], figures["batches"], figures["training_clips"]) == (1, 1, "5x32x48 at 16 frames/s")
    [live], [cached] = figures["live"].values(), figures["cached"].values()
    assert set(live["cpu_seconds_per_clip"]) == {"bare", "webdataset", "ours"}
    assert len(live["ours_to_bare_of_each_pair"]) == 1
    assert set(cached["cpu_seconds_per_clip"]) == {"webdataset", "ours"}
    assert cached["ours_to_webdataset_time"] > 0
    assert capsys.readouterr().out.count("; the goal, at ") == 2
