"""Training under conditions and of experts: what the model is called with, and which settings contradict each other."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from muybridge.data.batch import VideoBatch
from muybridge.data.config import build_buckets
from muybridge.data.loader import VideoLoader
from muybridge.models.diffusion.conditioning import ConditioningForm
from muybridge.train.config import TrainConfig, load_train_config
from muybridge.train.tasks import TextToVideoTask

CPU = torch.device("cpu")
# Two latent frames in a clip of five; of nine, three.
RAW = ["data.access=raw", "data.workers=0", "data.frames=5", "global_batch=4", "micro_batch=4"]
CLEAN = ["conditioning.form=clean_frames", "conditioning.t2v=0.25", "conditioning.i2v=0.25"]
CLEAN += ["conditioning.continuation=0.25", "conditioning.inpainting=0.25"]
CHANNELS = ["conditioning.form=channels", "conditioning.i2v=0.5", "conditioning.inpainting=0.5", "model.in_channels=36"]


class SeeingModel:
    """Stands in for the transformer: keeps what it is called with and says that nothing moves."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, ...]] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls.append(inputs)
        return torch.zeros_like(inputs[0][:, :16])


def settings(tiny_run: list[str], *more: str) -> TrainConfig:
    return load_train_config([*tiny_run, "run_dir=runs/none", *more])


def micro_batches(config: TrainConfig, size: int, step: int = 3) -> list[VideoBatch]:
    """The clips of a step in micro-batches of `size`."""
    data = config.training_data()
    buckets = build_buckets(data, global_batch=config.global_batch, micro_batch=size, world_size=1)
    return next(VideoLoader(data, buckets=buckets, rank=0, world_size=1, seed=config.seed).steps(step))


def seen(config: TrainConfig, batch: VideoBatch, purpose: str = "") -> tuple[tuple[Tensor, ...], Tensor]:
    """What the model is called with for a batch, and the losses."""
    model = SeeingModel()
    losses = TextToVideoTask(config, CPU).losses(model, batch, purpose=purpose).total
    [inputs] = model.calls
    return inputs, losses


