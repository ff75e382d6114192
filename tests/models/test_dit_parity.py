"""Our DiT against diffusers' WanTransformer3DModel, with random weights everywhere: zero gates or a zero head would hide errors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muybridge.kernels.norm_rope import build_rope, rope_axis_pairs
from muybridge.models.attention import Attention
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.embeddings import timestep_sinusoid
from muybridge.models.weights import load_config, load_weights_from, save_model

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")

IMAGE_SCALE = 0.02  # so small that the eps of the image's norm counts
CONFIGS = {
    "text": DiTConfig(
        in_channels=16, out_channels=12, num_layers=3, num_attention_heads=4, dim=128, ffn_dim=160, text_dim=64
    ),
    "image": DiTConfig(
        in_channels=36, num_layers=3, num_attention_heads=4, dim=128, ffn_dim=160, text_dim=64, image_dim=40
    ),
    "first and last image": DiTConfig(
        in_channels=36,
        num_layers=2,
        num_attention_heads=1,
        dim=128,
        ffn_dim=160,
        text_dim=64,
        image_dim=40,
        pos_embed_seq_len=10,
    ),
}


@dataclass
class Inputs:
    """What both models take."""

    latents: Tensor
    text: Tensor
    image: Tensor | None  # of all images of a sample, one after the other

    def tensors(self) -> dict[str, Tensor]:
        given = {"latents": self.latents, "text": self.text, "image": self.image}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def trainable(self) -> "Inputs":
        return Inputs(**{"image": None} | {name: x.clone().requires_grad_() for name, x in self.tensors().items()})


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> DiTConfig:
    return CONFIGS[request.param]


@pytest.fixture
def pair(config: DiTConfig) -> tuple[DiT, nn.Module]:
    """The same random weights in our class and in theirs."""
    torch.manual_seed(0)
    ours = DiT(config)
    for name, parameter in ours.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
        elif "scale_shift_table" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "pos_embed" in name:
            nn.init.normal_(parameter, std=IMAGE_SCALE)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    theirs = diffusers.WanTransformer3DModel.from_config(config.to_diffusers())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs.eval()


def draw_inputs(config: DiTConfig) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    # diffusers tells the rows of an image from those of a text by their number: a text has 512.
    rows = 7 if config.image_dim is None else 512
    latents = torch.randn(2, config.in_channels, 3, 4, 6, generator=generator)
    text = torch.randn(2, rows, config.text_dim, generator=generator)
    if config.image_dim is None:
        return Inputs(latents, text, None)
    image = torch.randn(2, config.pos_embed_seq_len or 5, config.image_dim, generator=generator)
    return Inputs(latents, text, IMAGE_SCALE * image)


def run_ours(ours: DiT, timestep: Tensor, inputs: Inputs) -> Tensor:
    return ours(inputs.latents, timestep, inputs.text, inputs.image)


def run_theirs(theirs: Any, timestep: Tensor, inputs: Inputs) -> Tensor:
    """They take the two images of a sample as two samples."""
    image = inputs.image
    if image is not None and theirs.config.pos_embed_seq_len is not None:
        image = image.reshape(2 * len(image), -1, image.shape[-1])
    return theirs(inputs.latents, timestep, inputs.text, encoder_hidden_states_image=image).sample


def test_state_dict_keys_and_shapes_are_those_of_diffusers(pair: tuple[DiT, nn.Module]) -> None:
    ours, theirs = pair
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in pair]
    assert shapes[0] == shapes[1]
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_output_and_all_gradients_agree(pair: tuple[DiT, nn.Module], config: DiTConfig) -> None:
    ours, theirs = pair
    timestep = torch.tensor(
        [9.0, 1.5]
    )  # where their float32 sinusoid has not lost digits, see test_timestep_sinusoid_agrees
    our_inputs, their_inputs = draw_inputs(config).trainable(), draw_inputs(config).trainable()
    our_velocity = run_ours(ours, timestep, our_inputs)
    their_velocity = run_theirs(theirs, timestep, their_inputs)
    torch.testing.assert_close(our_velocity, their_velocity, atol=1e-5, rtol=1e-4)

    grad = torch.randn(their_velocity.shape, generator=torch.Generator().manual_seed(2))
    our_velocity.backward(grad)
    their_velocity.backward(grad)
    for name, tensor in our_inputs.tensors().items():
        assert_gradients_agree(tensor.grad, their_inputs.tensors()[name].grad)
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


def test_a_timestep_for_each_token_agrees(pair: tuple[DiT, nn.Module], config: DiTConfig) -> None:
    ours, theirs = pair
    inputs = draw_inputs(config)
    timestep = torch.full((2, 18), 750.0)
    timestep[:, :6] = 0  # the first frame is given, as in Wan 2.2's image mode
    with torch.no_grad():
        # Looser by the rounding of their float32 sinusoid, see test_timestep_sinusoid_agrees.
        torch.testing.assert_close(
            run_ours(ours, timestep, inputs), run_theirs(theirs, timestep, inputs), atol=3e-5, rtol=1e-4
        )


def test_every_row_of_the_text_is_attended_padding_too(pair: tuple[DiT, nn.Module], config: DiTConfig) -> None:
    """Rows of zeros become the text embedder's biases; a model that masked them would answer as if they were not there."""
    ours, theirs = pair
    inputs, timestep = draw_inputs(config), torch.tensor([700.0, 30.0])
    inputs.text[:, 3:] = 0
    with torch.no_grad():
        padded = run_ours(ours, timestep, inputs)
        torch.testing.assert_close(padded, run_theirs(theirs, timestep, inputs), atol=3e-5, rtol=1e-4)
        cut = run_ours(ours, timestep, Inputs(inputs.latents, inputs.text[:, :3], inputs.image))
    assert (padded - cut).abs().max() > 0.02


@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_self_attention_agrees_with_positions(head_dim: int) -> None:
    torch.manual_seed(0)
    heads = 2
    ours, theirs = (
        Attention(heads, head_dim, 1e-6),
        wan.WanAttention(heads * head_dim, heads, head_dim, eps=1e-6, processor=wan.WanAttnProcessor()),
    )
    for norm in (ours.norm_q, ours.norm_k):
        nn.init.normal_(norm.weight, mean=1, std=0.2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3 * 5 * 7, heads * head_dim)
    rope = build_rope(3, 5, 7, head_width=head_dim, device=torch.device("cpu"))
    rotations = wan.WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)(torch.empty(1, 1, 3, 10, 14))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, x, rope=rope), theirs(x, None, None, rotations), atol=1e-6, rtol=1e-5)


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


def test_a_saved_folder_opens_in_diffusers_and_theirs_opens_here(
    tmp_path: Path, pair: tuple[DiT, nn.Module], config: DiTConfig
) -> None:
    ours, theirs = pair
    save_model(tmp_path / "ours", config.to_diffusers(), ours.state_dict())
    reopened, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for key, value in reopened.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    read = DiTConfig.from_diffusers(load_config(tmp_path / "theirs"))
    assert read == config
    fresh = DiT(read)
    load_weights_from(fresh, tmp_path / "theirs")
    inputs, timestep = draw_inputs(config), torch.tensor([999.0, 123.4])
    with torch.no_grad():
        assert torch.equal(run_ours(fresh, timestep, inputs), run_ours(ours, timestep, inputs))
