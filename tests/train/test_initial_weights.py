"""Starting from a pipeline folder: which part of it is read, and which settings it contradicts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.pipeline_folder import write_model_index
from muybridge.models.text_to_video import TextToVideoModel
from muybridge.models.vae.folder import load_vae
from muybridge.models.weights import save_model
from muybridge.train.config import TrainConfig, load_train_config
from muybridge.train.experts import Expert
from muybridge.train.initial_weights import load_initial_weights
from muybridge.train.tasks import build_task

CPU = torch.device("cpu")
Pipeline = Callable[..., Path]


@pytest.fixture
def settings(tiny_run: list[str], tiny_umt5: Path) -> list[str]:
    """A run with a frozen text encoder, as pipelines have it."""
    return [
        *tiny_run,
        "run_dir=runs/none",
        "text=umt5_xxl",
        f"text.path={tiny_umt5}",
        "text.dim=32",
        "text.max_tokens=8",
    ]


@pytest.fixture
def config(settings: list[str]) -> TrainConfig:
    return load_train_config(settings)


@pytest.fixture
def pipeline(tmp_path: Path, config: TrainConfig, toy_folder: Path) -> Pipeline:
    """Writes a pipeline folder with one or two transformers of the tiny sizes."""

    def write(*parts: str, sizes: DiTConfig = config.model, boundary: float | None = None) -> Path:
        folder = tmp_path / "-".join(parts)
        folder.mkdir()
        for number, part in enumerate(parts):
            torch.manual_seed(10 + number)
            save_model(folder / part, sizes.to_diffusers(), DiT(sizes).state_dict())
        (folder / "vae").symlink_to(toy_folder / "vae")
        write_model_index(folder, boundary_ratio=boundary)
        return folder

    return write


def started(config: TrainConfig) -> TextToVideoModel:
    model = build_task(config, CPU).build_model()
    assert isinstance(model, TextToVideoModel)
    load_initial_weights(model, config)
    return model


@pytest.mark.parametrize(
    ("expert", "part"), [(Expert.none, "transformer"), (Expert.high, "transformer"), (Expert.low, "transformer_2")]
)
def test_a_run_starts_from_the_transformer_of_its_expert(
    expert: Expert, part: str, config: TrainConfig, pipeline: Pipeline
) -> None:
    parts = ("transformer",) if expert is Expert.none else ("transformer", "transformer_2")
    folder = pipeline(*parts, boundary=None if expert is Expert.none else 0.875)
    starting = replace(config, init_from=str(folder), expert=expert)
    assert starting.faults(1) == []
    torch.manual_seed(10 + parts.index(part))
    expected = DiT(config.model).state_dict()
    found = started(starting).transformer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_both_experts_may_start_from_a_single_transformer(config: TrainConfig, pipeline: Pipeline) -> None:
    folder = pipeline("transformer")
    high, low = (
        started(replace(config, init_from=str(folder), expert=expert)).transformer.state_dict()
        for expert in (Expert.high, Expert.low)
    )
    assert all(torch.equal(low[name], value) for name, value in high.items())


def test_an_autoencoder_starts_from_that_of_the_pipeline(
    settings: list[str], pipeline: Pipeline, toy_folder: Path
) -> None:
    vae_run = ["task=video_vae", "data.access=raw", f"init_from={pipeline('transformer')}"]
    config = load_train_config([*settings, *vae_run])
    model = build_task(config, CPU).build_model()
    load_initial_weights(model, config)
    expected = load_vae(toy_folder / "vae").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_every_size_that_differs_is_named_with_both_values(settings: list[str], pipeline: Pipeline) -> None:
    sizes = load_train_config(settings).model
    folder = pipeline("transformer", sizes=replace(sizes, num_layers=3, ffn_dim=96, eps=1e-5))
    with pytest.raises(ValueError) as error:
        load_train_config([*settings, f"init_from={folder}"])
    for words in ("model.num_layers=1 must be 3", "model.ffn_dim=64 must be 96", "model.eps=1e-06 must be 1e-05"):
        assert f"{words}, as init_from={folder / 'transformer'} has it" in str(error.value)
    assert "has 3 faults" in str(error.value)


def test_a_pipeline_of_two_experts_wants_to_know_which_and_keeps_its_boundary(
    settings: list[str], pipeline: Pipeline
) -> None:
    start = [*settings, f"init_from={pipeline('transformer', 'transformer_2', boundary=0.9)}"]
    with pytest.raises(ValueError, match=r"expert=none must be high or low: init_from=.* has two experts"):
        load_train_config(start)
    with pytest.raises(ValueError, match=r"boundary=0.875 must be 0.9, as init_from=.* has it"):
        load_train_config([*start, "expert=low"])
    assert load_train_config([*start, "expert=low", "boundary=0.9"]).noise_schedule().max_level == 0.9


def test_a_folder_of_something_else_is_named(settings: list[str], pipeline: Pipeline, tmp_path: Path) -> None:
    folder = pipeline("transformer")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"init_from=.* must be the pipeline folder of a Wan model: .*FluxPipeline"):
        load_train_config([*settings, f"init_from={folder}"])
    (tmp_path / "empty").mkdir()
    config = load_train_config([*settings, f"init_from={tmp_path / 'empty'}"])
    with pytest.raises(ValueError, match=r"init_from=.*empty must be a pipeline folder .* or the directory of a run"):
        started(config)


def test_a_missing_tensor_is_named_with_the_folder(config: TrainConfig, pipeline: Pipeline) -> None:
    folder = pipeline("transformer")
    weights = DiT(config.model).state_dict()
    del weights["proj_out.bias"]
    save_model(folder / "transformer", config.model.to_diffusers(), weights)
    with pytest.raises(ValueError, match=r"init_from=.*transformer: missing tensors: transformer.proj_out.bias"):
        started(replace(config, init_from=str(folder)))


def test_a_text_encoder_that_would_start_from_nothing_is_refused(
    settings: list[str], tiny_run: list[str], pipeline: Pipeline
) -> None:
    start = f"init_from={pipeline('transformer')}"
    with pytest.raises(
        ValueError, match=r"text.kind=bytes must be umt5, frozen, where init_from=.* is a pipeline folder"
    ):
        load_train_config([*tiny_run, "run_dir=runs/none", start])
    load_train_config([*settings, start])


def test_a_run_s_sizes_that_no_shape_shows_are_compared(
    tiny_run: list[str], tmp_path: Path, save_random_run: Callable[[Path, list[str]], Path]
) -> None:
    source = save_random_run(tmp_path / "source", tiny_run)
    start = [*tiny_run, "run_dir=runs/none", f"init_from={source}"]
    unseen = {
        "model.num_attention_heads": (1, 2),
        "model.eps": (1e-5, 1e-6),
        "model.rope_max_seq_len": (512, 1024),
        "text.num_heads": (1, 2),
    }
    with pytest.raises(ValueError) as error:
        load_train_config([*start, *(f"{name}={given}" for name, (given, _) in unseen.items())])
    for name, (given, wanted) in unseen.items():
        assert f"{name}={given} must be {wanted}, as init_from={source} has it" in str(error.value)
    assert f"has {len(unseen)} faults" in str(error.value)
    load_train_config([*start, "model.self_attention.pattern=block_causal"])


def test_a_run_with_another_kind_of_text_encoder_is_named(
    settings: list[str], tiny_run: list[str], tmp_path: Path, save_random_run: Callable[[Path, list[str]], Path]
) -> None:
    source = save_random_run(tmp_path / "source", tiny_run)
    with pytest.raises(
        ValueError, match=r"has 1 fault:\n.* text.kind=umt5 must be bytes, as init_from=.*source has it"
    ):
        load_train_config([*settings, f"init_from={source}"])


def test_a_run_starts_from_whichever_weights_of_another_are_asked_for(
    tiny_run: list[str], tmp_path: Path, save_random_run: Callable[[Path, list[str]], Path], pipeline: Pipeline
) -> None:
    source = save_random_run(tmp_path / "source", [*tiny_run, "ema.decays=[0.99,0.9]"])
    start = [*tiny_run, "run_dir=runs/none", f"init_from={source}"]
    models = [
        started(load_train_config([*start, f"init_weights={kind}"])).state_dict() for kind in ("raw", "ema", "ema-0.9")
    ]
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value / 2)
        torch.testing.assert_close(models[2][name], value / 4)
    with pytest.raises(
        ValueError, match=r"init_weights=ema-0.5 must be raw, ema \(ema-0.99\) or one of ema-0.99, ema-0.9"
    ):
        load_train_config([*start, "init_weights=ema-0.5"])
    with pytest.raises(ValueError, match=r"init_weights=raw must be ema where init_from=.*transformer is not a run"):
        load_train_config([*tiny_run, "run_dir=r", "init_weights=raw", f"init_from={pipeline('transformer')}"])