@pytest.mark.parametrize("more", [CLEAN, [*RAW, *CHANNELS]], ids=["clean_frames", "channels"])
def test_conditions_do_not_depend_on_the_split_into_micro_batches(more: list[str], tiny_run: list[str]) -> None:
    config = settings(tiny_run, *more)
    [whole] = micro_batches(config, config.global_batch)
    inputs, losses = seen(config, whole)
    parts = [seen(config, part) for part in micro_batches(config, config.global_batch // 2)]
    torch.testing.assert_close(torch.cat([part[0][0] for part in parts]), inputs[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([part[0][1] for part in parts]), inputs[1])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), losses, rtol=1e-5, atol=1e-6)


def test_cached_latents_are_known_clean_at_timestep_0(tiny_run: list[str]) -> None:
    config = settings(tiny_run, "conditioning.form=clean_frames")
    [batch] = micro_batches(config, config.global_batch)
    (noisy, timestep, _), _ = seen(config, batch)
    assert batch.latents is not None
    assert torch.equal(noisy[:, :, 0], batch.latents[:, :, 0].float())
    assert not torch.equal(noisy[:, :, 1:], batch.latents[:, :, 1:].float())
    assert timestep.shape == (len(batch), 3)
    assert torch.equal(timestep[:, 0], torch.zeros(len(batch)))
    assert (timestep[:, 1:] > 0).all()
    # With all samples of text alone, the same noise falls on everything.
    of_text = settings(tiny_run, "conditioning.form=clean_frames", "conditioning.t2v=1", "conditioning.i2v=0")
    (everything, timestep_of_text, _), _ = seen(of_text, batch)
    assert torch.equal(everything[:, :, 1:], noisy[:, :, 1:])
    assert not torch.equal(everything[:, :, 0], noisy[:, :, 0])
    assert torch.equal(timestep_of_text[:, 1:], timestep[:, 1:])


def test_the_real_model_takes_timesteps_of_frames_and_of_tokens(tiny_run: list[str]) -> None:
    config = settings(tiny_run, *CLEAN)
    [batch] = micro_batches(config, config.global_batch)
    task = TextToVideoTask(config, CPU)
    model = task.build_model()
    losses = task.losses(model, batch).total
    losses.sum().backward()
    assert losses.shape == (len(batch),)
    assert losses.isfinite().all()


def test_image_channels_are_of_the_clips_first_frames(tiny_run: list[str]) -> None:
    config = settings(tiny_run, *RAW, "conditioning.form=channels", "model.in_channels=36")
    [batch] = micro_batches(config, config.global_batch)
    (inputs, timestep, _), _ = seen(config, batch)
    assert timestep.shape == (len(batch),)
    assert inputs.shape[1] == 36
    mask, images = inputs[:, 16:20], inputs[:, 20:]
    assert torch.equal(mask[:, :, 0], torch.ones_like(mask[:, :, 0]))
    assert torch.equal(mask[:, :, 1:], torch.zeros_like(mask[:, :, 1:]))
    task = TextToVideoTask(config, CPU)
    shown = torch.zeros_like(batch.pixels)
    shown[:, :, 0] = batch.pixels[:, :, 0]
    torch.testing.assert_close(images, task.encode_video(shown), rtol=1e-5, atol=1e-5)


def test_validation_sees_the_same_conditions_each_time_and_others_than_training(tiny_run: list[str]) -> None:
    config = settings(tiny_run, *CLEAN)
    [batch] = micro_batches(config, config.global_batch)
    (_, training, _), _ = seen(config, batch)
    (_, first, _), loss = seen(config, batch, "validation/")
    (_, second, _), again = seen(config, batch, "validation/")
    assert torch.equal(first, second)
    assert torch.equal(loss, again)
    assert not torch.equal(first == 0, training == 0)


def test_image_features_are_of_the_first_frame_as_far_as_it_is_known(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_run, *RAW, "conditioning.form=channels", "model.in_channels=36")
    config.model.image_dim = 3
    [batch] = micro_batches(config, config.global_batch)

    class MeanColour:
        def encode(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)).unsqueeze(1)  # [B, 1, 3]

    def features(config: TrainConfig) -> Tensor:
        task, model = TextToVideoTask(config, CPU), SeeingModel()
        monkeypatch.setattr(task.conditions, "_image_encoder", MeanColour())
        task.losses(model, batch)
        [(_, _, _, found)] = model.calls
        return found

    torch.testing.assert_close(features(config), batch.pixels[:, :, 0].mean((2, 3)).unsqueeze(1))
    task = TextToVideoTask(config, CPU)
    monkeypatch.setattr(task.conditions, "_image_encoder", MeanColour())
    assert task.losses(task.build_model(), batch).total.isfinite().all()
    unknown = replace(config, conditioning=replace(config.conditioning, i2v=0.0, t2v=1.0))
    assert torch.equal(features(unknown), torch.zeros((len(batch), 1, 3)))


@pytest.mark.parametrize(("expert", "low", "high"), [("high", 875.0, 1000.0), ("low", 0.0, 875.0)])
def test_an_expert_trains_on_its_side_of_the_boundary(
    expert: str, low: float, high: float, tiny_run: list[str]
) -> None:
    config = settings(tiny_run, f"expert={expert}", "objective.shift=5")
    timesteps = []
    for step in range(4):
        [batch] = micro_batches(config, config.global_batch, step)
        timesteps.append(seen(config, batch)[0][1])
    drawn = torch.cat(timesteps)
    assert (drawn >= low).all()
    assert (drawn <= high).all()
    assert drawn.max() - drawn.min() > 0.5 * (high - low)


