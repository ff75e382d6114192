import json
from pathlib import Path

import pytest
import torch

from muybridge.data.config import build_buckets
from muybridge.data.index import ClipIndex
from muybridge.data.loader import VideoLoader
from muybridge.models.vae.folder import load_vae, vae_fingerprint
from muybridge.scripts import cli
from muybridge.train.config import load_train_config


@pytest.fixture
def settings(tiny_run: list[str], toy_folder: Path, tmp_path: Path) -> list[str]:
    """A run whose latents are still to be made, from 16 clips for training and the same for validation."""
    clips = toy_folder / "shards" / "test"
    return [
        *(*tiny_run, "run_dir=runs/none", f"data.path={clips}", f"validation.path={clips}"),
        *(f"data.latents={tmp_path / 'latents'}", "data.workers=0", f"vae.path={copy_vae(toy_folder, tmp_path)}"),
    ]


def copy_vae(toy_folder: Path, folder: Path) -> Path:
    """An autoencoder that a test may change."""
    (folder / "vae").mkdir()
    for path in (toy_folder / "vae").iterdir():
        (folder / "vae" / path.name).write_bytes(path.read_bytes())
    return folder / "vae"


def written(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.tar")}


def test_latents_are_made_once_and_again_for_another_autoencoder(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = tmp_path / "latents"
    assert cli.main(["encode", *settings]) == 0
    assert "wrote the latents of 16 clips" in capsys.readouterr().out
    assert {path.name for path in latents.iterdir()} == {"train", "validation"}
    first = written(latents)

    assert cli.main(["encode", *settings]) == 0
    assert capsys.readouterr().out.count("complete and fits; kept") == 2
    assert written(latents) == first

    before = vae_fingerprint(tmp_path / "vae")
    config_path = tmp_path / "vae" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}))
    assert vae_fingerprint(tmp_path / "vae") != before
    assert cli.main(["encode", *settings]) == 0
    assert "kept" not in capsys.readouterr().out
    assert all(time != first[path] for path, time in written(latents).items())


def test_a_cached_latent_is_the_normalised_mean_of_its_clip(settings: list[str], tmp_path: Path) -> None:
    assert cli.main(["encode", *settings]) == 0
    config = load_train_config(settings)
    vae = load_vae(tmp_path / "vae").eval()
    cached = VideoLoader(
        config.training_data(),
        buckets=build_buckets(config.training_data(), global_batch=4, micro_batch=4, world_size=1),
        rank=0,
        world_size=1,
        seed=0,
    )
    raw_config = load_train_config([*settings, "data.access=raw"]).training_data()
    raw = VideoLoader(
        raw_config,
        buckets=build_buckets(raw_config, global_batch=4, micro_batch=4, world_size=1),
        rank=0,
        world_size=1,
        seed=0,
    )
    for latents, pixels in zip(cached.every_row(8), raw.every_row(8), strict=True):
        with torch.no_grad():
            expected = vae.normalise(vae.encode(pixels.pixels).mode())
        torch.testing.assert_close(latents.latents, expected, rtol=1e-4, atol=1e-5)
        assert latents.captions == pixels.captions
    index = ClipIndex.open(tmp_path / "latents" / "train")
    assert len(index) == 16


def test_a_dry_run_encodes_nothing(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["encode", *settings, "dry_run=true"]) == 0
    assert "would encode" in capsys.readouterr().out
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
    assert cli.main(["encode", *settings]) == 64
    assert "holds no latents" in capsys.readouterr().err
    assert (tmp_path / "latents" / "train" / "thesis.txt").read_text() == "years of work"
