"""How well a video autoencoder gives back clips: PSNR against a constant colour, and a video to look at."""

from pathlib import Path

import numpy as np
import torch

from ..data.config import DataConfig, single_clips
from ..data.loader import VideoLoader
from ..data.mp4 import write_mp4
from ..data.pixels import to_frames
from ..models.vae.folder import load_vae
from ..models.vae.loss import psnr_db
from .pictures import side_by_side

SHOWN_CLIPS = 8


@torch.no_grad()
def measure_reconstruction(vae_folder: Path, data: DataConfig, *, video: Path) -> dict[str, float]:
    """Mean PSNR in dB over a dataset's clips, of the reconstruction and of each clip's best constant colour.

    The latents are the distribution's mean, as a diffusion model sees them. Also writes some clips beside their
    reconstructions to `video`.
    """
    vae = load_vae(vae_folder).eval()
    loader = VideoLoader(data, buckets=single_clips(data), rank=0, world_size=1, seed=0)
    reconstructed: list[float] = []
    constant: list[float] = []
    pairs: list[np.ndarray] = []
    for batch in loader.every_row(16):
        pixels = batch.pixels
        output = vae.decode(vae.encode(pixels).mode()).clamp(-1, 1)
        reconstructed += psnr_db(output, pixels).tolist()
        # The mean colour is the constant with the least squared error.
        constant += psnr_db(pixels.mean((2, 3, 4), keepdim=True).expand_as(pixels), pixels).tolist()
        if len(pairs) < SHOWN_CLIPS:
            pairs += map(side_by_side, to_frames(pixels), to_frames(output))
    loader.close()
    write_mp4(video, np.concatenate(pairs[:SHOWN_CLIPS], axis=1), fps=data.fps)
    return {
        "vae_psnr_db": float(np.mean(reconstructed)),
        "constant_colour_psnr_db": float(np.mean(constant)),
        "vae_clips": len(reconstructed),
    }
