"""How well a video autoencoder gives back clips: PSNR against a constant colour, and a video to look at."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.config import DataConfig
from ..data.loader import VideoLoader
from ..data.mp4 import write_mp4
from ..models.vae.folder import load_vae
from ..train.generate import to_uint8_frames


@torch.no_grad()
def measure_reconstruction(vae_folder: Path, data: DataConfig, *, video: Path) -> dict[str, float]:
    """Mean PSNR in dB over a dataset's clips, of the reconstruction and of each clip's best constant colour.

    The latents are the distribution's mean, as a diffusion model sees them. Also writes some clips above their
    reconstructions to `video`.
    """
    vae = load_vae(vae_folder).eval()
    loader = VideoLoader(data, global_batch=1, micro_batch=1, rank=0, world_size=1, seed=0)
    reconstructed, constant, pairs = [], [], []
    for batch in loader.every_row(16):
        pixels = batch.pixels
        assert pixels is not None
        output = vae.decode(vae.encode(pixels).mode()).clamp(-1, 1)
        reconstructed += psnr(output, pixels)
        # The mean colour is the constant with the least squared error.
        constant += psnr(pixels.mean((2, 3, 4), keepdim=True).expand_as(pixels), pixels)
        pairs.append(np.concatenate((to_uint8_frames(pixels), to_uint8_frames(output)), axis=2))  # [B, T, 2H, W, 3]
    loader.close()
    write_mp4(video, np.concatenate(list(pairs[0][:8]), axis=2), fps=data.fps)
    return {
        "vae_psnr_db": float(np.mean(reconstructed)),
        "constant_colour_psnr_db": float(np.mean(constant)),
        "vae_clips": len(reconstructed),
    }


def psnr(output: Tensor, pixels: Tensor) -> list[float]:
    """PSNR in dB of each clip [B, 3, T, H, W] with values in [-1, 1]."""
    error = (output - pixels).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp_min(1e-10))).tolist()
