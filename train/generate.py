"""From text features and noise to frames: sampling, decoding and writing mp4s, for validation and `muybridge sample`."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.mp4 import write_mp4
from ..data.pixels import to_frames
from ..models.diffusion.conditioning import Condition
from ..models.diffusion.guidance import VelocityFn, expert_velocity, guided_velocity
from ..models.diffusion.objective import keyed_noise
from ..models.diffusion.samplers import SamplerConfig, sample
from ..models.vae import VideoVAE
from ..models.vae.tiled import decode_tiled

# What guidance leads away from where nothing is asked for; captions that training drops are empty, too.
NEGATIVE_PROMPT = ""


@dataclass(frozen=True)
class VideoModels:
    """The networks that make a video together, on one device."""

    # Velocity of (latents, timestep, text), with two experts that of high noise. Where a clip has image features, they follow.
    transformer: Callable[..., Tensor]
    vae: VideoVAE
    transformer_2: Callable[..., Tensor] | None = None  # the expert of low noise
    boundary: float = 0.0  # noise level from which on `transformer` serves, where there are two


def prompt_noise(
    seed: int, numbers: Sequence[int], latent_shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Noise [B, z, T', H', W'] of the prompts with these places in the whole list.

    Keyed by (seed, place), so a prompt's clip does not depend on how prompts are split into batches or ranks.
    """
    return keyed_noise(seed, 0, numbers, latent_shape, device, purpose="sample")


@torch.no_grad()
def generate_latents(
    models: VideoModels,
    noise: Tensor,
    text: Tensor,
    negative_text: Tensor,
    *,
    sampler: SamplerConfig,
    condition: Condition | None = None,
    image_features: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Normalised latents [B, z, T', H', W'] from noise of the same shape.

    Text as the transformer takes it, [B, ...] both; image features [B, I, D] of a model that reads them beside the text.
    """

    def guided(transformer: Callable[..., Tensor], scale: float) -> VelocityFn:
        model = transformer
        if image_features is not None:

            def model(latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
                copies = len(latents) // len(image_features)  # two under guidance
                return transformer(latents, timestep, text, image_features.repeat(copies, 1, 1))

        velocity = guided_velocity(model, text, negative_text, scale)
        # Inside the choice of an expert, which goes by the sampler's timestep and not by those of known places.
        return velocity if condition is None else condition.wrap(velocity)

    scale, low_scale = sampler.expert_guidance_scales()
    velocity = guided(models.transformer, scale)
    if models.transformer_2 is not None:
        velocity = expert_velocity(velocity, guided(models.transformer_2, low_scale), models.boundary)
    latents = sample(velocity, noise, sampler, progress)
    return latents if condition is None else condition.finish(latents)


@torch.no_grad()
def decode_frames(vae: VideoVAE, latents: Tensor, *, tile: int | None = None) -> np.ndarray:
    """Frames uint8 [B, T, H, W, 3] of normalised latents [B, z, T', H', W'].

    Clip after clip and chunk after chunk: at once, 81 frames of 480 x 832 would need tens of GB. With `tile`, also in squares of
    that many latent positions a side, at least 2; neighbours share a quarter, and frames are close to those without, not equal.
    """
    clips = []
    for clip in vae.denormalise(latents).split(1):
        chunks: Iterable[Tensor] = vae.decode_chunked(clip)  # decoded when they are asked for
        if tile is not None:
            chunks = [decode_tiled(vae, clip, tile=tile, overlap=(tile + 2) // 4)]
        clips.append(np.concatenate([to_frames(chunk)[0] for chunk in chunks]))
    return np.stack(clips)


def write_clips(folder: Path, frames: np.ndarray, prompts: list[str], numbers: list[int], *, fps: float) -> list[Path]:
    """Write each clip as `NUMBER-prompt.mp4`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for clip, prompt, number in zip(frames, prompts, numbers, strict=True):
        path = folder / f"{clip_name(number, prompt)}.mp4"
        write_mp4(path, clip, fps=fps)
        paths.append(path)
    return paths


def clip_name(number: int, prompt: str) -> str:
    """File name without suffix: letters and digits of the prompt only, so that no prompt can name another folder."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48]
    return f"{number:04d}-{words or 'empty'}"
