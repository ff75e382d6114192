"""`muybridge encode` computes what a run on raw clips would, goes on where it was stopped, and says what went wrong."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from muybridge.data import latent_writer, storage
from muybridge.data.config import DataConfig, build_buckets
from muybridge.data.index import ClipIndex
from muybridge.data.latent_cache import CacheOrigin
from muybridge.data.loader import VideoLoader
from muybridge.data.shards import DatasetWriter
from muybridge.models.text import text_fingerprint
from muybridge.models.vae.folder import load_vae, vae_fingerprint
from muybridge.scripts import cli
from muybridge.tests.conftest import Command
from muybridge.train.config import load_train_config
from muybridge.train.tasks import TextToVideoTask


@pytest.fixture
def settings(tiny_run: list[str], toy_folder: Path, tmp_path: Path) -> list[str]:
    """A run whose latents are still to be made, from 16 clips for training and the same for validation."""
    clips = toy_folder / "shards" / "test"
    return [
        *(*tiny_run, "run_dir=runs/none", f"data.path={clips}", f"validation.path={clips}"),
        *(f"data.latents={tmp_path / 'latents'}", "data.workers=0", f"vae.path={copy_vae(toy_folder, tmp_path)}"),
    ]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five clips a shard, so that 16 make four."""
    monkeypatch.setattr(latent_writer, "_CLIPS_PER_SHARD", 5)


def copy_vae(toy_folder: Path, folder: Path) -> Path:
    """An autoencoder that a test may change."""
    return shutil.copytree(toy_folder / "vae", folder / "vae")


def build(data: DataConfig, origin: CacheOrigin | None = None) -> VideoLoader:
    buckets = build_buckets(data, global_batch=4, micro_batch=4, world_size=1)
    return VideoLoader(data, buckets=buckets, rank=0, world_size=1, seed=0, **vars(origin or CacheOrigin()))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.suffix in (".tar", ".arrow", ".safetensors", ".npy"))
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def without_times(found: dict[str, tuple[int, bytes]]) -> dict[str, bytes]:
    return {name: data for name, (_, data) in found.items()}


def test_latents_are_made_once_and_replaced_only_when_asked(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = tmp_path / "latents"
    assert cli.main(["encode", *settings]) == 0
    out = capsys.readouterr().out
    assert "Wrote the latents of 16 clips (1 shard, " in out
    assert f"MB) to {latents / 'train'}." in out
    assert f"Next: muybridge train {' '.join(settings)}\n" in out
    assert {path.name for path in latents.iterdir()} == {"train", "validation"}
    first = contents(latents)

    assert cli.main(["encode", *settings]) == 0
    assert capsys.readouterr().out.count("is complete and fits; kept") == 2
    assert contents(latents) == first

    before = vae_fingerprint(tmp_path / "vae")
    config_path = tmp_path / "vae" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}))
    now = vae_fingerprint(tmp_path / "vae")
    assert cli.main(["encode", *settings]) == 64
    assert f"holds other latents: its vae_fingerprint is {before}, not {now}; --overwrite" in capsys.readouterr().err
    assert contents(latents) == first
    assert cli.main(["encode", *settings, "--overwrite"]) == 0
    assert "kept" not in capsys.readouterr().out
    assert len(contents(latents)) == len(first)
    assert not contents(latents).keys() & {name for name in first if name.endswith(".tar")}


def test_a_cached_latent_is_the_normalised_mean_of_its_clip(settings: list[str], tmp_path: Path) -> None:
    assert cli.main(["encode", *settings]) == 0
    config = load_train_config(settings)
    vae = load_vae(tmp_path / "vae").eval()
    cached = build(config.training_data())
    raw = build(load_train_config([*settings, "data.access=raw"]).training_data())
    for latents, pixels in zip(cached.every_row(8), raw.every_row(8), strict=True):
        with torch.no_grad():
            expected = vae.normalise(vae.encode(pixels.pixels).mode())
        assert latents.latents is not None
        torch.testing.assert_close(latents.latents.float(), expected, rtol=2**-8, atol=1e-5)  # bfloat16 has 8 bits
        assert latents.captions == pixels.captions
    assert len(ClipIndex.open(tmp_path / "latents" / "train")) == 16


