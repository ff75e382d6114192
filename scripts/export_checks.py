"""Checks of an exported pipeline folder: what was written is what was meant, and diffusers computes the same with it."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..models.dit import DiT, DiTConfig
from ..models.token_layout import SelfAttentionConfig
from ..models.vae.folder import load_vae
from ..models.weights import load_config, load_weights_from

# Rows of text by which diffusers tells them from those of an image before them.
TEXT_ROWS = 512
# Largest difference from diffusers, relative to the largest value: float32 rounding is below 1e-5.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One part computed by both code bases: the largest relative difference, or why it was not computed."""

    part: str
    difference: float | None
    reason: str = ""


def compare_with_diffusers(folder: Path) -> list[Comparison]:
    """Run the transformers and the autoencoder of a pipeline folder here and in diffusers, in float32 on the CPU.

    Raises ValueError where diffusers misses or does not know a tensor, or computes something else.
    """
    if importlib.util.find_spec("diffusers") is None:
        return [Comparison("diffusers", None, "not installed, nothing was compared (pip install diffusers)")]
    parts: list[tuple[str, Callable[[Path], Comparison]]] = [
        ("transformer", _compare_transformer),
        ("transformer_2", _compare_transformer),
        ("vae", _compare_vae),
    ]
    found = [compare(folder / part) for part, compare in parts if (folder / part).is_dir()]
    for comparison in found:
        if comparison.difference is not None and not comparison.difference <= TOLERANCE:
            raise ValueError(
                f"{folder / comparison.part} computes something else in diffusers (relative difference "
                f"{comparison.difference:.2g}, at most {TOLERANCE:g} is rounding); this is a fault of the export"
            )
    return found


def _compare_transformer(folder: Path) -> Comparison:
    config = DiTConfig.from_diffusers(load_config(folder))
    if config.self_attention != SelfAttentionConfig():
        return Comparison(folder.name, None, "not compared, diffusers knows full attention only")
    if reason := _too_large(folder):
        return Comparison(folder.name, None, reason)
    pt, ph, pw = config.patch_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, 2 * pt, 4 * ph, 4 * pw, generator=generator)
    text = torch.randn(1, TEXT_ROWS, config.text_dim, generator=generator)
    timestep = torch.tensor([500.0])
    image, image_there = None, None
    if config.image_dim is not None:
        image = torch.randn(1, config.image_tokens, config.image_dim, generator=generator)
        # There two images are two rows of the batch.
        image_there = image.unflatten(1, (2, -1)).squeeze(0) if config.pos_embed_seq_len else image
    ours = DiT(config).eval().requires_grad_(False)
    load_weights_from(ours, folder)
    with torch.no_grad():
        velocity = ours(latents, timestep, text, image)
        del ours  # one model of this size at a time
        theirs = _from_diffusers("WanTransformer3DModel", folder)
        expected = theirs(latents, timestep, text, image_there, return_dict=False)[0]
    return Comparison(folder.name, _difference(velocity, expected))


def _compare_vae(folder: Path) -> Comparison:
    if reason := _too_large(folder):
        return Comparison(folder.name, None, reason)
    ours = load_vae(folder).eval()
    side = 4 * ours.config.spatial_stride
    pixels = torch.rand(1, 3, 1 + ours.config.temporal_stride, side, side, generator=torch.Generator().manual_seed(0))
    pixels = 2 * pixels - 1
    with torch.no_grad():
        latents = ours.encode(pixels).mode()
        decoded = ours.decode(latents).clamp(-1, 1)
        theirs = _from_diffusers("AutoencoderKLWan", folder)
        expected = theirs.encode(pixels).latent_dist.mode()
        decoded_there = theirs.decode(latents, return_dict=False)[0]
    return Comparison(folder.name, max(_difference(latents, expected), _difference(decoded, decoded_there)))


def _from_diffusers(class_name: str, folder: Path) -> Any:
    """diffusers' model of a folder in float32. By itself it fills missing tensors with noise; here that is a ValueError."""
    import diffusers

    model, info = getattr(diffusers, class_name).from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    if problems := {kind: names for kind, names in info.items() if names}:
        raise ValueError(
            f"{folder} does not load into diffusers' {class_name}: {problems}; this is a fault of the export"
        )
    return model.float().eval()


def _too_large(folder: Path) -> str:
    """Why a model does not fit into memory in float32 beside its file's tensors; empty where it does."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed, free = 3 * stored, psutil.virtual_memory().available  # a file of bf16 doubles in float32
    if needed <= free:
        return ""
    return f"not compared, that takes about {needed / 2**30:.0f} GiB of memory and {free / 2**30:.0f} GiB are free"


def _difference(ours: Tensor, theirs: Tensor) -> float:
    scale = theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((ours - theirs).abs().max() / scale)
