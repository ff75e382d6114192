"""Our DiT against diffusers' WanTransformer3DModel, with random weights everywhere: zero gates or a zero head would hide errors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from muybridge.kernels.norm_rope import build_rope, rope_axis_pairs
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.embeddings import timestep_sinusoid
from muybridge.models.weights import load_config, load_state_dict, load_weights, save_model

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")

CONFIG = DiTConfig(
    in_channels=16,
    out_channels=12,
    num_layers=3,
    num_attention_heads=4,
    dim=128,
    ffn_dim=160,
    text_dim=64,
)


@pytest.fixture
def pair() -> tuple[DiT, nn.Module]:
    """The same random weights in our class and in theirs."""
    torch.manual_seed(0)
    ours = DiT(CONFIG)
    for name, parameter in ours.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
        elif "scale_shift_table" in name:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    theirs = diffusers.WanTransformer3DModel.from_config(CONFIG.to_diffusers())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs.eval()


def draw_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 3, 4, 6, generator=generator)
    text = torch.randn(2, 7, 64, generator=generator)
    return latents, torch.tensor([999.0, 123.4]), text


def test_state_dict_keys_and_shapes_are_those_of_diffusers(pair: tuple[DiT, nn.Module]) -> None:
    ours, theirs = pair
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in pair]
    assert shapes[0] == shapes[1]
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_output_and_all_gradients_agree(pair: tuple[DiT, nn.Module]) -> None:
    ours, theirs = pair
    latents, timestep, text = draw_inputs()
    our_latents, their_latents = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    our_text, their_text = text.clone().requires_grad_(), text.clone().requires_grad_()
    our_velocity = ours(our_latents, timestep, our_text)
    their_velocity = theirs(their_latents, timestep, their_text).sample
    torch.testing.assert_close(our_velocity, their_velocity, atol=1e-5, rtol=1e-4)

    grad = torch.randn(their_velocity.shape, generator=torch.Generator().manual_seed(2))
    our_velocity.backward(grad)
    their_velocity.backward(grad)
    assert_gradients_agree(our_latents.grad, their_latents.grad)
    assert_gradients_agree(our_text.grad, their_text.grad)
    their_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert_gradients_agree(parameter.grad, their_parameters[name].grad)


def assert_gradients_agree(ours: Tensor | None, theirs: Tensor | None) -> None:
    """Within 1e-4 of the largest entry: single entries may cancel to almost nothing."""
    assert ours is not None
    assert theirs is not None
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_a_timestep_for_each_token_agrees(pair: tuple[DiT, nn.Module]) -> None:
    ours, theirs = pair
    latents, _, text = draw_inputs()
    timestep = torch.full((2, 18), 750.0)
    timestep[:, :6] = 0  # the first frame is given, as in Wan 2.2's image mode
    with torch.no_grad():
        # Looser by the rounding of their float32 sinusoid, see test_timestep_sinusoid_agrees.
        torch.testing.assert_close(
            ours(latents, timestep, text), theirs(latents, timestep, text).sample, atol=3e-5, rtol=1e-4
        )


@pytest.mark.parametrize("head_dim", [16, 24, 40, 128])
def test_rope_tables_agree(head_dim: int) -> None:
    grid = (3, 5, 7)
    cosines, sines = wan.WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)(torch.empty(1, 1, 3, 10, 14))
    rotations = build_rope(*grid, head_width=head_dim, device=torch.device("cpu")).rotations
    torch.testing.assert_close(rotations.real.squeeze(1), cosines[0, :, 0, 0::2], atol=1e-6, rtol=0)
    torch.testing.assert_close(rotations.imag.squeeze(1), sines[0, :, 0, 1::2], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("head_dim", "dims"), [(24, (8, 8, 8)), (40, (16, 12, 12)), (128, (44, 42, 42))])
def test_rope_splits_the_head_as_wan_does(head_dim: int, dims: tuple[int, int, int]) -> None:
    assert tuple(2 * pairs for pairs in rope_axis_pairs(head_dim)) == dims


def test_timestep_sinusoid_agrees() -> None:
    timestep = torch.tensor([0.0, 1.0, 500.5, 999.0])
    theirs = diffusers.models.embeddings.Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(timestep)
    # diffusers computes the angle in float32, whose rounding at 999 radians is 3e-5.
    torch.testing.assert_close(timestep_sinusoid(timestep, 256), theirs, atol=1e-4, rtol=0)


def test_a_saved_folder_opens_in_diffusers_and_theirs_opens_here(tmp_path: Path, pair: tuple[DiT, nn.Module]) -> None:
    ours, theirs = pair
    save_model(tmp_path / "ours", CONFIG.to_diffusers(), ours.state_dict())
    reopened, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for key, value in reopened.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    config = DiTConfig.from_diffusers(load_config(tmp_path / "theirs"))
    assert config == CONFIG
    fresh = DiT(config)
    load_weights(fresh, load_state_dict(tmp_path / "theirs"), where="theirs")
    latents, timestep, text = draw_inputs()
    with torch.no_grad():
        assert torch.equal(fresh(latents, timestep, text), ours(latents, timestep, text))
