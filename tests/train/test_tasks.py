"""What is trained: losses that do not depend on how samples are split, and a fixed batch that is learned."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muybridge.data.config import build_buckets
from muybridge.data.loader import VideoLoader
from muybridge.models.vae.config import VAEConfig
from muybridge.models.weights import load_config
from muybridge.train.config import TrainConfig, load_train_config
from muybridge.train.optimizer import build_optimizer
from muybridge.train.tasks import TextToVideoTask, VideoVAETask, build_task

CPU = torch.device("cpu")
TASKS = {
    "text_to_video": [],
    "video_vae": [
        "task=video_vae",
        "data.access=raw",
        "data.workers=0",
        "data.frames=5",
        "data.height=32",
        "data.width=32",
        "global_batch=2",
        "micro_batch=2",
    ],
}


@pytest.fixture(scope="module", params=list(TASKS))
def config(request: pytest.FixtureRequest, tiny_run: list[str]) -> TrainConfig:
    """The settings of each task."""
    return load_train_config([*tiny_run, "run_dir=runs/none", *TASKS[request.param]])


@pytest.fixture(scope="module")
def loader(config: TrainConfig) -> VideoLoader:
    """The clips or latents of those settings."""
    size = config.global_batch
    return VideoLoader(
        config.training_data(),
        buckets=build_buckets(config.training_data(), global_batch=size, micro_batch=size, world_size=1),
        rank=0,
        world_size=1,
        seed=config.seed,
    )


def test_a_fixed_batch_is_learned(config: TrainConfig, loader: VideoLoader) -> None:
    (batch,) = next(loader.steps(0))
    task = build_task(config, CPU)
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = build_optimizer(model, replace(config.optimizer, lr=3e-3))
    losses = []
    for _ in range(40):
        loss = task.losses(model, batch).total.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_losses_do_not_depend_on_the_split_into_micro_batches(config: TrainConfig, loader: VideoLoader) -> None:
    (whole,) = next(loader.steps(3))
    task = build_task(config, CPU)
    torch.manual_seed(0)
    model = task.build_model()
    half = VideoLoader(
        config.training_data(),
        buckets=build_buckets(
            config.training_data(), global_batch=config.global_batch, micro_batch=config.global_batch // 2, world_size=1
        ),
        rank=0,
        world_size=1,
        seed=config.seed,
    )
    with torch.no_grad():
        expected = task.losses(model, whole).total
        parts = torch.cat([task.losses(model, batch).total for batch in next(half.steps(3))])
        again = task.losses(model, whole).total
        validation = task.losses(model, whole, purpose="validation/").total
    torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(again, expected)
    assert not torch.equal(validation, expected)  # other noise than in training, but always the same


def test_an_exported_transformer_holds_its_weights_alone(tiny_run: list[str], tmp_path: Path) -> None:
    config = load_train_config([*tiny_run, "run_dir=runs/none"])
    task = TextToVideoTask(config, CPU)
    model = task.build_model()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    folder = task.export(tmp_path, weights, iter(()))
    exported = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == {name.removeprefix("transformer.") for name in weights if name.startswith("transformer.")}
    assert load_config(folder)["_class_name"] == "WanTransformer3DModel"


def test_an_exported_autoencoder_knows_the_statistics_of_its_latents(tiny_run: list[str], tmp_path: Path) -> None:
    config = load_train_config([*tiny_run, "run_dir=runs/none", *TASKS["video_vae"]])
    task = VideoVAETask(config, CPU)
    torch.manual_seed(0)
    weights = {name: parameter.detach() for name, parameter in task.build_model().named_parameters()}
    loader = VideoLoader(
        config.training_data(),
        buckets=build_buckets(config.training_data(), global_batch=1, micro_batch=1, world_size=1),
        rank=0,
        world_size=1,
        seed=0,
    )
    folder = task.export(tmp_path, weights, loader.every_row(8))
    exported = VAEConfig.from_diffusers(load_config(folder))
    assert len(exported.latents_mean) == len(exported.latents_std) == config.vae.resolved().z_dim
    assert all(deviation > 0 for deviation in exported.latents_std)
    # Normalised by them, the latents of the same clips have mean 0 and deviation 1.
    model = VideoVAETask(config, CPU).build_model()
    model.load_state_dict(weights)
    with torch.no_grad():
        latents = torch.cat([model.encode(batch.pixels).mode() for batch in loader.every_row(8)])  # [B, z, T', H', W']
    per_channel = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(per_channel.mean(1), torch.tensor(exported.latents_mean), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(per_channel.std(1), torch.tensor(exported.latents_std), rtol=1e-3, atol=1e-4)