def test_images_and_clips_of_several_datasets_are_cached_in_their_buckets(
    settings: list[str], toy_folder: Path
) -> None:
    shapes = "data.buckets=[{frames: 9, height: 64, width: 64, keep: 0.5}, {frames: 1, height: 32, width: 64}]"
    named = [
        f"data.datasets.{name}.path={toy_folder / 'shards' / split}" for name, split in (("a", "train"), ("b", "test"))
    ]
    run = [*settings, "data.path=''", shapes, *named, "data.datasets.b.filter='size > 2000'"]
    run = [setting for setting in run if not setting.startswith("validation")]
    assert cli.main(["encode", *run]) == 0
    config = load_train_config(run)
    cached, raw = build(config.training_data()), build(load_train_config([*run, "data.access=raw"]).training_data())
    assert len(cached) == len(raw)
    frames = set()
    for ours, theirs in islice(zip(cached.steps(0), raw.steps(0)), 12):
        for latents, pixels in zip(ours, theirs, strict=True):
            assert latents.latents is not None
            assert (latents.keys, latents.captions) == (pixels.keys, pixels.captions)
            assert torch.equal(latents.datasets, pixels.datasets)
            assert torch.equal(latents.rows, pixels.rows)
            shape = config.vae.resolved().latent_shape(*pixels.pixels.shape[2:])
            assert latents.latents.shape == (len(latents), *shape)
            frames.add(pixels.pixels.shape[2])
    assert frames == {1, 9}


