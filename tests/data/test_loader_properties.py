"""What the loader promises when clips cannot be read, runs are killed, and settings change; no video is decoded here."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muybridge.data.batch import VideoBatch
from muybridge.data.buckets import Bucket, BucketConfig
from muybridge.data.config import DataConfig, DatasetConfig, build_buckets
from muybridge.data.decode import DecodeError, Decoder
from muybridge.data.draws import Draws
from muybridge.data.index import Clip
from muybridge.data.ledger import BadClip, from_lines, to_lines
from muybridge.data.loader import VideoLoader
from muybridge.data.plan import GHOST
from muybridge.data.raw_clips import RawClips
from muybridge.data.run_state import MAX_STATE_BYTES
from muybridge.data.shards import DatasetWriter
from muybridge.data.storage import TransientReadError
from muybridge.tests.data.plan_cases import Leg, legs

Found = tuple[int, int, int, int, str, bytes]  # step, position, dataset, row, caption and the first pixels
SHAPES = [BucketConfig(1, 16, 16), BucketConfig(5, 16, 16, micro_batch=2), BucketConfig(9, 16, 32)]


@dataclass
class Media:
    """Stands for `RawClips.read`: clips that say what was drawn for them, and fail as they are told."""

    bad: dict[tuple[str, int], float] = field(default_factory=dict)  # readable where the excerpt starts before this
    flaky: set[int] = field(default_factory=set)  # calls that fail as storage does
    calls: int = 0
    reads: list[tuple[str, int]] = field(default_factory=list)

    def read(self, source: RawClips, row: int, bucket: Bucket, draws: Draws, spot: object = None) -> np.ndarray:
        """Frames uint8 [T, H, W, 3] whose first numbers are the draws."""
        name = source.index.folder.name
        self.calls += 1
        self.reads.append((name, row))
        if self.calls in self.flaky:
            raise TransientReadError(f"{name} does not answer")
        if draws.start >= self.bad.get((name, row), 2.0):
            raise DecodeError(f"clip {row} is damaged")
        frames = np.zeros((bucket.frames, bucket.height, bucket.width, 3), dtype=np.uint8)
        numbers = np.array([row, draws.start, draws.crop_x, draws.crop_y], dtype=np.float64).view(np.uint8)
        frames.reshape(-1)[: len(numbers)] = numbers
        return frames


@pytest.fixture
def media(monkeypatch: pytest.MonkeyPatch) -> Media:
    """Takes the place of all videos."""
    found = Media()
    monkeypatch.setattr(RawClips, "read", lambda source, *rest: found.read(source, *rest))
    return found


def write(folder: Path, clips: list[tuple[int, int, int]]) -> Path:
    """A dataset of clips of (frames, height, width) at 8 frames a second; their bytes are no videos."""
    with DatasetWriter(folder, kind="raw", description={}) as writer:
        for number, (frames, height, width) in enumerate(clips):
            clip = Clip(f"k{number:03d}", f"{folder.name} {number}", frames, 8, 1, frames / 8, width, height, True)
            clip = replace(clip, is_image=frames == 1, caption_choices=json.dumps([clip.caption, "a", "b"]))
            writer.add(clip, bytes([number]), extension="mp4")
        writer.close()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three datasets; the clips of `long` fit the largest bucket, `images` are stills."""
    root = tmp_path_factory.mktemp("datasets")
    return {
        "long": write(root / "long", [(9, 16, 32)] * 13 + [(5, 16, 16)] * 3),
        "short": write(root / "short", [(5, 16, 16)] * 6 + [(6, 20, 20)] * 5 + [(9, 16, 32)]),
        "images": write(root / "images", [(1, 16, 16)] * 7),
    }


def config_of(folders: dict[str, Path], **changes: Any) -> DataConfig:
    """A mixture of all three."""
    weights = {"long": 2.0, "short": 1.0, "images": 0.5}
    datasets = {name: DatasetConfig(str(path), weight=weights.get(name, 1.0)) for name, path in folders.items()}
    base: dict[str, Any] = {"datasets": datasets, "buckets": SHAPES, "frames": 9, "height": 16, "width": 32}
    return DataConfig(**{**base, "workers": 0, "caption_dropout": 0.3, **changes})


def build(
    config: DataConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 3,
    global_batch: int = 8,
    seed: int = 3,
) -> VideoLoader:
    buckets = build_buckets(config, global_batch=global_batch, micro_batch=micro_batch, world_size=world_size)
    return VideoLoader(config, buckets=buckets, rank=rank, world_size=world_size, seed=seed)


