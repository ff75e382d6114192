"""Latents of models whose parts are combined: two experts under a condition."""

from collections.abc import Callable

import torch
from torch import Tensor

from muybridge.models.diffusion.conditioning import CleanFrames
from muybridge.models.diffusion.samplers import SamplerConfig
from muybridge.models.vae import VAEConfig, VideoVAE
from muybridge.train.generate import VideoModels, generate_latents


def test_experts_are_chosen_by_the_sampler_s_timestep_under_clean_frames() -> None:
    called: list[tuple[str, float, float]] = []

    def expert(name: str) -> Callable[..., Tensor]:
        def velocity(latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            called.append((name, float(timestep.min()), float(timestep.max())))
            return torch.ones_like(latents)

        return velocity

    vae = VideoVAE(VAEConfig(base_dim=4, z_dim=2, dim_mult=[1, 1], num_res_blocks=1, temporal_downsample=[True]))
    models = VideoModels(expert("high"), vae, expert("low"), boundary=0.5)
    known = torch.full((1, 2, 3, 4, 4), 7.0)
    unknown = torch.ones(1, 1, 3, 1, 1)
    unknown[:, :, 0] = 0
    latents = generate_latents(
        models,
        torch.zeros(1, 2, 3, 4, 4),
        torch.zeros(1, 1, 1),
        torch.zeros(1, 1, 1),
        sampler=SamplerConfig(steps=4, shift=1.0, guidance_scale=1.0),
        condition=CleanFrames(known, unknown, [1, 1, 1]),
    )
    assert [name for name, _, _ in called] == ["high", "high", "high", "low"]  # timesteps 1000, 750, 500, 250
    assert [(low, high) for _, low, high in called] == [(0, 1000), (0, 750), (0, 500), (0, 250)]
    assert (latents[:, :, 0] == 7).all()
    torch.testing.assert_close(latents[:, :, 1:], torch.full((1, 2, 2, 4, 4), -1.0))
