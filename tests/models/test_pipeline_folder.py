import json
from pathlib import Path
from typing import Any

import pytest

from muybridge.models.pipeline_folder import PipelineFiles, is_pipeline_folder, write_model_index

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("config.json", {"_class_name": "WanTransformer3DModel", "in_channels": 16, "out_channels": 16}),
    "transformer_2": ("config.json", {"_class_name": "WanTransformer3DModel", "in_channels": 16, "out_channels": 16}),
    "vae": ("config.json", {"_class_name": "AutoencoderKLWan"}),
    "text_encoder": ("config.json", {"architectures": ["UMT5EncoderModel"]}),
    "tokenizer": ("tokenizer_config.json", {"tokenizer_class": "T5TokenizerFast"}),
    "scheduler": ("scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}),
    "image_encoder": ("config.json", {"architectures": ["CLIPVisionModel"]}),
    "image_processor": ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}),
}
ONE_EXPERT = ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"]


def make_folder(folder: Path, parts: list[str]) -> Path:
    for part in parts:
        (folder / part).mkdir(parents=True)
        name, content = CONFIGS[part]
        (folder / part / name).write_text(json.dumps(content))
    return folder


def test_what_is_written_is_found(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ONE_EXPERT)
    assert not is_pipeline_folder(folder)
    write_model_index(folder, expand_timesteps=True)
    assert is_pipeline_folder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    assert index["transformer_2"] == [None, None]
    assert "image_encoder" not in index
    files = PipelineFiles.find(folder)
    assert files.class_name == "WanPipeline"
    assert files.vae == folder / "vae"
    assert files.transformer_2 is None
    assert files.boundary_ratio is None
    assert files.expand_timesteps


def test_two_experts_have_a_boundary(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, [*ONE_EXPERT, "transformer_2"])
    with pytest.raises(ValueError, match="boundary_ratio=None must be given with transformer_2"):
        write_model_index(folder)
    index = write_model_index(folder, boundary_ratio=0.875)
    files = PipelineFiles.find(folder)
    assert (files.transformer_2, files.boundary_ratio) == (folder / "transformer_2", 0.875)
    for value in (None, [0.875]):
        (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": value}))
        with pytest.raises(ValueError, match=r"model_index\.json: transformer_2 must come with .* a boundary_ratio"):
            PipelineFiles.find(folder)


def test_a_boundary_without_a_second_expert_is_passed_over(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ONE_EXPERT)
    with pytest.raises(ValueError, match="and only then"):
        write_model_index(folder, boundary_ratio=0.875)
    index = write_model_index(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.875}))
    assert PipelineFiles.find(folder).boundary_ratio is None


def test_more_input_channels_make_an_image_pipeline(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, [*ONE_EXPERT, "image_encoder", "image_processor"])
    config = CONFIGS["transformer"][1] | {"in_channels": 36}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    index = write_model_index(folder)
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert index["image_encoder"] == ["transformers", "CLIPVisionModel"]
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]
    assert PipelineFiles.find(folder).image_encoder == folder / "image_encoder"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "_class_name=StableDiffusionPipeline must be WanPipeline"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "names image_encoder, which must be folders"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "names transformer_2"),
        (
            {"vae": "AutoencoderKLWan", "scheduler": ["diffusers"]},
            r"model_index\.json: vae, scheduler must be a library",
        ),
    ],
)
def test_an_index_that_does_not_fit_its_folder_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ONE_EXPERT)
    index = write_model_index(folder) | change
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        PipelineFiles.find(folder)


def test_no_index_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_index\.json: no such file"):
        PipelineFiles.find(tmp_path)


def test_a_part_may_be_absent(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ONE_EXPERT)
    index = write_model_index(folder) | {"text_encoder": [None, None]}
    del index["tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    files = PipelineFiles.find(folder)
    assert (files.text_encoder, files.tokenizer) == (None, None)
