"""Encoding and decoding in chunks: the same as all at once, in memory that does not grow with the clip."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from muybridge.models.vae import VAEConfig, VideoVAE

FORMS = {
    "plain": VAEConfig(base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temporal_downsample=[True, True]),
    "residual": VAEConfig(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temporal_downsample=[False, True, True],
        is_residual=True,
        patch_size=2,
    ),
}


@pytest.fixture(params=FORMS)
def vae(request: pytest.FixtureRequest) -> VideoVAE:
    """Random weights, none of them zero, so that every path counts."""
    torch.manual_seed(0)
    built = VideoVAE(FORMS[request.param])
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if not name.endswith("gamma"):
                parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2)
    return built


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 9])
@pytest.mark.parametrize("frames", [1, 5, 21])
@torch.no_grad()
def test_chunks_give_what_the_whole_clip_gives(vae: VideoVAE, frames: int, latent_frames: int) -> None:
    vae.double()
    pixels = torch.rand(2, 3, frames, 16, 32, dtype=torch.float64) * 2 - 1
    whole = vae.encode(pixels)
    chunked = vae.encode_chunked(pixels, latent_frames_per_chunk=latent_frames)
    torch.testing.assert_close(chunked.mean, whole.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(chunked.logvar, whole.logvar, rtol=0, atol=1e-12)

    parts = list(vae.decode_chunked(whole.mean, latent_frames_per_chunk=latent_frames))
    assert parts[0].shape[2] == min(frames, 4 * latent_frames - 3)
    assert all(part.shape[2] == 4 * latent_frames for part in parts[1:-1])
    torch.testing.assert_close(torch.cat(parts, dim=2), vae.decode(whole.mean), rtol=0, atol=1e-12)


@torch.no_grad()
def test_by_default_a_chunk_holds_as_many_frames_as_its_pixels_allow(
    vae: VideoVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.zeros(2, 4, 4, 2, 2)
    side = 2 * vae.config.spatial_stride

    def lengths() -> list[int]:
        return [part.shape[2] for part in vae.decode_chunked(latents)]

    assert lengths() == [13]
    monkeypatch.setattr("muybridge.models.vae.chunks.CHUNK_PIXELS", 2 * side * side * 8)  # 2 clips of 8 frames
    assert lengths() == [5, 8]
    monkeypatch.setattr("muybridge.models.vae.chunks.CHUNK_PIXELS", 1)
    assert lengths() == [1, 4, 4, 4]
    seen: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    vae.encode_chunked(torch.zeros(2, 3, 13, side, side))
    assert seen == [1, 4, 4, 4]


def test_frames_of_two_clips_in_turn_do_not_mix(vae: VideoVAE) -> None:
    one, other = torch.randn(2, 1, 4, 3, 2, 2)
    with torch.no_grad():
        expected = vae.decode(one), vae.decode(other)
    chunks = [vae.decode_chunked(clip, latent_frames_per_chunk=1) for clip in (one, other)]
    pairs = list(zip(*chunks, strict=True))
    for clip, whole in zip(zip(*pairs, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(clip, dim=2), whole, rtol=1e-5, atol=1e-5)


def test_chunks_take_no_gradients(vae: VideoVAE) -> None:
    pixels = torch.zeros(1, 3, 5, 16, 16, requires_grad=True)
    assert not vae.encode_chunked(pixels).mean.requires_grad
    latents = torch.zeros(1, 4, 2, 2, 2, requires_grad=True)
    for part in vae.decode_chunked(latents, latent_frames_per_chunk=1):
        assert not part.requires_grad
        assert torch.is_grad_enabled(), "the setting of the one who iterates must stay"


@torch.no_grad()
def test_a_long_clip_takes_no_more_memory_than_a_clip_of_one_chunk(
    vae: VideoVAE, peak_bytes: Callable[[Callable[[], object]], int]
) -> None:
    def decode(latents: Tensor) -> None:
        for _ in vae.decode_chunked(latents, latent_frames_per_chunk=4):
            pass

    pixels = torch.zeros(1, 3, 41, 32, 32)
    latents = vae.encode(pixels).mean
    alone = peak_bytes(lambda: vae.encode(pixels[:, :, :17]))
    assert peak_bytes(lambda: vae.encode_chunked(pixels, latent_frames_per_chunk=4)) <= alone
    alone = peak_bytes(lambda: vae.decode(latents[:, :, :5]))
    assert peak_bytes(lambda: decode(latents)) <= alone


def test_frames_and_sides_that_would_be_cut_off_raise(vae: VideoVAE) -> None:
    with pytest.raises(ValueError, match=r"frames=6 must be 1 \+ a multiple of 4"):
        vae.encode_chunked(torch.zeros(1, 3, 6, 16, 16))
    with pytest.raises(ValueError, match=r"height=18 must be a multiple of"):
        vae.encode_chunked(torch.zeros(1, 3, 5, 18, 16))


def test_chunks_without_a_frame_raise(vae: VideoVAE) -> None:
    with pytest.raises(ValueError, match="latent_frames_per_chunk=0 must be at least 1"):
        vae.encode_chunked(torch.zeros(1, 3, 5, 16, 16), latent_frames_per_chunk=0)
    with pytest.raises(ValueError, match="latent_frames_per_chunk=0 must be at least 1"):
        next(vae.decode_chunked(torch.zeros(1, 4, 1, 2, 2), latent_frames_per_chunk=0))


def test_latents_of_another_autoencoder_raise(vae: VideoVAE) -> None:
    latents = torch.zeros(1, 16, 1, 2, 2)
    message = "latents with 16 channels must have z_dim=4, the autoencoder's: they are those of another autoencoder"
    with pytest.raises(ValueError, match=message):
        vae.decode(latents)
    with pytest.raises(ValueError, match=message):
        next(vae.decode_chunked(latents))
