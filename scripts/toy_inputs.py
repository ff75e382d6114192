"""Inputs of a run without any training before it: a few synthetic clips, an autoencoder with random weights, and its latents.

For benchmarks and tests of the trainer, where only shapes and sizes matter.
"""

from dataclasses import replace
from pathlib import Path

import torch

from ..data.config import Access
from ..models.vae import VideoVAE
from ..models.weights import save_model
from ..train.config import TrainConfig, load_train_config
from .encode import ClipEncoder, encode_dataset
from .prepare import prepare_synthetic


def make_toy_inputs(folder: Path, *, clips: int = 64) -> list[str]:
    """Write shards, a random autoencoder and latents under `folder`; returns overrides that point a run at them."""
    overrides = [
        f"vae.path={folder / 'vae'}",
        f"data.path={folder / 'shards' / 'train'}",
        f"data.latents={folder / 'latents'}",
    ]
    config: TrainConfig = load_train_config(["+experiment=quickstart", "dry_run=true", *overrides])
    if not (folder / "shards").exists():
        prepare_synthetic(folder / "shards", clips=clips, test_clips=16, seed=0, workers=2, overwrite=False)
    if not (folder / "vae").exists():
        torch.manual_seed(0)
        vae = VideoVAE(replace(config.vae.architecture, latents_mean=[], latents_std=[])).eval()
        save_model(folder / "vae", vae.config.to_diffusers(), vae.state_dict())
        data, encoder = replace(config.data, access=Access.raw), ClipEncoder(config, torch.device("cpu"))
        encode_dataset(data, folder / "latents" / "train", encoder)
    return overrides
