"""The module that the engine wraps, with a text encoder of its own and without."""

import dataclasses

import pytest
import torch

from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.text import ByteTextEncoder, TextEncoderConfig
from muybridge.models.text_to_video import TextToVideoModel

CONFIG = DiTConfig(in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, dim=32, ffn_dim=64, text_dim=16)


def build(text_encoder: ByteTextEncoder | None) -> TextToVideoModel:
    torch.manual_seed(0)
    model = TextToVideoModel(DiT(CONFIG), text_encoder)
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    return model


def test_tokens_go_through_the_text_encoder_and_train_it() -> None:
    encoder = ByteTextEncoder(TextEncoderConfig(dim=16, max_tokens=4))
    model = build(encoder)
    latents, timestep = torch.randn(2, 4, 1, 4, 4), torch.tensor([900.0, 100.0])
    tokens = encoder.tokenize(["red", "blue"])
    velocity = model(latents, timestep, tokens)
    assert torch.equal(velocity, model.transformer(latents, timestep, encoder(tokens)))
    velocity.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"transformer", "text_encoder"}


def test_without_a_text_encoder_features_are_taken_as_they_are() -> None:
    model = build(None)
    latents, timestep, text = torch.randn(2, 4, 1, 4, 4), torch.tensor([900.0, 100.0]), torch.randn(2, 3, 16)
    assert torch.equal(model(latents, timestep, text), model.transformer(latents, timestep, text))


def test_image_features_reach_a_transformer_that_takes_them() -> None:
    torch.manual_seed(0)
    model = TextToVideoModel(DiT(dataclasses.replace(CONFIG, image_dim=8)), None)
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    inputs = torch.randn(2, 4, 1, 4, 4), torch.tensor([900.0, 100.0]), torch.randn(2, 3, 16)
    image = torch.randn(2, 5, 8)
    assert torch.equal(model(*inputs, image), model.transformer(*inputs, image))


def test_widths_that_do_not_meet_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text\.dim=32 must equal model\.text_dim=16"):
        build(ByteTextEncoder(TextEncoderConfig(dim=32)))
