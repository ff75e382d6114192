"""Causal video autoencoder (Wan 2.1 and 2.2 forms): model, training loss, inflation, latent statistics."""

from .autoencoder import LatentDistribution, VideoVAE
from .config import VAEConfig

__all__ = ["LatentDistribution", "VAEConfig", "VideoVAE"]
