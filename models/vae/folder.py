"""Reading a trained video autoencoder from a folder in the diffusers form."""

import hashlib
from pathlib import Path

from ..weights import load_config, load_weights_from
from .autoencoder import VideoVAE
from .config import VAEConfig


def load_vae(folder: Path | str) -> VideoVAE:
    """The autoencoder of a folder with `config.json` and safetensors, fp32, on the CPU.

    Raises ValueError naming the file or the tensors where the folder does not hold one.
    """
    vae = VideoVAE(VAEConfig.from_diffusers(load_config(folder)))
    load_weights_from(vae, folder)
    return vae


def vae_fingerprint(folder: Path | str) -> str:
    """Changes with the autoencoder's weights, sizes and latent statistics."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(folder).iterdir()):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
