"""`muybridge sample model=FOLDER` as a user meets it: from import to mp4s, and what it refuses before weights are read."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muybridge.data.decode import read_frames
from muybridge.scripts import cli, sample_sources
from muybridge.tests.scripts.pipeline_folders import write_folder

SIZE = ["frames=9", "height=32", "width=48", "fps=8", "steps=2"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two prompts and two images."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\nblue squares\n")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    for name, values in zip(("first.png", "last.png"), pixels, strict=True):
        Image.fromarray(values).save(name)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "images"),
    [("text", ""), ("clip", " image=first.png"), ("between", " image=first.png last_image=last.png")],
)
def test_the_command_that_import_prints_makes_videos(
    kind: str, images: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(Path("source"), kind=kind)
    assert cli.main(["import", "source", "model"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    assert line == f"Next: muybridge sample model=model prompts=prompts.txt{images}"
    command = shlex.split(line.removeprefix("Next: muybridge "))
    assert cli.main([*command, *SIZE]) == 0
    assert [path.name for path in sorted(Path("samples").iterdir())] == [
        "0000-a-red-circle.mp4", "0001-blue-squares.mp4", "contact_sheet.png",
    ]  # fmt: skip


def test_frames_are_decoded_in_tiles_on_request(workplace: Path) -> None:
    write_folder(Path("model"), kind="text")
    videos = {}
    for tile in ("null", "64", "16"):
        settings = [*SIZE, "width=64", f"out=tile-{tile}", f"tile={tile}"]
        assert cli.main(["sample", "model=model", "prompts=prompts.txt", *settings]) == 0
        data = Path(f"tile-{tile}", "0000-a-red-circle.mp4").read_bytes()
        videos[tile] = read_frames(data, [number / 8 for number in range(9)]).astype(int)
    assert abs(videos["64"] - videos["null"]).mean() < 0.5, "a tile as large as the frame is the frame"
    # This autoencoder attends over whole frames, and so shows its tiles.
    assert 0.5 < abs(videos["16"] - videos["null"]).mean() < 0.5 * videos["null"].std()


def without(part: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        shutil.rmtree(folder / part)
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {part: [None, None]}))

    return remove


def with_config(part: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = folder / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))

    return change


def without_weights(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


REFUSALS: dict[str, tuple[str, Callable[[Path], None] | None, list[str], list[str]]] = {
    "a wrong autoencoder": (
        "text", with_config("vae", z_dim=16, latents_mean=[0.0] * 16, latents_std=[1.0] * 16), [],
        ["makes latents of 8 channels and model/vae has 16"],
    ),
    "text of another width": (
        "text", with_config("text_encoder", d_model=64), [],
        ["takes text features of width 32, and those of model/text_encoder have 64"],
    ),
    "image features of another width": (
        "clip", with_config("image_encoder", hidden_size=64), ["image=first.png"],
        ["takes image features of width 48, and model/image_encoder makes 64"],
    ),
    "a missing part": ("text", without("tokenizer"), [], ["model=model lacks tokenizer/"]),
    "no weights": ("text", without_weights, [], ["model/transformer: must hold diffusion_pytorch_model.safetensors"]),
    "a size": (
        "text", None, ["frames=10", "height=33", "width=0"],
        ["frames=10 must be 1 + a multiple of 4", "height=33 must be a multiple of 8", "width=0 must be a multiple"],
    ),
    "a tile": ("text", None, ["tile=10"], ["tile=10 must be a multiple of 4, at least 8"]),
    "an image for text alone": (
        "text", None, ["image=first.png"], ["image=first.png must be left out: model makes videos of text alone"]
    ),
    "no image": ("image", None, [], ["image=FILE must be given: model makes videos that begin with an image"]),
    "a last image alone": ("image", None, ["last_image=last.png"], ["image=FILE must be given"]),
    "no last image": (
        "between", None, ["image=first.png"], ["last_image=FILE must be given: model makes videos between two images"]
    ),
    "a last image among clean frames": (
        "clean", None, ["image=first.png", "last_image=last.png"],
        ["last_image=last.png must be left out: model takes a first image only"],
    ),
    "one frame": ("clean", None, ["image=first.png", "frames=1"], ["frames=1 must be more than the images given, 1"]),
    "no picture": ("image", None, ["image=prompts.txt"], ["image=prompts.txt cannot be read"]),
    "no last picture": (
        "image", None, ["image=first.png", "last_image=nowhere.png"], ["last_image=nowhere.png cannot be read"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_sampled_is_refused_before_weights_are_read(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_weights(*args: object, **options: object) -> None:
        raise AssertionError("weights were read")

    for reader in ("load_weights_from", "load_vae", "Umt5TextEncoder", "ClipImageEncoder"):
        monkeypatch.setattr(sample_sources, reader, no_weights)
    kind, damage, settings, words = REFUSALS[name]
    write_folder(Path("model"), kind=kind)
    if damage is not None:
        damage(Path("model"))
    assert cli.main(["sample", "model=model", "prompts=prompts.txt", *SIZE, *settings]) == 64
    printed = capsys.readouterr().err
    assert all(word in printed for word in words), printed
    assert not Path("samples").exists()
