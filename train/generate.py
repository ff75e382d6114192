"""From prompts to frames with a trained model: sampling, decoding and writing mp4s, for validation and `muybridge sample`."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..data.mp4 import write_mp4
from ..data.pixels import to_frames
from ..models.diffusion.guidance import guided_velocity
from ..models.diffusion.objective import VelocityModel, keyed_noise
from ..models.diffusion.samplers import SamplerConfig, sample
from .config import TrainConfig
from .tasks import TextToVideoTask

NEGATIVE_PROMPT = ""


@torch.no_grad()
def generate_frames(
    model: VelocityModel,
    task: TextToVideoTask,
    prompts: list[str],
    numbers: list[int],
    *,
    sampler: SamplerConfig,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Frames uint8 [B, T, H, W, 3] for B prompts.

    `numbers` are the prompts' places in the whole list: noise is keyed by (seed, number), so a prompt's clip does not depend
    on how prompts are split into batches or ranks.
    """
    noise = keyed_noise(seed, 0, numbers, task.config.latent_shape(), task.device, purpose="sample")
    velocity = guided_velocity(
        model, task.encode_text(prompts), task.encode_text([NEGATIVE_PROMPT] * len(prompts)), sampler.guidance_scale
    )
    latents = sample(velocity, noise, sampler, progress)  # [B, z, T', H', W']
    return to_frames(task.vae.decode(task.vae.denormalise(latents)))


def write_clips(
    folder: Path, frames: np.ndarray, prompts: list[str], numbers: list[int], config: TrainConfig
) -> list[Path]:
    """Write each clip as `NUMBER-prompt.mp4`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for clip, prompt, number in zip(frames, prompts, numbers, strict=True):
        path = folder / f"{clip_name(number, prompt)}.mp4"
        write_mp4(path, clip, fps=config.data.fps)
        paths.append(path)
    return paths


def clip_name(number: int, prompt: str) -> str:
    """File name without suffix: letters and digits of the prompt only, so that no prompt can name another folder."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48]
    return f"{number:04d}-{words or 'empty'}"
