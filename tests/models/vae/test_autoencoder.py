"""Rules of the autoencoder that need no oracle: strides, causality, gradients, inflation, normalisation."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from muybridge.models.vae import VAEConfig, VideoVAE
from muybridge.models.vae.inflate import inflate

FORMS = {
    "plain": VAEConfig(base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temporal_downsample=[True, True]),
    "residual": VAEConfig(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temporal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
    ),
}


@pytest.fixture(params=FORMS)
def vae(request: pytest.FixtureRequest) -> VideoVAE:
    """Random weights, none of them zero, so that every path counts."""
    torch.manual_seed(0)
    built = VideoVAE(FORMS[request.param])
    _randomise(built)
    return built


def test_latents_of_a_prefix_are_a_prefix_of_the_latents(vae: VideoVAE) -> None:
    pixels = _clips(frames=13)
    with torch.no_grad():
        whole = vae.encode(pixels).mean
        for frames in (1, 5, 9):
            torch.testing.assert_close(vae.encode(pixels[:, :, :frames]).mean, whole[:, :, : 1 + frames // 4])
        latents = torch.randn(1, 4, 4, 2, 2)
        decoded = vae.decode(latents)
        torch.testing.assert_close(vae.decode(latents[:, :, :2]), decoded[:, :, :5])


def test_gradients_are_finite_reach_every_weight_and_never_come_from_the_future(vae: VideoVAE) -> None:
    pixels = _clips(frames=9).requires_grad_()
    distribution = vae.encode(pixels)
    distribution.mean[:, :, 1].sum().backward(retain_graph=True)  # sees frames 0 to 4
    assert pixels.grad is not None
    assert pixels.grad[:, :, :5].abs().amax(dim=(0, 1, 3, 4)).min() > 0
    assert pixels.grad[:, :, 5:].abs().max() == 0
    reconstruction = vae.decode(distribution.sample(torch.randn_like(distribution.mean)))
    reconstruction.square().mean().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_are_those_of_finite_differences(vae: VideoVAE) -> None:
    vae.double()
    latents = torch.randn(1, 4, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: vae.decode(z).mean(dim=(3, 4)), latents)


@pytest.mark.parametrize("frames", [2, 4, 6, 8])
def test_frames_that_would_be_cut_off_raise(vae: VideoVAE, frames: int) -> None:
    with pytest.raises(ValueError, match=rf"frames={frames} must be 1 \+ a multiple of 4"):
        vae.encode(_clips(frames=frames))


def test_sides_that_the_stride_does_not_divide_raise(vae: VideoVAE) -> None:
    stride = vae.config.spatial_stride
    with pytest.raises(ValueError, match=f"height={stride + 2} must be a multiple of {stride}"):
        vae.encode(torch.zeros(1, 3, 1, stride + 2, stride))
    with pytest.raises(ValueError, match=f"width={stride - 1} must be a multiple of {stride}"):
        vae.encode(torch.zeros(1, 3, 1, stride, stride - 1))


def test_latent_shape_is_that_of_the_latents(vae: VideoVAE) -> None:
    with torch.no_grad():
        latents = vae.encode(_clips(frames=9, height=16, width=32)).mean
    assert latents.shape[1:] == vae.config.latent_shape(9, 16, 32)


def test_inflating_leaves_images_as_they_were(vae: VideoVAE) -> None:
    image = _clips(frames=1)
    with torch.no_grad():
        before = vae.encode(image).mean
        decoded = vae.decode(before)
        inflate(vae)
        torch.testing.assert_close(vae.encode(image).mean, before, rtol=0, atol=0)
        torch.testing.assert_close(vae.decode(before), decoded, rtol=0, atol=0)


def test_inflated_plain_form_treats_a_still_clip_as_its_image() -> None:
    torch.manual_seed(0)
    vae = VideoVAE(FORMS["plain"])
    _randomise(vae)
    inflate(vae)
    image = _clips(frames=1)
    with torch.no_grad():
        still = vae.encode(image.expand(-1, -1, 9, -1, -1)).mean
        expected = vae.encode(image).mean.expand(-1, -1, 3, -1, -1)
        torch.testing.assert_close(still, expected)
        shown = vae.decode(still)
        torch.testing.assert_close(shown, shown[:, :, :1].expand_as(shown))


def test_inflated_residual_form_decodes_no_frame_from_an_earlier_one() -> None:
    # Its shortcuts mix the frames of a group, so stills are not exact; but no kernel looks back any more.
    torch.manual_seed(0)
    vae = VideoVAE(FORMS["residual"])
    _randomise(vae)
    inflate(vae)
    latents = torch.randn(1, 4, 3, 2, 2)
    changed = latents.clone()
    changed[:, :, 0] += 1
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(changed)[:, :, 1:], vae.decode(latents)[:, :, 1:])


@pytest.mark.parametrize("form", FORMS)
def test_fresh_weights_are_inflated_and_keep_the_scale_of_the_signal(form: str) -> None:
    torch.manual_seed(0)
    vae = VideoVAE(FORMS[form])
    fresh = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    inflate(vae)
    for name, tensor in vae.state_dict().items():
        torch.testing.assert_close(tensor, fresh[name], rtol=0, atol=0)
    with torch.no_grad():
        distribution = vae.encode(_clips(frames=1, height=32, width=32))
        assert 0.1 < distribution.mean.std() < 3
        assert 0.02 < (0.5 * distribution.logvar).exp().mean() < 0.1
        assert 0.1 < vae.decode(distribution.mean).std() < 3


def test_normalising_centres_and_scales_each_channel_and_is_undone() -> None:
    config = VAEConfig(base_dim=4, z_dim=2, latents_mean=[1.0, -2.0], latents_std=[2.0, 0.5])
    vae = VideoVAE(config)
    latents = torch.tensor([3.0, -1.5]).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(vae.normalise(latents), torch.ones(1, 2, 1, 1, 1))
    torch.testing.assert_close(vae.denormalise(vae.normalise(latents)), latents)
    config.latents_mean = config.latents_std = []
    torch.testing.assert_close(VideoVAE(config).normalise(latents), latents)


def test_half_precision_weights_take_single_precision_clips_and_stay_close(vae: VideoVAE) -> None:
    pixels = _clips(frames=5)
    with torch.no_grad():
        exact = vae.encode(pixels).mean
        rounded = vae.bfloat16().encode(pixels).mean
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_impossible_sizes_are_all_named_at_once() -> None:
    faults = VAEConfig(base_dim=0, temporal_downsample=[True], latents_mean=[0.0], latents_std=[-1.0]).faults("vae")
    for field in ("vae.base_dim=0", "vae.temporal_downsample=[True]", "vae.latents_mean", "vae.latents_std=[-1.0]"):
        assert any(field in fault for fault in faults), field
    with pytest.raises(ValueError, match=r"3 must divide 2x1"):
        VideoVAE(VAEConfig(base_dim=4, dim_mult=[1, 2, 3], temporal_downsample=[True, True], is_residual=True))


def test_widths_that_the_shortcuts_can_split_are_not_refused() -> None:
    for mults, temporal in (([1, 2, 4, 4], [False, True, True]), ([1, 2, 2], [True, True]), ([1], [])):
        assert VAEConfig(dim_mult=mults, temporal_downsample=temporal, is_residual=True).faults("vae") == []


@pytest.mark.parametrize("form", FORMS)
def test_config_json_round_trip(form: str) -> None:
    assert OmegaConf.structured(VAEConfig).z_dim == 16
    config = FORMS[form]
    written = config.to_diffusers()
    assert written["scale_factor_spatial"] == config.spatial_stride == 4 * config.patch_size
    assert written["scale_factor_temporal"] == config.temporal_stride == 4
    read = VAEConfig.from_diffusers(written)
    assert read.to_diffusers() == written
    assert (read.latents_mean, read.latents_std) == ([0.0] * 4, [1.0] * 4)  # "not measured", spelled out


def test_config_json_without_statistics_means_those_of_wan_2_1() -> None:
    config = VAEConfig.from_diffusers({"_class_name": "AutoencoderKLWan"})
    assert config.latents_mean[0] == -0.7571
    assert config.latents_std[-1] == 1.9160


@pytest.mark.parametrize(("key", "value"), [("attn_scales", [0.5]), ("dropout", 0.1), ("out_channels", 4)])
def test_config_json_with_features_we_lack_raises(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        VAEConfig.from_diffusers({key: value})


def _clips(*, frames: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand((1, 3, frames, height, width), generator=generator) * 2 - 1


def _randomise(vae: VideoVAE) -> None:
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.8, 1.2)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