def samples(batches: list[VideoBatch]) -> list[Found]:
    """What is learned from a step, of all its batches in the order of the slots."""
    found = []
    for batch in batches:
        for i, slot in enumerate(batch.slots.tolist()):
            if slot < batch.step_samples:
                frames = batch.frames[i].numpy().tobytes()[:32]
                place = batch.step, slot, int(batch.datasets[i]), int(batch.rows[i])
                found.append((*place, batch.captions[i], frames))
    return sorted(found)


def without_split(clips: list[BadClip]) -> set[tuple[str, int]]:
    """The part of a ledger that a run's history cannot change."""
    return {(clip.dataset, clip.row) for clip in clips}


class Run:
    """The trainer's side of the loader: steps on all ranks, checkpoints with the ledger, kills."""

    def __init__(self, config: DataConfig, folder: Path) -> None:
        self.config, self.ledger_file = config, folder / "bad_clips.jsonl"
        self.ledger_file.write_text("")
        self.state, self.next_step = json.dumps(build(config).state(0)), 0
        self.steps: dict[int, list[Found]] = {}

    def take(self, leg: Leg) -> None:
        """Goes on from the last checkpoint, until the kill."""
        ranks = [
            build(self.config, rank=rank, world_size=leg.world_size, micro_batch=leg.micro_batches[0])
            for rank in range(leg.world_size)
        ]
        for loader in ranks:
            assert not loader.resume(json.loads(self.state))
            loader.ledger.share([from_lines(self.ledger_file)])
        batches = [loader.steps(self.next_step) for loader in ranks]
        start = self.next_step
        for step in range(start, start + leg.steps):
            of_ranks = [next(mine) for mine in batches]
            assert len({(len(mine), *(batch.frames.shape for batch in mine)) for mine in of_ranks}) == 1
            found = samples([batch for mine in of_ranks for batch in mine])
            assert self.steps.setdefault(step, found) == found
            if (step + 1) % leg.checkpoint_every == 0:
                everyone = [loader.ledger.clips() for loader in ranks]
                for loader in ranks:
                    loader.ledger.share(everyone)
                    assert loader.ledger.clips() == ranks[0].ledger.clips()
                self.ledger_file.write_text(to_lines(ranks[0].ledger.clips()))
                self.state, self.next_step = json.dumps(ranks[0].state(step + 1)), step + 1


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    history=legs(max_steps=8).map(lambda found: found[:4]),
    bad=st.dictionaries(
        st.tuples(st.sampled_from(("long", "short", "images")), st.integers(0, 15)),
        st.sampled_from((0.0, 0.5)),
        max_size=9,
    ),
)
def test_runs_on_damaged_data_take_the_same_samples_however_they_are_split_and_killed(
    folders: dict[str, Path], tmp_path: Path, media: Media, history: list[Leg], bad: dict[tuple[str, int], float]
) -> None:
    """P6 and P11 with the loader's own state and ledger; some clips can be read up to their middle only."""
    media.bad = bad
    run = Run(config_of(folders), tmp_path)
    for leg in history:
        run.take(replace(leg, world_size=1 + leg.world_size % 4))
    alone = build(run.config)
    whole = list(islice(alone.steps(0), len(run.steps)))
    assert run.steps == {step: samples(batches) for step, batches in enumerate(whole)}


def test_the_ledger_is_the_set_of_clips_that_failed(folders: dict[str, Path], tmp_path: Path, media: Media) -> None:
    """P11: nothing else is in it, and after two passes all of them are."""
    media.bad = {("long", 2): 0.0, ("long", 9): 0.0, ("short", 0): 0.0, ("images", 5): 0.0}
    run = Run(config_of(folders), tmp_path)
    for leg in (Leg(3, [2], 20, 3), Leg(2, [1], 25, 5), Leg(1, [4], 40, 1)):
        run.take(leg)
    assert without_split(from_lines(run.ledger_file)) == set(media.bad)
    drawn = {(dataset, row) for found in run.steps.values() for _, _, dataset, row, *_ in found}
    assert len(drawn) == 13 + 3 + 12 + 7 - len(media.bad)
    assert GHOST not in {row for _, row in drawn}


def test_a_clip_that_can_be_read_in_part_is_tried_in_each_pass(
    folders: dict[str, Path], tmp_path: Path, media: Media
) -> None:
    """P11: which rank met it before, and when the ledgers were last put together, must not matter."""
    media.bad = {("long", row): 0.5 for row in range(0, 13, 2)}
    config = config_of({"long": folders["long"]}, buckets=[])
    alone, run = build(config), Run(config, tmp_path)
    run.take(Leg(3, [1], 30, 50))
    assert run.steps == {step: samples(batches) for step, batches in enumerate(islice(alone.steps(0), 30))}
    for clip in alone.ledger.clips():
        drawn = {slot.pass_number for step in range(30) for slot in alone.plan.slots(step) if slot.row == clip.row}
        assert set(clip.passes) < drawn


