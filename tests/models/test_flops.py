"""Counts of parameters and FLOPs against public figures and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from muybridge.models import attention
from muybridge.models.dit import DiT, DiTConfig
from muybridge.models.flops import count_parameters, count_tokens, forward_flops, training_flops


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (DiTConfig(), 1.419),
        (DiTConfig(dim=3072, num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48), 5.000),
        (DiTConfig(num_layers=40, dim=5120, num_attention_heads=40, ffn_dim=13824), 14.288),
    ],
    ids=["1.3B", "5B", "14B"],
)
def test_parameters_are_those_of_the_public_models(config: DiTConfig, billions: float) -> None:
    assert count_parameters(config) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_tokens_are_latents_over_patches() -> None:
    assert count_tokens(DiTConfig(), (21, 60, 104)) == 32760


@pytest.mark.parametrize(
    ("image_dim", "image_rows"), [(None, None), (12, None), (12, 6)], ids=["text", "image", "first and last image"]
)
def test_forward_flops_are_those_torch_counts(
    image_dim: int | None, image_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention is written as two matmuls here, because torch counts those on every device."""
    monkeypatch.setattr(attention, "attention", lambda q, k, v, mask: torch.softmax(q @ k.mT, -1) @ v)
    config = DiTConfig(
        in_channels=4,
        out_channels=6,
        image_dim=image_dim,
        pos_embed_seq_len=image_rows,
        num_layers=2,
        num_attention_heads=2,
        dim=32,
        ffn_dim=80,
        text_dim=24,
    )
    model = DiT(config)
    image = None if image_dim is None else torch.randn(1, image_rows or 257, image_dim)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 4, 3, 4, 6), torch.tensor([500.0]), torch.randn(1, 5, 24), image)
    assert forward_flops(config, (3, 4, 6), 5) == counter.get_total_flops()
    assert training_flops(config, (3, 4, 6), 5) == 3 * counter.get_total_flops()
