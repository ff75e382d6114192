"""The image encoder against transformers' CLIP and the image-to-video pipeline of diffusers, on folders that they write."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muybridge.data.pixels import to_frames
from muybridge.models.image_encoder import PROCESSOR_NAME, ClipImageEncoder, ImagePreparation, image_feature_dim

transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
Image = pytest.importorskip("PIL.Image")


def clip_processor(**settings: Any) -> Any:
    return transformers.CLIPImageProcessorPil(**settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a small tower of random weights, biases and norms."""
    root = tmp_path_factory.mktemp("pipeline")
    config = transformers.CLIPVisionConfig(
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0, std=0.2)
    model.save_pretrained(root / "image_encoder")
    clip_processor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        root / "image_processor"
    )
    return root


def draw_images(count: int, height: int, width: int) -> list[Any]:
    """Pillow images of smooth colours with hard edges and noise, which bicubic resizing overshoots at."""
    generator = np.random.default_rng(height * width)
    rows, columns = np.mgrid[:height, :width]
    images = []
    for phase in range(count):
        waves = [127 + 127 * np.sign(np.sin(rows / (3 + colour) + columns / 5 + phase)) for colour in range(3)]
        noisy = np.stack(waves, -1) + generator.normal(0, 30, (height, width, 3))
        images.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return images


def as_tensor(images: list[Any]) -> Tensor:
    """[B, 3, H, W] in [-1, 1]."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 127.5 - 1


@pytest.mark.parametrize("size", [(224, 224), (480, 832), (130, 97), (333, 1024), (40, 31)])
def test_images_are_prepared_as_clip_does(size: tuple[int, int], tmp_path: Path) -> None:
    processor = clip_processor()
    processor.save_pretrained(tmp_path)
    images = draw_images(2, *size)
    expected = processor(images=images, return_tensors="pt").pixel_values
    found = ImagePreparation.from_file(tmp_path / PROCESSOR_NAME)(as_tensor(images))
    assert found.shape == expected.shape
    level = 1 / 255 / min(processor.image_std)
    # Pillow's weights are whole numbers, so a pixel that falls between two levels may go to the other one.
    assert (found - expected).abs().max() < 1.01 * level
    assert ((found - expected).abs() > 1e-5).float().mean() < 1e-3


def test_features_are_those_of_the_image_to_video_pipeline(folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
    images = draw_images(2, 45, 61)
    stages = SimpleNamespace(
        image_processor=transformers.CLIPImageProcessorPil.from_pretrained(folder / "image_processor"),
        image_encoder=transformers.CLIPVisionModel.from_pretrained(folder / "image_encoder"),
        _execution_device=torch.device("cpu"),
    )
    with torch.no_grad():
        expected = diffusers.WanImageToVideoPipeline.encode_image(stages, images)
    encoder = ClipImageEncoder(folder)
    found = encoder.encode(as_tensor(images))
    assert found.shape == (2, 5, encoder.feature_dim) == expected.shape
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_features_of_prepared_pixels_are_exactly_the_states_before_the_last_layer(folder: Path) -> None:
    images = as_tensor(draw_images(3, 28, 28))
    encoder = ClipImageEncoder(folder)
    reference = transformers.CLIPVisionModel.from_pretrained(folder / "image_encoder")
    with torch.no_grad():
        states = reference(encoder.preparation(images), output_hidden_states=True).hidden_states
    found = encoder.encode(images)
    assert torch.equal(found, states[-2])
    assert (found - states[-1]).abs().max() > 0.1


def test_the_encoder_is_frozen_and_takes_the_dtype_it_is_given(folder: Path) -> None:
    encoder = ClipImageEncoder(folder, dtype=torch.bfloat16).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    features = encoder.encode(as_tensor(draw_images(1, 30, 40)))
    assert features.dtype == torch.bfloat16
    assert not features.requires_grad


def test_frames_between_two_levels_are_rounded_as_written_images_are(folder: Path) -> None:
    """A frame out of a decoder is prepared as the image that would be saved of it."""
    frames = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    preparation = ClipImageEncoder(folder).preparation
    saved = as_tensor([Image.fromarray(frame[0]) for frame in to_frames(frames.unsqueeze(2))])
    assert torch.equal(preparation(frames), preparation(saved))


def test_published_folders_keep_their_older_names(folder: Path, tmp_path: Path) -> None:
    """Weights that were saved under `vision_model.` load, too."""
    copy_folder(folder, tmp_path)
    path = tmp_path / "image_encoder" / "model.safetensors"
    weights = load_file(path)
    prefixed = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in weights.items()}
    save_file(prefixed, path, metadata={"format": "pt"})
    images = as_tensor(draw_images(1, 30, 40))
    assert torch.equal(ClipImageEncoder(tmp_path).encode(images), ClipImageEncoder(folder).encode(images))


@pytest.mark.parametrize("name", ["image_encoder", "image_processor"])
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    copy_folder(folder, tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name}/ is missing"):
        ClipImageEncoder(tmp_path)


def test_missing_tensors_are_refused_rather_than_drawn_at_random(folder: Path, tmp_path: Path) -> None:
    copy_folder(folder, tmp_path)
    path = tmp_path / "image_encoder" / "model.safetensors"
    weights = load_file(path)
    (gone,) = [name for name in weights if name.endswith("layers.1.mlp.fc1.bias")]
    del weights[gone]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors missing, among them .*layers\.1\.mlp\.fc1\.bias"):
        ClipImageEncoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"do_center_crop": False}, "do_center_crop=False must be True"),
        ({"resample": 2}, "resample=2 must be 3"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0 must be 1/255"),
        ({"size": {"height": 28, "width": 28}}, "must hold size.shortest_edge"),
        ({"crop_size": {"height": 40, "width": 28}}, "must fit the resized image's short edge, 28"),
        ({"crop_size": {"height": 14, "width": 14}}, "must be that of the image encoder"),
        ({"image_std": [0.5, 0.5]}, "must be three numbers"),
    ],
)
def test_other_ways_to_prepare_an_image_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], rule: str
) -> None:
    copy_folder(folder, tmp_path)
    path = tmp_path / "image_processor" / PROCESSOR_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rule):
        ClipImageEncoder(tmp_path)


def test_the_width_of_the_features_is_known_before_the_weights_are_read(folder: Path, tmp_path: Path) -> None:
    assert image_feature_dim(folder) == ClipImageEncoder(folder).feature_dim
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: hidden_size=None must be"):
        image_feature_dim(tmp_path)


def test_other_shapes_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"images \[3, 28, 28\] must be \[B, 3, H, W\]"):
        ClipImageEncoder(folder).encode(torch.zeros(3, 28, 28))


def copy_folder(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
