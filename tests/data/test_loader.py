"""The loader gives the same samples however the work is split, wherever it starts, whatever breaks on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muybridge.data.batch import VideoBatch
from muybridge.data.config import Access, DataConfig, build_buckets
from muybridge.data.decode import Decoder, has_decoder
from muybridge.data.index import ClipIndex
from muybridge.data.loader import VideoLoader
from muybridge.data.media_bytes import DatasetChangedError
from muybridge.data.pixels import to_frames
from muybridge.data.shards import DatasetWriter
from muybridge.data.storage import read_range
from muybridge.data.synthetic import draw_clip, render_clip

GLOBAL_BATCH = 4


def settings(index: ClipIndex, **changes: Any) -> DataConfig:
    return DataConfig(**{"path": str(index.folder), "frames": 5, "workers": 0, "caption_dropout": 0.3, **changes})


def build(
    config: DataConfig, *, rank: int = 0, world_size: int = 1, micro_batch: int = GLOBAL_BATCH, seed: int = 3
) -> VideoLoader:
    buckets = build_buckets(config, global_batch=GLOBAL_BATCH, micro_batch=micro_batch, world_size=world_size)
    return VideoLoader(config, buckets=buckets, rank=rank, world_size=world_size, seed=seed)


def steps(config: DataConfig, start: int, count: int, **split: Any) -> list[list[VideoBatch]]:
    loader = build(config, **split)
    try:
        return list(islice(loader.steps(start), count))
    finally:
        loader.close()


def assert_same(found: list[VideoBatch], expected: list[VideoBatch]) -> None:
    """The same samples in the same order, however they are cut into batches."""
    for field in ("slots", "rows", "frames"):
        assert torch.equal(*(torch.cat([getattr(b, field) for b in side]) for side in (found, expected)))
    for field in ("keys", "captions"):
        assert [x for b in found for x in getattr(b, field)] == [x for b in expected for x in getattr(b, field)]


def test_pixels_are_those_of_the_rendered_clip(dataset: ClipIndex) -> None:
    [[batch]] = steps(settings(dataset, frames=9, caption_dropout=0.0), 0, 1)
    assert batch.pixels.shape == (4, 3, 9, 64, 64)
    assert batch.pixels.dtype == torch.float32
    assert batch.latents is None
    frames = to_frames(batch.pixels)
    for place, row in enumerate(batch.rows.tolist()):
        clip = draw_clip(0, "train", row)
        assert batch.captions[place] == clip.caption
        error = np.square(frames[place].astype(float) - render_clip(clip)).mean()
        assert error < 255**2 / 10**2.8  # 28 dB, what 4:2:0 chroma leaves of such sharp edges


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_samples_do_not_depend_on_the_split(dataset: ClipIndex, world_size: int, micro_batch: int) -> None:
    config = settings(dataset)
    whole = steps(config, 2, 2)
    ranks = [steps(config, 2, 2, rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
    for number in range(2):
        assert {batch.step for rank in ranks for batch in rank[number]} == {2 + number}
        micro_steps = [rank[number][m] for m in range(len(ranks[0][number])) for rank in ranks]
        assert_same(micro_steps, whole[number])


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 3), (3, 1), (2, 3), (5, 1)])
def test_ghosts_fill_up_where_the_split_does_not_come_out(
    dataset: ClipIndex, world_size: int, micro_batch: int
) -> None:
    [whole] = steps(settings(dataset), 2, 1)
    ranks = [
        steps(settings(dataset), 2, 1, rank=r, world_size=world_size, micro_batch=micro_batch)[0]
        for r in range(world_size)
    ]
    (accumulation,) = {len(batches) for batches in ranks}
    in_order = [batches[m] for m in range(accumulation) for batches in ranks]
    assert {len(batch) for batch in in_order} == {micro_batch}
    weights = torch.cat([batch.weights for batch in in_order])
    assert weights.dtype == torch.float32
    assert weights.tolist() == [1.0] * GLOBAL_BATCH + [0.0] * (len(weights) - GLOBAL_BATCH)
    frames, rows = (torch.cat([getattr(batch, name) for batch in in_order]) for name in ("frames", "rows"))
    assert torch.equal(frames[:GLOBAL_BATCH], whole[0].frames)
    assert torch.equal(rows[:GLOBAL_BATCH], whole[0].rows)
    assert not frames[GLOBAL_BATCH:].any()
    assert set(rows[GLOBAL_BATCH:].tolist()) == {-1}
    assert [text for batch in in_order for text in batch.captions][GLOBAL_BATCH:] == [""] * len(rows[GLOBAL_BATCH:])


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("clips", [5, 100])
def test_validation_has_each_clip_once(dataset: ClipIndex, world_size: int, micro_batch: int, clips: int) -> None:
    def found(world_size: int, micro_batch: int) -> list[tuple[int, int, str]]:
        loaders = [
            build(settings(dataset), rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)
        ]
        batches = [list(loader.each_once(clips)) for loader in loaders]
        assert len({len(mine) for mine in batches}) == 1
        return sorted(
            (slot, row, caption)
            for mine in batches
            for batch in mine
            for slot, row, caption, weight in zip(
                batch.slots.tolist(), batch.rows.tolist(), batch.captions, batch.weights.tolist()
            )
            if weight
        )

    once = found(world_size, micro_batch)
    assert once == found(1, 11)
    rows = [row for _, row, _ in once]
    assert len(set(rows)) == len(rows) == min(clips, 11)
    assert [caption for *_, caption in once] == [dataset.text("caption", row) for row in rows]


def test_any_step_can_be_the_first(dataset: ClipIndex) -> None:
    config = settings(dataset)
    run = steps(config, 0, 7)  # more than two passes over eleven clips
    for start in (1, 3, 6):
        for found, expected in zip(steps(config, start, 7 - start), run[start:]):
            assert_same(found, expected)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_processes_and_prefetch_change_nothing(dataset: ClipIndex, prefetch: int) -> None:
    expected = steps(settings(dataset), 4, 3)
    for found, same in zip(steps(settings(dataset, workers=2, prefetch=prefetch), 4, 3), expected):
        assert_same(found, same)


def test_each_pass_draws_its_own_excerpt(dataset: ClipIndex) -> None:
    batches = [batch for [batch] in steps(settings(dataset, frames=5, caption_dropout=0.0), 0, 11)]  # four passes
    excerpts: dict[int, set[bytes]] = {}
    for batch in batches:
        for row, pixels in zip(batch.rows.tolist(), batch.pixels):
            excerpts.setdefault(row, set()).add(pixels.numpy().tobytes())
    assert sorted(excerpts) == list(range(11))
    assert sum(len(found) for found in excerpts.values()) > 25  # of 44; five of nine frames leave five places to start


def test_captions_are_dropped_by_key(dataset: ClipIndex) -> None:
    captions = [caption for [batch] in steps(settings(dataset), 0, 50) for caption in batch.captions]
    assert 0.2 < captions.count("") / len(captions) < 0.4
    assert all(c for [batch] in steps(settings(dataset, caption_dropout=0.0), 0, 5) for c in batch.captions)
    assert not any(c for [batch] in steps(settings(dataset, caption_dropout=1.0), 0, 5) for c in batch.captions)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_comes_once_in_order(dataset: ClipIndex, workers: int) -> None:
    loader = build(settings(dataset, workers=workers))
    batches = list(loader.every_row(4))
    loader.close()
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert torch.cat([batch.rows for batch in batches]).tolist() == list(range(11))
    assert [c for batch in batches for c in batch.captions] == [dataset.text("caption", row) for row in range(11)]


@pytest.fixture
def damaged(dataset: ClipIndex, tmp_path: Path) -> Callable[[list[int]], ClipIndex]:
    """Makes a copy of the dataset in which some rows were damaged before anyone took their checksum."""

    def damage(rows: list[int]) -> ClipIndex:
        with DatasetWriter(tmp_path / "damaged", kind="raw", description={}, shard_bytes=10_000) as writer:
            for row, clip in enumerate(map(dataset.clip, range(len(dataset)))):
                media = read_range(dataset.shard_names[clip.shard], clip.offset, clip.size)
                writer.add(clip, media[:64] if row in rows else media, extension="mp4")
            return writer.close()

    return damage


def test_unreadable_clips_are_replaced_the_same_way_every_time(
    dataset: ClipIndex, damaged: Callable[[list[int]], ClipIndex], caplog: pytest.LogCaptureFixture
) -> None:
    index = damaged([2, 7])
    config = settings(index)
    loader = build(config)
    run = list(islice(loader.steps(0), 6))
    ledger = {clip.row: clip for clip in loader.ledger.clips()}
    assert sorted(ledger) == [2, 7]
    assert ledger[2].key == "000002_clip"
    assert ledger[2].times >= 2  # once a pass, in two passes
    assert "cannot read clip 000002_clip: " in caplog.text
    whole = steps(settings(dataset), 0, 6)
    for [found], [undamaged] in zip(run, whole):
        bad = torch.isin(undamaged.rows, torch.tensor([2, 7]))
        assert torch.equal(found.rows[~bad], undamaged.rows[~bad])
        assert not torch.isin(found.rows, torch.tensor([2, 7])).any()
        assert torch.equal(found.slots, undamaged.slots)
    for start in (0, 3):  # the same substitutes after a resume, and from processes
        for again, before in zip(steps(settings(index, workers=2), start, 2), run[start : start + 2]):
            assert_same(again, before)
    assert [row for batch in loader.every_row(4) for row in batch.rows.tolist()] == [0, 1, 3, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("workers", [0, 1])
def test_where_no_clip_can_be_read_a_ghost_stands(damaged: Callable[[list[int]], ClipIndex], workers: int) -> None:
    index = damaged(list(range(11)))
    loader = build(settings(index, workers=workers))
    [[batch]] = islice(loader.steps(0), 1)
    loader.close()
    assert batch.weights.tolist() == [0.0] * GLOBAL_BATCH
    assert batch.rows.tolist() == [-1] * GLOBAL_BATCH
    assert loader.ledger.take_replaced() == GLOBAL_BATCH


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", ["a flipped byte", "cut", "gone"])
def test_a_dataset_that_changes_under_the_run_ends_it(
    dataset: ClipIndex, tmp_path: Path, workers: int, change: str
) -> None:
    shutil.copytree(dataset.folder, tmp_path / "copy")
    index = ClipIndex.open(tmp_path / "copy")
    loader = build(settings(index, workers=workers))
    clip = index.clip(10)
    shard = index.shards[clip.shard]
    data = bytearray(shard.read_bytes())
    if change == "a flipped byte":
        data[clip.offset + clip.size // 2] ^= 1
        shard.write_bytes(data)
    elif change == "cut":
        shard.write_bytes(data[: clip.offset + 5])
    else:
        shard.unlink()
    reason = {"a flipped byte": "the checksum of its", "cut": "ends at byte", "gone": "No such file"}[change]
    with pytest.raises(DatasetChangedError, match=rf"dataset changed under the run: {shard}, clip .*{reason}"):
        list(islice(loader.steps(0), 3))
    with pytest.raises(DatasetChangedError, match="dataset changed under the run"):
        list(loader.every_row(4))
    loader.close()
    assert loader.counts()["bad_clips"] == 0


def test_clips_that_are_too_short_are_left_out_at_the_start(
    dataset: ClipIndex, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    durations = dataset.column("duration_seconds").copy()
    durations[4] = 0.5
    real = ClipIndex.column
    monkeypatch.setattr(
        ClipIndex, "column", lambda self, name: durations if name == "duration_seconds" else real(self, name)
    )
    loader = build(settings(dataset))
    assert len(loader) == 10
    assert loader.counts()["excluded_rows"] == 1
    assert "1 of 11 clips are left out; 1 too short for 5 frames at 8 fps: 000004_clip (0.50 s)" in caplog.text
    assert 4 not in {row for [batch] in islice(loader.steps(0), 5) for row in batch.rows.tolist()}


def test_a_filter_leaves_rows_out(dataset: ClipIndex, caplog: pytest.LogCaptureFixture) -> None:
    sizes = np.sort(dataset.column("size"))
    expression = f"size >= {sizes[2]} and size <= {sizes[8]}"
    loader = build(settings(dataset, filter=expression))
    taken = [row for row in range(11) if sizes[2] <= dataset.clip(row).size <= sizes[8]]
    assert len(loader) == len(taken) < 11
    assert f"clips are left out; {11 - len(taken)} not in data.filter='size >= " in caplog.text
    assert {row for [batch] in islice(loader.steps(0), 4) for row in batch.rows.tolist()} == set(taken)
    assert [row for batch in loader.every_row(4) for row in batch.rows.tolist()] == taken
    with pytest.raises(ValueError, match=r"none of its 11 clips fits; 11 not in data.filter='size < 0': 000000_clip"):
        build(settings(dataset, filter="size < 0"))
    with pytest.raises(ValueError, match=r"data.filter='sise < 0': there is no column sise; did you mean size"):
        build(settings(dataset, filter="sise < 0"))
    with pytest.raises(
        ValueError, match=r"data.filter='luma < 9': luma was not measured for 11 of 11 clips of .*train"
    ):
        build(settings(dataset, filter="luma < 9"))


def test_a_dataset_of_which_little_fits_is_refused_unless_that_is_allowed(
    dataset: ClipIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    heights = dataset.column("height").copy()
    heights[:4] *= 3
    heights[4:7] //= 2
    real = ClipIndex.column
    monkeypatch.setattr(ClipIndex, "column", lambda self, name: heights if name == "height" else real(self, name))
    with pytest.raises(
        ValueError,
        match=r"7 of its 11 clips fit no bucket, a larger share than data\.max_misfit_share=0\.5; "
        r"3 too small for 5x64x64 \(data\.max_upscale=1\.25\): .*; 4 of another aspect ratio",
    ):
        build(settings(dataset))
    assert len(build(settings(dataset, max_misfit_share=0.7))) == 4


def test_a_dataset_without_a_clip_that_fits_is_refused(dataset: ClipIndex) -> None:
    build(settings(dataset, frames=9))  # nine frames are exactly what there is
    with pytest.raises(ValueError, match=r"none of its 11 clips fits; 11 too short for 13 .*: 000000_clip \(1\.12 s\)"):
        build(settings(dataset, frames=13))
    with pytest.raises(ValueError, match="none of its 11 clips fits"):
        build(settings(dataset, frames=9, fps=7.0))


def test_mistakes_are_refused_at_the_start(dataset: ClipIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=.*gone does not exist; make it with: muybridge prepare"):
        build(settings(dataset, path=str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="holds raw clips; encode them first: muybridge encode"):
        build(settings(dataset, access=Access.latents, latents="x"))
    with pytest.raises(ValueError, match=r"data\.frames=8 must be 1 \+ a multiple of 4"):
        build(settings(dataset, frames=8))
    with pytest.raises(ValueError, match=r"data\.latents must name a folder"):
        build(settings(dataset, access=Access.latents))


def test_the_fingerprint_changes_with_what_changes_the_samples(dataset: ClipIndex) -> None:
    plain = build(settings(dataset)).fingerprint
    for same in (settings(dataset, workers=1, prefetch=5), settings(dataset, decoder=Decoder.pyav)):
        assert build(same).fingerprint == plain
    assert build(settings(dataset), micro_batch=1, world_size=2).fingerprint == plain
    changes: list[dict[str, Any]] = [
        {"frames": 1},
        {"fps": 4.0},
        {"height": 32},
        {"caption_dropout": 0.0},
        {"filter": "width > 1"},
    ]
    others = [build(settings(dataset, **change)).fingerprint for change in changes]
    assert len({plain, *others, build(settings(dataset), seed=4).fingerprint}) == 7


@pytest.mark.skipif(not has_decoder(Decoder.pyav), reason="PyAV is not installed")
def test_either_decoder_gives_the_same_batches(dataset: ClipIndex) -> None:
    for found, expected in zip(steps(settings(dataset, decoder=Decoder.pyav), 0, 2), steps(settings(dataset), 0, 2)):
        assert_same(found, expected)


def test_a_batch_moves_its_tensors(dataset: ClipIndex) -> None:
    [[batch]] = steps(settings(dataset), 0, 1)
    moved = batch.to("meta")
    assert moved.pixels.device.type == "meta"
    assert moved.rows.device.type == "cpu"
    assert moved.captions == batch.captions
