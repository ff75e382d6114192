"""Rectified flow: the training loss, and random draws that belong to a slot of a step and not to a rank.

x_s = (1 - s) x0 + s n, and the model learns the velocity n - x0 (Liu et al. 2022; Lipman et al. 2022).
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .conditioning import TEXT_ALONE, Condition
from .noise_schedule import TIMESTEPS, NoiseScheduleConfig, draw_noise_levels

VelocityModel = Callable[[Tensor, Tensor, Tensor], Tensor]  # (latents, timestep, text) -> velocity


def keyed_seed(seed: int, purpose: str, step: int, slot: int) -> int:
    """A 64-bit seed that depends on all four and on nothing else; the same on every machine."""
    key = f"{seed}/{purpose}/{step}/{slot}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def keyed_noise(
    seed: int,
    step: int,
    slots: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    purpose: str = "noise",
) -> Tensor:
    """Normal noise [B, *shape], one generator for each slot, so that any split of the slots over ranks draws the same.

    Drawn on the CPU in float32 and then moved: what a GPU generator draws depends on the model of the GPU.
    """
    noise = torch.empty((len(slots), *shape), dtype=torch.float32)
    generator = torch.Generator()
    for row, slot in enumerate(slots):
        generator.manual_seed(keyed_seed(seed, purpose, step, slot))
        noise[row].normal_(generator=generator)
    return noise.to(device=device, dtype=dtype)


def keyed_uniform(seed: int, step: int, slots: Sequence[int], *, purpose: str) -> Tensor:
    """One number in (0, 1) for each slot, [B] float64 on the CPU."""
    # 52 bits and a half: neither 0 nor 1 can come out, where a logit would be infinite.
    values = [((keyed_seed(seed, purpose, step, slot) >> 12) + 0.5) / 2**52 for slot in slots]
    return torch.tensor(values, dtype=torch.float64)


def keyed_noise_levels(
    seed: int,
    step: int,
    slots: Sequence[int],
    config: NoiseScheduleConfig,
    device: torch.device | str = "cpu",
    *,
    purpose: str = "noise_level",
) -> Tensor:
    """Noise levels [B] float32, one draw for each slot."""
    return draw_noise_levels(keyed_uniform(seed, step, slots, purpose=purpose), config).to(device)


def add_noise(latents: Tensor, noise: Tensor, noise_levels: Tensor) -> Tensor:
    """(1 - s) x0 + s n for latents and noise [B, ...] and noise levels [B], in float32."""
    level = noise_levels.float().view(-1, *[1] * (latents.ndim - 1))
    return torch.lerp(latents.float(), noise.float(), level)


def rectified_flow_loss(
    model: VelocityModel,
    latents: Tensor,
    text: Tensor,
    noise: Tensor,
    noise_levels: Tensor,
    condition: Condition = TEXT_ALONE,
) -> Tensor:
    """Per-sample loss [B]: the mean over elements of (velocity - (noise - latents))^2, in float32.

    Latents and noise [B, C, T, H, W], noise levels [B] in [0, 1], text as the model takes it. With a condition, the mean is over
    the places that the model has to make.
    """
    noisy, timestep = condition.model_inputs(add_noise(latents, noise, noise_levels), TIMESTEPS * noise_levels.float())
    target = noise.float() - latents.float()
    return condition.mean_over_unknown((model(noisy, timestep, text).float() - target).square())
