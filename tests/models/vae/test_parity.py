"""The autoencoder, parallel and in chunks, equals diffusers' AutoencoderKLWan, which is the oracle throughout."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import muybridge
from muybridge.models.vae import VAEConfig, VideoVAE
from muybridge.models.vae.config import (
    WAN_2_1_LATENTS_MEAN,
    WAN_2_1_LATENTS_STD,
    WAN_2_2_LATENTS_MEAN,
    WAN_2_2_LATENTS_STD,
    wan_latent_statistics,
)

diffusers = pytest.importorskip("diffusers", reason="the oracle of this file is diffusers")

FORMS = {
    "wan_2_1": VAEConfig(base_dim=8, z_dim=16),
    "wan_2_2": VAEConfig(base_dim=16, decoder_base_dim=24, z_dim=8, patch_size=2, is_residual=True),
}


@pytest.fixture(scope="module", params=FORMS)
def pair(request: pytest.FixtureRequest) -> tuple[VideoVAE, Any]:
    """Ours and the oracle with the same random weights, none of them zero."""
    ours = VideoVAE(FORMS[request.param])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
        # Keep the decoder inside [-1, 1], where the oracle's clamp does nothing.
        ours.decoder.conv_out.weight.mul_(0.1)
    oracle = diffusers.AutoencoderKLWan(**_without_class(ours.config.to_diffusers())).eval()
    oracle.load_state_dict(ours.state_dict(), strict=True)
    return ours, oracle


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
@torch.no_grad()
def test_encode_and_decode_equal_the_chunked_oracle(pair: tuple[VideoVAE, Any], frames: int) -> None:
    ours, oracle = pair
    pixels = _clips(ours.config, frames=frames)
    theirs = oracle.encode(pixels).latent_dist
    distribution = ours.encode(pixels)
    torch.testing.assert_close(distribution.mean, theirs.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(distribution.logvar, theirs.logvar, atol=1e-5, rtol=1e-5)

    decoded = ours.decode(theirs.mean)
    assert decoded.shape == pixels.shape
    assert 0.05 < decoded.abs().max() < 1, "the oracle's clamp would hide a difference"
    torch.testing.assert_close(decoded, oracle.decode(theirs.mean).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
@torch.no_grad()
def test_chunks_of_any_size_equal_the_oracle(pair: tuple[VideoVAE, Any], latent_frames: int) -> None:
    ours, oracle = pair
    pixels = _clips(ours.config, frames=13)
    theirs = oracle.encode(pixels).latent_dist
    distribution = ours.encode_chunked(pixels, latent_frames_per_chunk=latent_frames)
    torch.testing.assert_close(distribution.mean, theirs.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(distribution.logvar, theirs.logvar, atol=1e-5, rtol=1e-5)
    decoded = torch.cat(list(ours.decode_chunked(theirs.mean, latent_frames_per_chunk=latent_frames)), dim=2)
    torch.testing.assert_close(decoded, oracle.decode(theirs.mean).sample, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_through_the_oracles_cache(pair: tuple[VideoVAE, Any]) -> None:
    ours, oracle = pair
    pixels = _clips(ours.config, frames=9)
    weights = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    inputs = []
    for model in pair:
        model.zero_grad()
        inputs.append(pixels.clone().requires_grad_())
    (ours.decode(ours.encode(inputs[0]).mean) * weights).sum().backward()
    (oracle.decode(oracle.encode(inputs[1]).latent_dist.mean).sample * weights).sum().backward()
    _assert_close_gradients(inputs[0].grad, inputs[1].grad, "pixels")
    theirs = dict(oracle.named_parameters())
    for name, parameter in ours.named_parameters():
        _assert_close_gradients(parameter.grad, theirs[name].grad, name)


@torch.no_grad()
def test_any_memory_format_and_frame_size_gives_the_oracles_result(pair: tuple[VideoVAE, Any]) -> None:
    ours, oracle = pair
    pixels = _clips(ours.config, frames=5, height=32, width=48)
    theirs = oracle.encode(pixels).latent_dist.mean
    torch.testing.assert_close(
        ours.encode(pixels.to(memory_format=torch.channels_last_3d)).mean, theirs, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_pixels_of_one_clip_do_not_reach_another(pair: tuple[VideoVAE, Any]) -> None:
    ours, _ = pair
    pixels = _clips(ours.config, frames=5)
    together = ours.encode(pixels).mean
    torch.testing.assert_close(ours.encode(pixels[1:]).mean, together[1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_double_precision_is_exact_against_the_encoder_of_the_oracle(pair: tuple[VideoVAE, Any]) -> None:
    # Encoding only: the oracle's upsampler rounds to single precision on its way.
    ours, oracle = (model.double() for model in pair)
    pixels = _clips(ours.config, frames=9).double()
    theirs = oracle.encode(pixels).latent_dist.mean
    difference = (ours.encode(pixels).mean - theirs).abs().max()
    for model in pair:
        model.float()
    assert difference < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_keys_and_shapes_are_diffusers_both_ways(form: str) -> None:
    config = FORMS[form]
    oracle = diffusers.AutoencoderKLWan(**_without_class(config.to_diffusers()))
    ours = VideoVAE(VAEConfig.from_diffusers(dict(oracle.config)))
    ours.load_state_dict(oracle.state_dict(), strict=True)
    oracle.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("wan_2_1", 194, 126.9e6), ("wan_2_2", 196, 704.7e6)])
def test_released_sizes_have_the_released_weights(name: str, tensors: int, parameters: float) -> None:
    config = _released(name)
    with torch.device("meta"):
        ours = VideoVAE(config).state_dict()
        theirs = diffusers.AutoencoderKLWan(**_without_class(config.to_diffusers())).state_dict()
    assert {key: weight.shape for key, weight in ours.items()} == {key: weight.shape for key, weight in theirs.items()}
    assert len(ours) == tensors
    assert sum(weight.numel() for weight in ours.values()) == pytest.approx(parameters, rel=1e-3)


def test_released_statistics_are_the_constants_that_other_tools_assume() -> None:
    wan_2_1, wan_2_2 = _released("wan_2_1"), _released("wan_2_2")
    assert (wan_2_1.latents_mean, wan_2_1.latents_std) == wan_latent_statistics(16)
    assert (wan_2_2.latents_mean, wan_2_2.latents_std) == wan_latent_statistics(48)
    oracle = diffusers.AutoencoderKLWan(base_dim=4).config
    assert (oracle.latents_mean, oracle.latents_std) == (WAN_2_1_LATENTS_MEAN, WAN_2_1_LATENTS_STD)


@pytest.mark.parametrize(
    ("z_dim", "mean", "std"),
    [(16, WAN_2_1_LATENTS_MEAN, WAN_2_1_LATENTS_STD), (48, WAN_2_2_LATENTS_MEAN, WAN_2_2_LATENTS_STD)],
    ids=["wan_2_1", "wan_2_2"],
)
@torch.no_grad()
def test_latents_are_normalised_as_the_pipeline_of_the_oracle_does(
    z_dim: int, mean: list[float], std: list[float]
) -> None:
    ours = VideoVAE(VAEConfig(base_dim=4, z_dim=z_dim, latents_mean=mean, latents_std=std))
    oracle = diffusers.AutoencoderKLWan(**_without_class(ours.config.to_diffusers())).eval()
    oracle.load_state_dict(ours.state_dict(), strict=True)
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=oracle, scheduler=None, expand_timesteps=True
    )
    image = _clips(ours.config, frames=1)[:1, :, 0]
    _, theirs, _ = pipeline.prepare_latents(
        image, 1, num_channels_latents=z_dim, height=16, width=16, num_frames=1, dtype=torch.float32, device="cpu"
    )
    normalised = ours.normalise(ours.encode(image.unsqueeze(2)).mode())
    torch.testing.assert_close(normalised, theirs, atol=1e-6, rtol=1e-5)
    # A sample of zeros is the mean, one of ones a standard deviation more.
    zeros = torch.zeros(1, z_dim, 1, 1, 1)
    torch.testing.assert_close(ours.denormalise(zeros).flatten(), torch.tensor(mean))
    torch.testing.assert_close(ours.denormalise(zeros + 1).flatten(), torch.tensor(mean) + torch.tensor(std))


def _released(name: str) -> VAEConfig:
    """The architecture in `configs/vae`."""
    file = Path(muybridge.__file__).parent / "configs" / "vae" / f"{name}.yaml"
    read = OmegaConf.merge(OmegaConf.structured(VAEConfig), OmegaConf.load(file).architecture)
    return cast(VAEConfig, OmegaConf.to_object(read))


def _assert_close_gradients(ours: Tensor | None, theirs: Tensor | None, name: str) -> None:
    """Relative to the largest gradient of the tensor."""
    assert ours is not None, name
    assert theirs is not None, name
    scale = theirs.abs().max()
    assert scale > 0, name
    assert (ours - theirs).abs().max() < 1e-4 * scale, name


def _clips(config: VAEConfig, *, frames: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand((2, config.in_channels, frames, height, width), generator=generator) * 2 - 1


def _without_class(config: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key != "_class_name"}
