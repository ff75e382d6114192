"""Reading a trained video autoencoder from a folder in the diffusers form."""

from pathlib import Path

from ..weights import load_config, load_state_dict, load_weights
from .autoencoder import VideoVAE
from .config import VAEConfig


def load_vae(folder: Path | str) -> VideoVAE:
    """The autoencoder of a folder with `config.json` and safetensors, fp32, on the CPU.

    Raises ValueError naming the file or the tensors where the folder does not hold one.
    """
    vae = VideoVAE(VAEConfig.from_diffusers(load_config(folder)))
    load_weights(vae, load_state_dict(folder), where=str(folder))
    return vae
