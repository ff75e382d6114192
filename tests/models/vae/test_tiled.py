"""Decoding in tiles: seams that cannot be seen, diffusers' blending, and less memory."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from muybridge.models.vae import VAEConfig, VideoVAE
from muybridge.models.vae.tiled import decode_tiled

CONFIG = VAEConfig(base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temporal_downsample=[True, True])
FORMS = {"plain": CONFIG, "residual": replace(CONFIG, decoder_base_dim=6, is_residual=True, patch_size=2)}


@pytest.fixture(params=FORMS)
def vae(request: pytest.FixtureRequest) -> VideoVAE:
    """Random weights, none of them zero."""
    return _random_vae(FORMS[request.param])


@torch.no_grad()
def test_one_tile_is_the_whole_frame(vae: VideoVAE) -> None:
    latents = _latents(height=5, width=6)
    torch.testing.assert_close(decode_tiled(vae, latents, tile=6, overlap=2), vae.decode(latents), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overlap", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 11), (7, 3), (9, 10)])
@torch.no_grad()
def test_weights_of_overlapping_tiles_add_up_to_one(vae: VideoVAE, height: int, width: int, overlap: int) -> None:
    conv = vae.decoder.conv_out
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.fill_(0.3)  # every tile is of this colour
    frames = decode_tiled(vae, _latents(height=height, width=width), tile=4, overlap=overlap)
    stride = vae.config.spatial_stride
    assert frames.shape == (1, 3, 5, height * stride, width * stride)
    torch.testing.assert_close(frames, torch.full_like(frames, 0.3))


@torch.no_grad()
def test_tiles_along_one_side_are_blended_as_by_diffusers() -> None:
    # Where four tiles meet, diffusers weighs one of them twice, so only one side is cut here.
    diffusers = pytest.importorskip("diffusers", reason="the oracle of this test is diffusers")
    ours = _random_vae(CONFIG)
    ours.decoder.conv_out.weight.mul_(0.1)  # inside [-1, 1], where the oracle's clamp does nothing
    settings = {key: value for key, value in CONFIG.to_diffusers().items() if key != "_class_name"}
    oracle = diffusers.AutoencoderKLWan(**settings).eval()
    oracle.load_state_dict(ours.state_dict(), strict=True)
    oracle.enable_tiling(24, 24, 16, 16)  # pixels: tiles of 6 latent positions every 4
    for height, width in ((4, 12), (12, 4)):
        latents = _latents(height=height, width=width)
        theirs = oracle.decode(latents).sample
        assert theirs.abs().max() < 1
        assert (theirs - ours.decode(latents)).abs().max() > 1e-3, "the oracle did not tile"
        torch.testing.assert_close(decode_tiled(ours, latents, tile=6, overlap=2), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_middle_of_a_tile_is_as_without_tiles() -> None:
    vae = _random_vae(CONFIG)
    for block in (*vae.encoder.mid_block.attentions, *vae.decoder.mid_block.attentions):
        block.proj.weight.zero_()  # attention sees whole tiles
        block.proj.bias.zero_()
    latents = _latents(height=4, width=32)
    exact, tiled = vae.decode(latents), decode_tiled(vae, latents, tile=24, overlap=8)
    stride = vae.config.spatial_stride
    torch.testing.assert_close(tiled[..., : 4 * stride], exact[..., : 4 * stride], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiled[..., -4 * stride :], exact[..., -4 * stride :], rtol=1e-5, atol=1e-5)


def test_tiles_take_less_memory(vae: VideoVAE, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    latents = _latents(height=16, width=16)

    def whole_frames() -> None:
        for _ in vae.decode_chunked(latents, latent_frames_per_chunk=1):
            pass

    assert peak_bytes(lambda: decode_tiled(vae, latents, tile=6, overlap=2)) < 0.4 * peak_bytes(whole_frames)


@pytest.mark.parametrize("overlap", [0, 3])
def test_an_overlap_that_cannot_be_blended_raises(overlap: int) -> None:
    with pytest.raises(ValueError, match=f"overlap={overlap} must be at least 1 and at most half of tile=4"):
        decode_tiled(VideoVAE(CONFIG), _latents(height=8, width=8), tile=4, overlap=overlap)


def _latents(*, height: int, width: int) -> Tensor:
    return torch.randn((1, CONFIG.z_dim, 2, height, width), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _random_vae(config: VAEConfig) -> VideoVAE:
    torch.manual_seed(0)
    vae = VideoVAE(config)
    for name, parameter in vae.named_parameters():
        if not name.endswith("gamma"):
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2)
    return vae