def test_cached_text_is_what_the_encoder_gives(
    settings: list[str], tiny_umt5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = ["text.kind=umt5", f"text.path={tiny_umt5}", "text.max_tokens=12", "data.caption_dropout=0.3"]
    run = [*settings, *frozen]
    assert cli.main(["encode", *run]) == 0
    assert "Wrote the latents of 16 clips and their captions' features" in capsys.readouterr().out
    config = load_train_config(run)
    origin = CacheOrigin(vae_fingerprint(tmp_path / "vae"), text_fingerprint(config.text))
    task = TextToVideoTask(config, torch.device("cpu"))
    given: list[torch.Tensor] = []

    def model(latents: torch.Tensor, noise_level: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        given.append(text)
        return torch.zeros_like(latents)

    captions = []
    for [cached], [raw] in islice(
        zip(
            build(config.training_data(), origin).steps(0),
            build(load_train_config([*run, "data.access=raw"]).training_data()).steps(0),
        ),
        8,
    ):
        assert cached.text is not None
        assert cached.captions == raw.captions
        captions += cached.captions
        task.losses(model, cached)
        task.losses(model, raw)
        from_cache, live = given[-2:]
        assert from_cache.shape == live.shape == (4, 12, 32)
        assert from_cache.dtype == live.dtype
        # Other captions were beside these when they were encoded, so a matrix product may have been another one.
        torch.testing.assert_close(from_cache, live, rtol=2**-7, atol=2**-7)
        assert torch.equal(from_cache == 0, live == 0)
    assert "" in captions


def test_processes_share_the_work_and_need_not_run_at_the_same_time(
    settings: list[str],
    small_shards: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = [setting for setting in settings if not setting.startswith("validation")]
    assert cli.main(["encode", *one]) == 0
    alone = without_times(contents(tmp_path / "latents"))
    assert len([name for name in alone if name.endswith(".tar")]) == 4
    shutil.rmtree(tmp_path / "latents")
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["encode", *one]) == 0
    out = capsys.readouterr().out
    assert "10/10" in out  # of its share
    assert "2 are left to the others" in out
    assert "Next" not in out
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["encode", *one]) == 0
    out = capsys.readouterr().out
    assert "Wrote the latents of 16 clips (4 shards" in out
    assert "Next: muybridge train" in out
    assert without_times(contents(tmp_path / "latents")) == alone
    monkeypatch.setenv("RANK", "2")
    assert cli.main(["encode", *one]) == 64


KILLED = """
import os, signal, sys
from muybridge.data import latent_writer
from muybridge.scripts import cli
latent_writer._CLIPS_PER_SHARD = 5
add, members = latent_writer._add, []
def add_or_die(*arguments):
    members.append(arguments)
    if len(members) == 3 * 13:  # in the third shard
        os.kill(os.getpid(), signal.SIGKILL)
    return add(*arguments)
latent_writer._add = add_or_die
cli.main(["encode", *sys.argv[1:]])
"""


def test_a_killed_run_goes_on_with_the_shards_that_are_missing(
    settings: list[str],
    small_shards: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    launch: Command,
) -> None:
    one = [setting for setting in settings if not setting.startswith("validation")]
    (tmp_path / "killed.py").write_text(KILLED)
    answer = launch(0, tmp_path / "killed.py", *one)
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    written = contents(tmp_path / "latents")
    assert len([name for name in written if name.endswith(".tar")]) == 2
    assert cli.main(["encode", *one]) == 0
    assert "Wrote the latents of 16 clips (4 shards" in capsys.readouterr().out
    finished = contents(tmp_path / "latents")
    assert {name: finished[name] for name in written} == written
    shutil.rmtree(tmp_path / "latents")
    assert cli.main(["encode", *one]) == 0
    assert without_times(contents(tmp_path / "latents")) == without_times(finished)


def copy_clips(source: ClipIndex, folder: Path, *, broken: tuple[int, ...]) -> Path:
    """The same dataset, with some clips whose bytes are no video."""
    with DatasetWriter(folder, kind="raw", description={"source": "test"}) as writer:
        for row in range(len(source)):
            clip = source.clip(row)
            with open(source.shards[clip.shard], "rb") as file:
                file.seek(clip.offset)
                data = file.read(clip.size)
            writer.add(clip, b"a cake" * 100 if row in broken else data, extension="mp4")
        writer.close()
    return folder


def test_a_clip_that_cannot_be_read_is_replaced_as_in_a_run_on_videos(
    settings: list[str], toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ClipIndex.open(toy_folder / "shards" / "test")
    clips = copy_clips(source, tmp_path / "clips", broken=(3, 7))
    run = [*settings, f"data.path={clips}"]
    run = [setting for setting in run if not setting.startswith("validation")]
    assert cli.main(["encode", *run]) == 0
    out = capsys.readouterr().out
    assert "Wrote the latents of 14 clips" in out
    assert f"Skipped 2 clips that cannot be read: {source.text('key', 3)}: " in out
    config = load_train_config(run)
    cached, raw = build(config.training_data()), build(load_train_config([*run, "data.access=raw"]).training_data())
    for [ours], [theirs] in islice(zip(cached.steps(0), raw.steps(0)), 8):
        assert torch.equal(ours.rows, theirs.rows)
        assert torch.equal(ours.weights, theirs.weights)
        assert ours.captions == theirs.captions
    assert {clip.row for clip in cached.ledger.clips()} == {clip.row for clip in raw.ledger.clips()} == {3, 7}
    assert {clip.reason for clip in cached.ledger.clips()} == {clip.reason for clip in raw.ledger.clips()}


def test_a_dataset_of_which_nothing_can_be_read_ends_with_76(
    settings: list[str], toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ClipIndex.open(toy_folder / "shards" / "test")
    clips = copy_clips(source, tmp_path / "clips", broken=tuple(range(16)))
    assert cli.main(["encode", *settings, f"data.path={clips}"]) == 76
    assert "not one clip of its dataset can be read" in capsys.readouterr().err


def test_a_changed_dataset_ends_with_64(
    settings: list[str], toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = ClipIndex.open(shutil.copytree(toy_folder / "shards" / "test", tmp_path / "clips"))
    clip = clips.clip(3)
    with open(clips.shards[clip.shard], "r+b") as file:
        file.seek(clip.offset)
        file.write(b"cake")
    assert cli.main(["encode", *settings, f"data.path={clips.folder}"]) == 64
    assert capsys.readouterr().err.startswith("muybridge: dataset changed under the run")


class UnavailableClip(ThreadingHTTPServer):
    """Serves the shards of a folder, all but the bytes from `offset` on."""

    def __init__(self, folder: Path, offset: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                data = (folder / self.path.lstrip("/")).read_bytes()
                self.send_response(503 if first == offset else 206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                self.send_header("Content-Length", "0" if first == offset else str(last + 1 - first))
                self.end_headers()
                self.wfile.write(b"" if first == offset else data[first : last + 1])

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing on the terminal."""

        super().__init__(("127.0.0.1", 0), Handler)


def test_a_storage_that_does_not_answer_ends_with_75_and_one_message(
    settings: list[str],
    toy_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "_FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    source = toy_folder / "shards" / "test"
    shutil.copytree(source, tmp_path / "clips", ignore=shutil.ignore_patterns("*.tar"))
    manifest = json.loads((source / "manifest.json").read_text())
    with UnavailableClip(source, ClipIndex.open(source).clip(3).offset) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for entry in manifest["shards"]:
            entry["name"] = f"http://127.0.0.1:{server.server_port}/{entry['name']}"
        (tmp_path / "clips" / "manifest.json").write_text(json.dumps(manifest))
        assert cli.main(["encode", *settings, f"data.path={tmp_path / 'clips'}"]) == 75
        server.shutdown()
    [message] = capsys.readouterr().err.splitlines()
    assert message.startswith("muybridge: http://127.0.0.1:")
    assert message.endswith("status 503; the same command goes on from there")
    assert (
        cli.main(["encode", *settings, f"data.path={tmp_path / 'clips'}"]) == 75
    )  # it does not even say how large they are
    assert "refused" in capsys.readouterr().err


def test_a_dry_run_encodes_nothing(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["encode", *settings, "dry_run=true"]) == 0
    assert capsys.readouterr().out.count("would encode") == 2
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["task=video_vae", "data.access=raw"], "task=video_vae must be text_to_video"),
        (["data.access=raw", "data.latents=null"], "data.latents must name the folder"),
        (["data.path=nowhere"], "nowhere"),
        (["vae.path=nowhere"], "vae.path=nowhere must be a folder with config.json"),
    ],
)
def test_what_cannot_be_encoded_is_refused(
    settings: list[str], change: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["encode", *settings, *change]) == 64
    assert words in capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latents" / "train").mkdir(parents=True)
    (tmp_path / "latents" / "train" / "thesis.txt").write_text("years of work")
    assert cli.main(["encode", *settings, "--overwrite"]) == 64
    assert "holds no latents" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "latents" / "train").iterdir()] == ["thesis.txt"]


def test_training_reads_what_was_encoded_and_refuses_what_is_stale(
    settings: list[str], tiny_umt5: Path, tmp_path: Path, muybridge: Command
) -> None:
    frozen = ["text.kind=umt5", f"text.path={tiny_umt5}", "text.max_tokens=12", "deepspeed=zero0", "steps=2"]
    run = [setting for setting in [*settings, *frozen] if not setting.startswith("run_dir")]
    assert cli.main(["encode", *settings, *frozen]) == 0
    answer = muybridge("train", *run, f"run_dir={tmp_path / 'run'}")
    assert answer.returncode == 0, answer.stderr
    answer = muybridge("train", *run, f"run_dir={tmp_path / 'other'}", "text.max_tokens=13")
    assert answer.returncode == 64
    assert "is stale: its text_fingerprint is " in answer.stderr
    assert "make it again with: muybridge encode --overwrite" in answer.stderr