def test_what_is_known_to_be_bad_in_a_pass_is_not_read_again(folders: dict[str, Path], media: Media) -> None:
    media.bad = {("long", row): 0.0 for row in range(13)}
    config = config_of({"long": folders["long"]}, buckets=[])
    loader = build(config, global_batch=13)
    [[*batches]] = islice(loader.steps(0), 1)
    assert {row for batch in batches for row in batch.rows.tolist()} == {GHOST}
    assert all(clip.passes == (0,) for clip in loader.ledger.clips())
    assert len(loader.ledger.clips()) == 13
    again = build(config, global_batch=13)
    again.ledger.share([loader.ledger.clips()])
    media.reads.clear()
    [[*same]] = islice(again.steps(0), 1)
    assert media.reads == []
    assert samples(same) == samples(batches)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(flaky=st.sets(st.integers(1, 60), max_size=4))
def test_storage_that_does_not_answer_ends_the_run_and_changes_nothing(
    folders: dict[str, Path], media: Media, flaky: set[int]
) -> None:
    """P12: no substitute, no line in the ledger; the next start takes the same samples."""
    media.flaky, media.calls = set(), 0
    config = config_of(folders)
    expected = [samples(batches) for batches in islice(build(config).steps(0), 8)]
    media.flaky, media.calls = flaky, 0
    found: list[list[Found]] = []
    while len(found) < 8:
        loader = build(config)
        try:
            for batches in islice(loader.steps(len(found)), 8 - len(found)):
                found.append(samples(batches))
        except TransientReadError:
            assert media.calls in flaky
        assert len(loader.ledger) == 0
    assert found == expected


