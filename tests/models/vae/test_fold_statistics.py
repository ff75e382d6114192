"""An autoencoder with folded statistics is the same function of normalised latents."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from muybridge.models.vae import VAEConfig, VideoVAE
from muybridge.models.vae.config import WAN_2_1_LATENTS_MEAN, WAN_2_1_LATENTS_STD
from muybridge.models.vae.fold_statistics import fold_statistics

MEAN = [0.3 * channel - 2 for channel in range(16)]
STD = [0.2 + 0.4 * channel for channel in range(16)]


@pytest.mark.parametrize("measured", [True, False], ids=["own_statistics", "not_measured"])
@torch.no_grad()
def test_normalised_latents_and_frames_stay_as_they_were(measured: bool) -> None:
    vae = _random_vae(_config(MEAN, STD) if measured else _config([], []))
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    folded, config = fold_statistics(vae.state_dict(), vae.config, WAN_2_1_LATENTS_MEAN, WAN_2_1_LATENTS_STD)
    assert (config.latents_mean, config.latents_std) == (WAN_2_1_LATENTS_MEAN, WAN_2_1_LATENTS_STD)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the original was changed"
    other = VideoVAE(config).double()
    other.load_state_dict(folded, strict=True)

    pixels = torch.rand(1, 3, 5, 8, 8, dtype=torch.float64) * 2 - 1
    ours, theirs = vae.encode(pixels), other.encode(pixels)
    assert (ours.mean - theirs.mean).abs().max() > 1, "raw latents have the new scale"
    _assert_same(other.normalise(theirs.mean), vae.normalise(ours.mean))
    _assert_same(theirs.logvar - 2 * _std(other, theirs.mean).log(), ours.logvar - 2 * _std(vae, ours.mean).log())
    latents = torch.randn(1, 16, 2, 2, 2, dtype=torch.float64)
    _assert_same(other.decode(other.denormalise(latents)), vae.decode(vae.denormalise(latents)))


def test_weights_keep_their_dtype_and_the_rest_is_not_copied() -> None:
    weights = _random_vae(_config(MEAN, STD)).bfloat16().state_dict()
    folded, _ = fold_statistics(weights, _config(MEAN, STD), WAN_2_1_LATENTS_MEAN, WAN_2_1_LATENTS_STD)
    assert {tensor.dtype for tensor in folded.values()} == {torch.bfloat16}
    assert list(folded) == list(weights)
    changed = {name for name in weights if folded[name].data_ptr() != weights[name].data_ptr()}
    assert changed == {f"{layer}.{kind}" for layer in ("quant_conv", "post_quant_conv") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values[:3], r"latents_mean has 3 values and must have z_dim=16"),
        (lambda values: [], r"latents_mean must have z_dim=16 values"),
    ],
    ids=["too_few", "none"],
)
def test_statistics_of_another_autoencoder_raise(change: Callable[[list[float]], list[float]], message: str) -> None:
    config = _config(MEAN, STD)
    with pytest.raises(ValueError, match=message):
        fold_statistics(VideoVAE(config).state_dict(), config, change(MEAN), change(STD))


def test_a_spread_of_zero_raises() -> None:
    config = _config(MEAN, STD)
    with pytest.raises(ValueError, match="must be positive in every channel"):
        fold_statistics(VideoVAE(config).state_dict(), config, MEAN, [0.0] * 16)


def _assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def _config(mean: list[float], std: list[float]) -> VAEConfig:
    return VAEConfig(
        base_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temporal_downsample=[True, True],
        latents_mean=mean,
        latents_std=std,
    )


def _random_vae(config: VAEConfig) -> VideoVAE:
    torch.manual_seed(0)
    vae = VideoVAE(config).double()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if not name.endswith("gamma"):
                parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3)
    return vae


def _std(vae: VideoVAE, like: Tensor) -> Tensor:
    return torch.tensor(vae.config.latents_std or [1.0] * 16, dtype=like.dtype).view(-1, 1, 1, 1)
