import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muybridge.data.decode import read_frames
from muybridge.scripts import cli

PROMPTS = ["a red circle moving left", "", "../../etc/passwd", "ein blaues Dreieck ↑", "a red circle moving left"]


@pytest.fixture
def run_dir(tiny_run: list[str], save_random_run: Callable[[Path, list[str]], Path], tmp_path: Path) -> Path:
    return save_random_run(tmp_path / "run", [*tiny_run, "sampler.steps=2"])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of prompts, one of them twice; its empty line is no prompt."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def frames_of(folder: Path) -> list[np.ndarray]:
    """The frames of every mp4, in the order of their numbers."""
    times = [number / 8 for number in range(9)]
    return [read_frames(path.read_bytes(), times).astype(int) for path in sorted(folder.glob("*.mp4"))]


def test_each_prompt_gets_a_video_whatever_is_sampled_together(run_dir: Path, prompts: Path, tmp_path: Path) -> None:
    for batch in ("1", "3"):
        sampled = [f"run={run_dir}", f"prompts={prompts}", f"out={tmp_path / batch}", f"batch={batch}"]
        assert cli.main(["sample", *sampled]) == 0
    names = [path.name for path in sorted((tmp_path / "1").glob("*.mp4"))]
    assert names == [
        "0000-a-red-circle-moving-left.mp4",
        "0001-etc-passwd.mp4",
        "0002-ein-blaues-dreieck.mp4",
        "0003-a-red-circle-moving-left.mp4",
    ]
    alone, together = frames_of(tmp_path / "1"), frames_of(tmp_path / "3")
    for one, other in zip(alone, together, strict=True):
        assert one.shape == (9, 64, 64, 3)
        assert abs(one - other).mean() < 0.5
    # The same prompt at another place has other noise.
    assert abs(alone[0] - alone[3]).mean() > 1
    sheet = Image.open(tmp_path / "1" / "contact_sheet.png")
    assert sheet.width > 64
    assert sheet.height > 4 * 64


def test_seed_weights_and_sampler_settings_change_the_videos(run_dir: Path, prompts: Path) -> None:
    videos = {}
    for change in ("seed=0", "seed=1", "weights=raw", "guidance_scale=9", "steps=5"):
        assert cli.main(["sample", f"run={run_dir}", f"prompts={prompts}", change]) == 0
        videos[change] = frames_of(run_dir / "samples")[0]
    for change, video in videos.items():
        if change != "seed=0":
            assert abs(video - videos["seed=0"]).mean() > 0.5, change


def test_a_dry_run_samples_nothing(run_dir: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", f"run={run_dir}", f"prompts={prompts}", "dry_run=true"]) == 0
    assert "would sample 4 prompts from" in capsys.readouterr().out
    assert not (run_dir / "samples").exists()


def break_checkpoint(run_dir: Path) -> None:
    shard = run_dir / "checkpoints/step-00000004/shard-00000-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def make_vae_run(run_dir: Path) -> None:
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("task: text_to_video", "task: video_vae"))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no checkpoint": (lambda run_dir: shutil.rmtree(run_dir / "checkpoints"), "has no checkpoint yet"),
    "a damaged checkpoint": (break_checkpoint, "shard-00000-of-00001.safetensors does not match"),
    "no settings": (lambda run_dir: (run_dir / "config.yaml").unlink(), "must be the directory of a training run"),
    "an autoencoder's run": (make_vae_run, "has task=video_vae; sampling needs a text_to_video run"),
    "no prompts file": (lambda run_dir: (run_dir.parent / "prompts.txt").unlink(), "must be a text file"),
    "no prompt": (lambda run_dir: (run_dir.parent / "prompts.txt").write_text("\n \n"), "holds no prompt"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_cannot_be_sampled_is_refused(
    name: str, run_dir: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = BREAKS[name]
    damage(run_dir)
    assert cli.main(["sample", f"run={run_dir}", f"prompts={prompts}"]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("batch=0", "batch=0 must be at least 1"),
        ("steps=0", "sampler.steps=0"),
        ("prompt=a", "prompt is not a setting of SampleConfig, did you mean prompts?"),
        ("weights=best", "weights=best must be raw, ema (ema-0.9999) or one of ema-0.9999, which"),
        ("run=''", "run=RUN_DIR or model=FOLDER, and prompts=FILE must both be given"),
    ],
)
def test_a_mistaken_setting_is_named(
    change: str, words: str, run_dir: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", f"run={run_dir}", f"prompts={prompts}", change]) == 64
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_named_with_what_makes_one(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", f"model={tmp_path}", f"prompts={prompts}"]) == 64
    assert f"model={tmp_path} must be a pipeline folder, with model_index.json" in capsys.readouterr().err
    assert cli.main(["sample", f"model={tmp_path}", f"prompts={prompts}", "weights=raw"]) == 64
    assert "weights=raw needs run=RUN_DIR: a folder has one set of weights" in capsys.readouterr().err