def test_the_state_is_at_most_four_kilobytes(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: six datasets of forty buckets, after a change of the data, far into the run."""
    shapes = [BucketConfig(1 + 4 * (i // 4), 16, 16 + 16 * (i % 4)) for i in range(40)]
    names = [f"dataset_of_videos_{letter}" for letter in "abcdef"]
    datasets = {
        name: DatasetConfig(
            str(folders["long"]), weight=1 / (3 + d), filter="size > 0 and not is_hdr and " * 6 + "size > 0"
        )
        for d, name in enumerate(names)
    }
    config = config_of({}, datasets=datasets, buckets=shapes, accept_changes=True)
    loader = build(config, global_batch=64)
    other = build(replace(config, caption_dropout=0.5), global_batch=64)
    generator = np.random.default_rng(0)
    for d, data in enumerate(loader._datasets):
        bucket_of_row = generator.integers(0, 40, 3000 * (d + 1))
        rows = [np.flatnonzero(bucket_of_row == b).astype(np.int32) for b in range(40)]
        loader._datasets[d] = other._datasets[d] = replace(data, rows=rows)
    assert not loader.resume(json.loads(json.dumps(loader.state(0))))
    state = json.loads(json.dumps(loader.state(10**6)))
    assert loader.resume(state) is False
    assert other.resume(state) is True
    text = json.dumps(other.state(5 * 10**6 + 1))
    assert 2000 < len(text) <= MAX_STATE_BYTES
    before = other.plan.slots(5 * 10**6 + 1)
    assert other.resume(json.loads(text)) is False  # shortened settings are still the same ones
    assert other.plan.slots(5 * 10**6 + 1) == before
    assert other.plan.segment.start_step == 10**6


def test_buckets_that_no_clip_belongs_to_are_refused(folders: dict[str, Path]) -> None:
    """P15."""
    build(config_of(folders)).refuse_empty_buckets()
    loader = build(config_of({"short": folders["short"]}))
    with pytest.raises(
        ValueError, match=r"data.buckets: no clip belongs to 1x16x16; take it out, or see muybridge doctor"
    ):
        loader.refuse_empty_buckets()
    assert len(next(loader.steps(0))) > 0  # a validation set need not have clips of all
    weights = {name: DatasetConfig(str(path), weight=float(name == "images")) for name, path in folders.items()}
    with pytest.raises(ValueError, match="no clip belongs to 5x16x16, 9x16x32; take them out"):
        build(config_of({}, datasets=weights)).refuse_empty_buckets()


def test_a_dataset_of_weight_zero_is_neither_trained_nor_validated_on(folders: dict[str, Path], media: Media) -> None:
    """P15."""
    datasets = {name: DatasetConfig(str(path), weight=float(name != "short")) for name, path in folders.items()}
    loader = build(config_of({}, datasets=datasets))
    list(islice(loader.steps(0), 30))
    list(loader.each_once(100))
    assert {name for name, _ in media.reads} == {"long", "images"}


def test_the_fingerprint_changes_if_and_only_if_the_order_can(folders: dict[str, Path], tmp_path: Path) -> None:
    """P16; what `resume` compares changes with it."""
    copy = shutil.copytree(folders["short"], tmp_path / "short")
    more = write(tmp_path / "more", [(9, 16, 32)] * 14)
    plain = build(config_of(folders))

    def datasets(**changes: Any) -> dict[str, DatasetConfig]:
        return {**config_of(folders).datasets, **changes}

    same = [
        build(config_of(folders, workers=1, prefetch=0, decoder=Decoder.pyav, timeout_seconds=9.0, max_bad_share=0.5)),
        build(config_of(folders), rank=2, world_size=3, micro_batch=1),
        build(config_of({**folders, "short": copy})),  # the same files elsewhere
        build(config_of(dict(reversed(folders.items())))),
        build(config_of(folders, buckets=[replace(shape, micro_batch=1) for shape in SHAPES])),
    ]
    orders = {repr(plain.plan.slots(step)) for step in range(20)}
    for loader in same:
        assert loader.fingerprint == plain.fingerprint
        assert loader.settings() == plain.settings()
        assert {repr(loader.plan.slots(step)) for step in range(20)} == orders
        assert not loader.resume(plain.state(3))
        loader.close()
    others = [
        build(config_of(folders), seed=4),
        build(config_of(folders), global_batch=5),
        build(config_of(folders, fps=4.0)),
        build(config_of(folders, max_crop=0.4)),
        build(config_of(folders, max_upscale=1.1)),
        build(config_of(folders, caption_dropout=0.2)),
        build(config_of(folders, image_share=0.3)),
        build(config_of(folders, buckets=SHAPES[:2])),
        build(config_of(folders, buckets=[SHAPES[1], SHAPES[0], SHAPES[2]])),
        build(config_of(folders, buckets=[*SHAPES[:2], replace(SHAPES[2], keep=0.5)])),
        build(config_of({**folders, "other": folders["short"]})),
        build(config_of({**folders, "long": more})),
        build(config_of({name: folders[name] for name in ("long", "short")}, buckets=SHAPES[1:])),
        build(config_of({}, datasets=datasets(long=DatasetConfig(str(folders["long"]), weight=2.5)))),
        build(config_of({}, datasets=datasets(long=DatasetConfig(str(folders["long"]), 2.0, filter="frames > 5")))),
        build(config_of({"longs" if name == "long" else name: path for name, path in folders.items()})),
    ]
    assert len({loader.fingerprint for loader in [plain, *others]}) == len(others) + 1
    for loader in others:
        with pytest.raises(ValueError, match=r"these changed: .* saved, .* now"):
            loader.resume(plain.state(3))


def test_a_segment_begins_only_where_changes_are_accepted(folders: dict[str, Path], media: Media) -> None:
    old = build(config_of(folders))
    state = json.loads(json.dumps(old.state(17)))
    changes: dict[str, Any] = {"caption_dropout": 0.0}
    with pytest.raises(
        ValueError, match=r"data.caption_dropout: 0.3 saved, 0.0 now \(undo it, .* data.accept_changes=true"
    ):
        build(config_of(folders, **changes)).resume(state)
    new = build(config_of(folders, accept_changes=True, **changes))
    assert new.resume(state)
    assert new.plan.segment.start_step == 17
    with pytest.raises(ValueError, match="step=16 must not be before this plan begins, at step 17"):
        new.plan.bucket(16)
    # The rows go on where they were: over both parts each comes once a pass.
    found = [(slot.dataset, slot.row, slot.pass_number) for step in range(17) for slot in old.plan.slots(step)]
    found += [(slot.dataset, slot.row, slot.pass_number) for step in range(17, 60) for slot in new.plan.slots(step)]
    assert len(set(found)) == len(found)
    again = build(config_of(folders, **changes))
    assert not again.resume(json.loads(json.dumps(new.state(30))))  # from here on nothing changed
    assert again.fingerprint == new.fingerprint
    assert again.plan.slots(41) == new.plan.slots(41)


def test_rows_that_changed_behind_the_same_settings_are_refused(folders: dict[str, Path]) -> None:
    loader = build(config_of(folders))
    state = loader.state(12)
    loader._datasets = [replace(data, rows=[rows[1:] for rows in data.rows]) for data in loader._datasets]
    with pytest.raises(ValueError, match="made with other rows of the datasets, though their settings are the same"):
        loader.resume(state)


def test_a_checkpoint_without_a_state_is_refused(folders: dict[str, Path]) -> None:
    for state in (None, {"version": 0}):
        with pytest.raises(ValueError, match="of an older version, whose order of samples cannot be continued"):
            build(config_of(folders)).resume(state)
