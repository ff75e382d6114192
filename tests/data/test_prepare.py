"""`muybridge prepare` writes what can be used, names what cannot, and touches nothing that is not its own."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from muybridge.data import workers
from muybridge.data.config import DataConfig, build_buckets
from muybridge.data.decode import Decoder, has_decoder
from muybridge.data.index import ClipIndex
from muybridge.data.loader import VideoLoader
from muybridge.data.synthetic import HELD_OUT, Combination
from muybridge.scripts import cli
from muybridge.scripts.prepare import main
from muybridge.tests.data.time_limits import time_limits_for

ONE_SECOND = [40 * i for i in range(25)]


@pytest.fixture
def videos(numbered: Any, tmp_path: Path) -> Path:
    """A folder with two good videos and one of each kind of trouble."""
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    good = numbered.encode(ONE_SECOND)
    files = {
        "b.mp4": good,
        "more/a.webm": numbered.encode(ONE_SECOND, codec="libvpx-vp9", container="webm"),
        "cut.mp4": good[: len(good) // 2],
        "empty.mp4": b"",
        "page.mp4": b"<html>404</html>",
        "silent.mp4": good,
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        if name != "silent.mp4":
            (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments] + ["--workers", "1"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_good_videos_are_indexed_and_bad_ones_named(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(videos, out) == 0
    index = ClipIndex.open(out)
    clips = [index.clip(row) for row in range(len(index))]
    assert [clip.caption for clip in clips] == ["caption of b.mp4", "caption of more/a.webm"]
    assert [(clip.width, clip.height, clip.frames, clip.fps_numerator) for clip in clips] == [(96, 64, 25, 25)] * 2
    with tarfile.open(index.shards[0]) as tar:
        names = [Path(member.name).suffixes for member in tar]
    assert names == [[".mp4"], [".txt"], [".txt"], [".webm"]]
    rejected = {r["file"]: r["reason"] for r in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    assert sorted(rejected) == ["cut.mp4", "empty.mp4", "page.mp4", "silent.mp4"]
    assert rejected["silent.mp4"] == "no caption (silent.txt is missing)"
    assert rejected["empty.mp4"] == "the file is empty"
    said = capsys.readouterr().out
    assert all(
        name in said
        for name in [
            *rejected,
            "Wrote 2 clips",
            "Left out 4",
            f"Next: muybridge train +experiment=NAME data.path={out}",
        ]
    )


def test_the_same_source_gives_the_same_bytes(videos: Path, tmp_path: Path) -> None:
    run(videos, tmp_path / "one")
    main([str(videos), str(tmp_path / "two"), "--workers", "3"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_table_gives_what_its_folder_gives(videos: Path, tmp_path: Path) -> None:
    rows = [{"file_path": name, "prompt": f"caption of {name}"} for name in ("b.mp4", "cut.mp4", "more/a.webm")]
    (videos / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(videos / "table.jsonl", tmp_path / "out")
    index = ClipIndex.open(tmp_path / "out")
    assert [index.text("caption", row) for row in range(len(index))] == ["caption of b.mp4", "caption of more/a.webm"]


def test_a_decoder_that_crashes_or_hangs_costs_one_file(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, time\n"
        "from muybridge.data import worker\n"
        "inspect_range = worker.inspect_range\n"
        "def inspect(name, **rest):\n"
        "    if name.endswith('cut.mp4'): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if name.endswith('page.mp4'): time.sleep(1000)\n"
        "    return inspect_range(name, **rest)\n"
        "worker.OPERATIONS['inspect_range'] = inspect\n"
        "worker.main()\n"
    )
    monkeypatch.setattr(workers, "_COMMAND", [sys.executable, str(program)])
    with time_limits_for(lambda arguments, _: arguments["name"].endswith("page.mp4")):
        run(videos, tmp_path / "out", "--timeout", 1)
    rejected = {
        r["file"]: r["reason"] for r in map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    }
    assert rejected["cut.mp4"] == "the decoder crashed (SIGSEGV)"
    assert rejected["page.mp4"] == "decoding took longer than 1 s"
    assert len(ClipIndex.open(tmp_path / "out")) == 2


def test_only_damaged_files_is_an_error_that_leaves_nothing(videos: Path, tmp_path: Path) -> None:
    for name in ("b.mp4", "more/a.webm", "silent.mp4"):
        (videos / name).unlink()
    with pytest.raises(ValueError, match="none of its 3 videos can be used, so nothing was written"):
        run(videos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_left_alone(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match=r"out is not empty, and nothing in it is from this command"):
            run(videos, out, *flags)
    assert contents(out) == {"thesis.tex": b"years of work"}


def test_running_again_does_nothing_unless_something_changed(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(videos, out)
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(videos, out) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (videos / "b.txt").write_text("another caption")
    with pytest.raises(ValueError, match=r"made from .*videos with other files or settings; --overwrite replaces it"):
        run(videos, out)
    assert contents(out) == before
    run(videos, out, "--overwrite")
    assert ClipIndex.open(out).text("caption", 0) == "another caption"


def test_an_interrupted_run_is_started_again(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(videos, out)
    complete = contents(out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    (out / "index.arrow").unlink()
    run(videos, out)
    assert contents(out) == complete


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "out"], "SRC=gone does not exist"),
        (["void", "out"], "SRC=void holds no videos"),
        (["synthetic", "out", "--clips", "0"], "--clips=0 must be positive"),
        (["synthetic", "out", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["synthetic"], "the following arguments are required: OUT"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_64(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "void").mkdir()
    assert cli.main(["prepare", *arguments]) == 64
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_the_synthetic_dataset_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shapes"
    arguments = ["synthetic", out, "--clips", 60, "--test-clips", 24, "--seed", 5]
    run(*arguments)
    train, test = ClipIndex.open(out / "train"), ClipIndex.open(out / "test")
    assert (len(train), len(test)) == (60, 24)
    held_out = {Combination(**item) for item in json.loads((out / "held_out.json").read_text())}
    assert held_out == set(HELD_OUT)
    labels = {
        name: [Combination(**i.clip(r).label_values) for r in range(len(i))] for name, i in (("a", train), ("b", test))
    }
    assert not set(labels["a"]) & held_out
    assert held_out <= set(labels["b"])
    clip = train.clip(7)
    assert (clip.frames, clip.fps_numerator, clip.width, clip.height, clip.seekable) == (9, 8, 64, 64, True)
    assert all(word in clip.caption for word in (labels["a"][7].colour, labels["a"][7].shape, labels["a"][7].direction))
    with tarfile.open(train.shards[0]) as tar:
        member = tar.extractfile(f"{clip.key}.json")
        assert member is not None
        assert json.load(member) == clip.label_values
    assert (out / "preview.png").stat().st_size > 5000
    first = contents(out)
    capsys.readouterr()
    run(*arguments)
    assert "Nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        run(*arguments[:-1], 6)
    run(*arguments, "--overwrite")
    assert contents(out) == first


@pytest.fixture(scope="module")
def real_dataset(real_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> ClipIndex:
    if not has_decoder(Decoder.pyav):
        pytest.skip("some of the real clips need PyAV, which is not installed")
    out = tmp_path_factory.mktemp("real") / "out"
    main([str(real_clips), str(out)])
    return ClipIndex.open(out)


def test_every_readable_real_clip_is_indexed(real_dataset: ClipIndex, real_clips: Path) -> None:
    expected = sorted(path.stem for path in real_clips.iterdir() if path.suffix in (".mp4", ".mkv", ".mov"))
    expected.remove("corrupted")
    clips = {clip.key.split("_", 1)[1]: clip for clip in map(real_dataset.clip, range(len(real_dataset)))}
    assert sorted(clips) == expected
    assert (clips["rotate_90"].width, clips["rotate_90"].height) == (320, 568)
    assert (clips["rotate_0"].width, clips["rotate_0"].height) == (568, 320)
    assert clips["kitten"].caption.startswith((real_clips / "kitten.txt").read_text().strip()[:20])
    [rejected] = map(json.loads, (real_dataset.folder / "rejected.jsonl").read_text().splitlines())
    assert rejected["file"] == "corrupted.mp4"
    assert "damaged video data" in rejected["reason"]


def test_real_clips_make_batches(real_dataset: ClipIndex, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(path=str(real_dataset.folder), frames=9, fps=8.0, height=48, width=80, workers=1, prefetch=1)
    loader = VideoLoader(
        config, buckets=build_buckets(config, global_batch=3, micro_batch=3, world_size=1), rank=0, world_size=1, seed=0
    )
    # rotate_0, rotate_90, h264_10bits and h265_video last a second or less
    assert loader.counts()["excluded_rows"] == 4
    assert "4 of 12 clips are left out" in caplog.text
    rows = []
    for [batch] in islice(loader.steps(0), 3):
        assert batch.pixels.shape == (3, 3, 9, 48, 80)
        assert batch.pixels.std() > 0.1
        rows += batch.rows.tolist()
    loader.close()
    assert len(set(rows)) == 8  # all of them, and one of the second pass
    counts = loader.counts()
    assert counts["bad_clips"] == 0
    if has_decoder(Decoder.decord):
        assert counts["fallback_decodes"] >= 1  # AV1


def test_a_dataset_can_be_moved(videos: Path, tmp_path: Path) -> None:
    run(videos, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    shutil.rmtree(videos)
    config = DataConfig(path=str(tmp_path / "elsewhere"), frames=5, workers=0)
    loader = VideoLoader(
        config, buckets=build_buckets(config, global_batch=2, micro_batch=2, world_size=1), rank=0, world_size=1, seed=0
    )
    [batch] = next(loader.steps(0))
    assert sorted(batch.rows.tolist()) == [0, 1]