TI2V = ["+experiment=wan_1_3b_480p", "dry_run=true", "conditioning.form=clean_frames"]
I2V = ["+experiment=wan_i2v", "dry_run=true"]
EXPERTS = ["+experiment=wan2_2_a14b_two_experts", "dry_run=true"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "a VAE of Wan 2.2 with a model of 2.1": (
        [*TI2V, "vae=wan_2_2"],
        "model.in_channels and out_channels=16 must be the autoencoder's z_dim=48: they are of different models",
    ),
    "a model of images without one": (
        [*I2V, "conditioning.form=none"],
        "model.in_channels=36 must be the autoencoder's z_dim=16, or conditioning.form must be channels",
    ),
    "a model of text with image channels": (
        [*TI2V, "conditioning.form=channels"],
        "model.in_channels=16 must be 36 with conditioning.form=channels: 16 of noise, 4 of a mask, 16 of image latents",
    ),
    "cached latents": (
        [*I2V, "data.access=latents", "data.latents=latents"],
        "data.access=latents must be raw or stream with conditioning.form=channels",
    ),
    "shares": ([*TI2V, "conditioning.t2v=0.5"], "conditioning.t2v and the other shares must sum to 1"),
    "single images": ([*TI2V, "data.frames=1"], "conditioning.i2v=1.0: 1 known frames must be fewer than the clips' 1"),
    "all frames": (
        [*I2V, "conditioning.continuation_frames=81"],
        "conditioning.continuation_frames=81: 81 known frames must be fewer than the clips' 81",
    ),
    "part of a latent frame": (
        [*TI2V, "conditioning.i2v=0", "conditioning.continuation=1", "conditioning.continuation_frames=6"],
        "conditioning.continuation_frames=6: 6 known frames must be 1 + a multiple of 4",
    ),
    "part of a token": (
        [*TI2V, "model.patch_size=[3,2,2]"],
        "conditioning.i2v=1.0: 1 known frames must be a multiple of 12, less 3",
    ),
    "prompts of an expert": (
        [*EXPERTS, "validation.prompts=[a cat]", "validation.every_steps=5"],
        "validation.prompts=['a cat'] must be empty with expert=high (a video takes both)",
    ),
    "prompts without images": (
        [*I2V, "validation.prompts=[a cat]", "validation.every_steps=5"],
        "must be empty with conditioning.form=channels (a video takes an image)",
    ),
    "boundary": ([*EXPERTS, "boundary=1"], "boundary=1.0 must lie between 0 and 1"),
    "levels of both experts": (
        [*EXPERTS, "objective.min_level=0.5"],
        "objective.min_level=0.5 must be 0 or from boundary=0.875 on with expert=high",
    ),
    "levels of the other expert": (
        [*EXPERTS, "objective.max_level=0.8"],
        "objective.max_level=0.8 must be above boundary=0.875 with expert=high",
    ),
    "levels above the low expert": (
        [*EXPERTS, "expert=low", "objective.max_level=0.9"],
        "objective.max_level=0.9 must be 1 or up to boundary=0.875 with expert=low",
    ),
    "levels not of the low expert": (
        [*EXPERTS, "expert=low", "objective.min_level=0.9"],
        "objective.min_level=0.9 must be below boundary=0.875 with expert=low",
    ),
    "an autoencoder's expert": (
        ["+experiment=quickstart_vae", "dry_run=true", "expert=low"],
        "expert=low must be none with task=video_vae",
    ),
    "image features from nowhere": (
        [*I2V, "model.image_dim=1280"],
        "model.image_dim=1280 must come with conditioning.form=channels and conditioning.image_encoder",
    ),
    "image features for nobody": (
        [*I2V, "conditioning.image_encoder=weights/any"],
        "conditioning.image_encoder=weights/any must be null where model.image_dim is null",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_settings_that_contradict_each_other_are_named(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    overrides, words = MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        load_train_config(overrides)
    assert words in str(error.value)
    assert "has 1 fault:" in str(error.value)


def test_a_narrower_part_of_an_experts_levels_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config: Any = load_train_config([*EXPERTS, "objective.min_level=0.9"])
    assert (config.noise_schedule().min_level, config.noise_schedule().max_level) == (0.9, 1.0)
    assert load_train_config(I2V).conditioning.form is ConditioningForm.channels
