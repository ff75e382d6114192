"""`muybridge doctor` on a small dataset of landscape clips, portrait clips, pictures, and a clip that fits nothing."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muybridge.data.decode import Decoder, probe, read_frames
from muybridge.data.index import Clip
from muybridge.data.media_info import index_fields, inspect_media
from muybridge.data.mp4 import write_mp4
from muybridge.data.shards import DatasetWriter
from muybridge.scripts import cli
from muybridge.scripts.pictures import PAPER, captioned_grid
from muybridge.train.config import load_train_config

CAPTIONS = '["a grey clip","a clip that becomes brighter"]'
# Of 64x96 pixels at 8 frames/s; a step of the run's own shape has 4 clips, one of half as many pixels about twice as many.
SETTINGS = [
    *("+experiment=quickstart", "data.access=raw", "data.latents=null", "steps=40", "validation.path=null"),
    *("data.frames=5", "data.fps=8", "data.height=64", "data.width=96", "global_batch=6", "micro_batch=2"),
    "data.buckets=[{frames:5,height:64,width:96},{frames:5,height:96,width:64},{frames:1,height:64,width:96}]",
    *("data.workers=1", "data.caption_dropout=0", "validation.every_steps=0", "model.patch_size=[1,2,2]"),
]


def mp4(frames: int, height: int, width: int) -> bytes:
    """A clip that becomes brighter, on the left half only."""
    clip = np.full((frames, height, width, 3), 40, dtype=np.uint8)
    clip[:, :, : width // 2] = np.linspace(60, 200, frames).astype(np.uint8)[:, None, None, None]
    file = io.BytesIO()
    write_mp4(file, clip, fps=8)
    return file.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six landscape clips (of which one is damaged), three portrait ones, a picture, one fit for pictures only, one too small."""
    folder = tmp_path_factory.mktemp("doctor") / "clips"
    picture = io.BytesIO()
    Image.fromarray(np.full((128, 192, 3), 99, np.uint8)).save(picture, "PNG")
    landscape, portrait = mp4(9, 64, 128), mp4(5, 96, 64)
    media = [landscape] * 6 + [portrait] * 3 + [picture.getvalue(), mp4(3, 64, 96), mp4(9, 16, 24)]
    with DatasetWriter(folder, kind="raw", description={}) as writer:
        for number, data in enumerate(media):
            clip = Clip(key=f"k{number}", caption="a grey clip", **index_fields(inspect_media(data)))
            if number == 0:  # whole when it was indexed
                data = data[: len(data) // 2]
            writer.add(replace(clip, caption_choices=CAPTIONS), data, extension="bin")
        writer.close()
    return folder


def doctor(*arguments: object) -> int:
    return cli.main(["doctor", *map(str, arguments)])


@pytest.fixture(scope="module")
def examined(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report for two processes and its folder."""
    out = tmp_path_factory.mktemp("examined")
    settings = [*SETTINGS, f"data.path={dataset}", f"run_dir={out}/run"]
    assert doctor(*settings, "--out", out, "--processes", 2, "--steps", 3, "--step-seconds", 2) == 0
    return json.loads((out / "report.json").read_text()), out


def test_the_report_counts_what_is_taken_and_what_it_wastes(examined: tuple[dict[str, Any], Path]) -> None:
    report, _ = examined
    [found] = report["datasets"]
    assert (found["clips"], found["taken"], found["sample_share"]) == (12, 11, 1.0)
    assert found["left_out"] == {"too small for 5x64x96 (data.max_upscale=1.25)": 1}
    landscape, portrait, picture = report["buckets"]
    assert [bucket["clips"] for bucket in report["buckets"]] == [6, 3, 2]
    # 64x128 pixels lose a quarter to 64x96, and keep their size; the picture is halved, the short clip beside it is not.
    assert (landscape["cut_share"], landscape["scale"], landscape["enlarged_share"]) == (0.25, 1.0, 0.0)
    assert (portrait["cut_share"], portrait["scale"]) == (0.0, 1.0)
    assert (picture["cut_share"], picture["scale"]) == (0.0, pytest.approx(0.75))
    # Six samples on two processes, two at a time: two micro-steps each, two of eight places empty.
    for bucket in (landscape, portrait):
        assert (bucket["samples_per_step"], bucket["micro_steps"], bucket["clips_per_rank"]) == (6, 2, 4)
        assert bucket["ghost_share"] == 0.25
        assert bucket["relative_cost"] == 1.0
    assert [note.split(":")[0] for note in report["notes"]] == ["5x64x96", "5x96x64"]
    sizes = report["histograms"]["pixels of the shorter side"]
    assert [(bar["end"], bar["clips"], bar["taken"]) for bar in sizes] == [(128, 11, 10), (256, 1, 1)]
    assert (report["totals"]["clips"], report["totals"]["taken"]) == (12, 11)


def test_tokens_and_costs_are_those_of_the_model(examined: tuple[dict[str, Any], Path], dataset: Path) -> None:
    report, _ = examined
    config = load_train_config([*SETTINGS, f"data.path={dataset}", "dry_run=true"])
    frames, height, width = config.vae.resolved().latent_shape(5, 64, 96)[1:]
    patch = config.model.patch_size
    tokens = frames // patch[0] * (height // patch[1]) * (width // patch[2])
    landscape, _, picture = report["buckets"]
    assert landscape["tokens_per_step"] == 6 * tokens
    cost = picture["samples_per_step"] * config.sample_cost(1, 64, 96) / (6 * config.sample_cost(5, 64, 96))
    assert picture["relative_cost"] == pytest.approx(cost)
    mean = sum(bucket["step_share"] * bucket["tokens_per_step"] for bucket in report["buckets"])
    assert report["totals"]["tokens_per_step"] == pytest.approx(mean)


def test_steps_are_shown_as_the_run_will_get_them(examined: tuple[dict[str, Any], Path], dataset: Path) -> None:
    from muybridge.data.loader import VideoLoader

    report, out = examined
    assert set(report["files"]) == {path.name for path in out.iterdir()} - {"report.json", "run"}
    videos = [name for name in report["files"] if name.endswith(".mp4")]
    assert [name[:7] for name in videos] == ["5x64x96", "5x96x64"]
    config = load_train_config([*SETTINGS, f"data.path={dataset}", "dry_run=true"])
    step = int(videos[0].split("_step_")[1].removesuffix(".mp4"))
    loader = VideoLoader(config.data, buckets=config.buckets(1), rank=0, world_size=1, seed=config.seed)
    batches = next(loader.steps(step))
    loader.close()
    listed = [sample for sample in report["samples"] if sample["step"] == step]
    assert [sample["key"] for sample in listed] == [key for batch in batches for key in batch.keys]
    assert [sample["caption"] for sample in listed] == [text for batch in batches for text in batch.captions]
    data = (out / videos[0]).read_bytes()
    info = probe(data)
    assert info.frames == 5
    frames = read_frames(data, [i / 8 for i in range(5)], decoder=Decoder.pyav).astype(int)
    clips = np.concatenate([batch.frames.numpy() for batch in batches if batch.frames is not None]).astype(int)
    # The first clip stands below the title, each of its pixels three times as large.
    shown = frames[:, 56 : 56 + 192 : 3, 28 : 28 + 288 : 3]
    assert np.abs(shown[:, 8:-8, 8:-8] - clips[0][:, 8:-8, 8:-8]).mean() < 6
    below = frames[:, 56 + 192 : 56 + 192 + 60, 28 : 28 + 288]
    assert (below < 128).any()  # the caption
    assert (frames[:, :, :20] > 240).all()  # and nothing in the margin


def test_clips_that_cannot_be_read_are_listed(examined: tuple[dict[str, Any], Path]) -> None:
    report, _ = examined
    [clip] = report["unreadable"]
    assert (clip["key"], clip["row"]) == ("k0", 0)
    assert clip["reason"]
    assert "k0" not in {sample["key"] for sample in report["samples"]}


def test_reading_is_compared_with_what_the_steps_need(examined: tuple[dict[str, Any], Path]) -> None:
    report, _ = examined
    reading, buckets = report["reading"], report["buckets"]
    seconds = {bucket["name"]: bucket["clips_per_rank"] / bucket["clips_per_cpu_second"] for bucket in buckets}
    mean = sum(bucket["step_share"] * seconds[bucket["name"]] for bucket in buckets)
    assert reading["mean_cpu_seconds"] == pytest.approx(mean)
    assert reading["cores_needed"] == pytest.approx(mean / 2)
    assert reading["steps_per_second"] == pytest.approx(1 / mean)
    assert reading["slowest_bucket"] == max(seconds, key=lambda name: seconds[name])
    assert reading["workers_needed"] == 1


def test_the_terminal_says_what_to_change_and_what_to_do_next(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        *SETTINGS,
        f"data.path={dataset}",
        f"run_dir={tmp_path / 'run'}",
        "data.workers=0",
        "data.max_misfit_share=0",
    ]
    old = tmp_path / "run" / "doctor" / "33x8x8_step_000000.mp4"
    old.parent.mkdir(parents=True)
    mine = old.parent / "notes.txt"
    old.touch()
    mine.touch()
    (old.parent / "report.json").write_text(json.dumps({"files": [old.name]}))
    assert doctor(*settings, "--processes", 4, "--steps", 1) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "data.path │ 12 │ 11 │ 1 │ 100.0% │ 1 too small for 5x64x96",
        "5x64x96: 25% of the computation is for ghosts (6 samples in 4 processes x 1 micro-steps of 2): with "
        "data.buckets[0].micro_batch=2 and a global_batch 1.33 times as large no place stays empty",
        "data.path: 1 clips that are wanted fit no bucket, a larger share than data.max_misfit_share=0; training refuses",
        "steps/s at most; --step-seconds S says",
        "Still needed for the run: vae.path=runs/quickstart/vae/model/vae",
        "Next: look at the pictures, then torchrun --nproc-per-node 4 -m muybridge.train +experiment=quickstart",
    ):
        assert part in said, said
    assert mine.exists()
    assert not old.exists()  # of other buckets


def test_latents_have_no_pictures(tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(*tiny_run, f"run_dir={tmp_path}") == 0
    assert "there are no pictures to show" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "doctor" / "report.json").read_text())
    assert report["files"] == []
    assert len(report["samples"]) == 2 * 8
    assert report["buckets"][0]["clips_per_cpu_second"] > 0


def test_mistakes_are_refused(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SETTINGS, f"run_dir={tmp_path}"]
    assert doctor(*settings, f"data.path={dataset}", "--processes", 0) == 64
    assert doctor(*settings, f"data.path={dataset}", "--step-seconds", -1) == 64
    assert doctor(*settings, f"data.path={dataset}/none") == 64
    assert "does not exist; make it with: muybridge prepare" in capsys.readouterr().err
    assert doctor(*settings, f"data.path={dataset}", "data.max_bad=1") == 64
    assert "did you mean data.max_bad_share?" in capsys.readouterr().err
    assert doctor(*settings, f"data.path={dataset}", "data.max_upscale=0.1") == 64
    assert "none of its 12 clips fits" in capsys.readouterr().err


def test_a_grid_keeps_long_captions_inside_and_sides_even() -> None:
    clips = np.zeros((3, 2, 40, 25, 3), dtype=np.uint8)
    captions = ["many words " * 60, "x" * 300, "naïve"]
    grid = captioned_grid(clips, captions, ["a" * 99, "b", "c"], title="t" * 500)
    assert grid.shape[1] % 2 == grid.shape[2] % 2 == 0
    edge = np.concatenate(
        [grid[:, :, -20:].reshape(-1, 3), grid[:, -8:].reshape(-1, 3), grid[:, :, :20].reshape(-1, 3)]
    )
    assert (edge == PAPER).all()
    assert (grid[0] == grid[1]).all()
