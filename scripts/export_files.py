"""A run's model as files for ComfyUI's models/ folder, or with the names and places of Wan's own release."""

import json
from pathlib import Path

import torch

from ..models.dit import DiTConfig
from ..models.text import TextEncoderKind
from ..models.vae.config import wan_latent_statistics
from ..models.vae.fold_statistics import fold_statistics
from ..models.vae.folder import load_vae
from ..models.wan_keys import Component, Layout, from_diffusers_keys, transformer_dtype
from ..models.weight_files import Tensors, check_written, copy_files, open_weights, write_tensors
from ..models.weights import save_model
from .export_loaders import has_wan_form
from .export_pipeline import Advance, counted
from .export_plan import ExportPlan
from .export_readme import README_NAME, files_readme
from .export_weights import write_prompt_embeds

TEXT_ENCODER_NAME = "models_t5_umt5-xxl-enc-bf16.safetensors"


def write_comfy(folder: Path, plan: ExportPlan, *, dtype: torch.dtype, prompts: list[str], advance: Advance) -> None:
    """Write diffusion_models/ and vae/, to be copied into ComfyUI's models/; a whole transformer is held in memory, in `dtype`."""
    name = plan.run.run_dir.name
    places = [f"{name}_high_noise", f"{name}_low_noise"] if plan.boundary is not None else [name]
    files = {}
    for place, source in zip(places, plan.transformers, strict=True):
        path = folder / "diffusion_models" / f"{place}.safetensors"
        with source.open() as tensors:
            stored = counted(tensors, advance).as_type(lambda name: transformer_dtype(name, dtype))
            names = from_diffusers_keys(stored.shapes, Component.transformer, Layout.comfy)
            _write_file(path, stored.renamed(names), plan.header(source) | comfy_header(source.model))
        files[str(path.relative_to(folder))] = "copy it to ComfyUI's `models/diffusion_models/`"
    vae_path = folder / "vae" / f"{name}_vae.safetensors"
    _write_vae(vae_path, plan, advance)
    files[str(vae_path.relative_to(folder))] = "copy it to ComfyUI's `models/vae/`"
    if prompts:
        write_prompt_embeds(folder, plan.run, prompts)
    (folder / README_NAME).write_text(files_readme(plan.config, prompts, files), encoding="utf-8")


def write_original(folder: Path, plan: ExportPlan, *, dtype: torch.dtype, prompts: list[str], advance: Advance) -> None:
    """Write a folder laid out as Wan's releases are, all of it in safetensors, none in pickles."""
    config = plan.config
    places = ["high_noise_model", "low_noise_model"] if plan.boundary is not None else ["."]
    files = {}
    for place, source in zip(places, plan.transformers, strict=True):
        with source.open() as tensors:
            stored = counted(tensors, advance).as_type(lambda name: transformer_dtype(name, dtype))
            stored = stored.renamed(from_diffusers_keys(stored.shapes, Component.transformer, Layout.original))
            settings = original_config(source.model, text_len=config.text.max_tokens)
            save_model(folder / place, settings, stored, metadata=plan.header(source))
            check_written(folder / place, stored)
        files[str(Path(place) / "config.json")] = "the transformer, beside its weights"
    vae_name = f"Wan2.{2 if config.vae.resolved().patch_size > 1 else 1}_VAE.safetensors"
    _write_vae(folder / vae_name, plan, advance)
    files[vae_name] = "the autoencoder; Wan's own code reads it as .pth, other tools as it is"
    if config.text.kind is TextEncoderKind.umt5:
        source_folder = Path(config.text.path or "")
        with open_weights(source_folder / "text_encoder") as tensors:
            names = from_diffusers_keys(tensors.shapes, Component.text_encoder, Layout.original)
            _write_file(folder / TEXT_ENCODER_NAME, tensors.renamed(names), {})
        copy_files(source_folder / "tokenizer", folder / "google" / "umt5-xxl")
        files[TEXT_ENCODER_NAME] = "the text encoder, with its tokenizer in `google/umt5-xxl/`"
    if prompts:
        write_prompt_embeds(folder, plan.run, prompts)
    (folder / README_NAME).write_text(files_readme(config, prompts, files), encoding="utf-8")


def original_config(model: DiTConfig, *, text_len: int) -> dict[str, object]:
    """config.json of Wan's release, whose code has patches of 1 x 2 x 2 and text features of width 4096 built in."""
    kind = "t2v" if model.in_channels == model.out_channels else "i2v"
    return {
        "_class_name": "WanModel",
        "model_type": "ti2v" if model.out_channels == 48 else kind,
        "dim": model.dim,
        "ffn_dim": model.ffn_dim,
        "freq_dim": model.freq_dim,
        "in_dim": model.in_channels,
        "out_dim": model.out_channels,
        "num_heads": model.num_attention_heads,
        "num_layers": model.num_layers,
        "text_len": text_len,
        "eps": model.eps,
    }


def comfy_header(model: DiTConfig) -> dict[str, str]:
    """Sizes that ComfyUI cannot tell from the tensors, for versions that read them from the header; empty for Wan's own."""
    sizes = {
        "num_heads": (model.num_attention_heads, model.dim // 128),
        "patch_size": (list(model.patch_size), [1, 2, 2]),
        "out_dim": (
            model.out_channels,
            model.out_channels * model.patch_size[0] * model.patch_size[1] * model.patch_size[2] // 4,
        ),
        "freq_dim": (model.freq_dim, 256),
        "text_dim": (model.text_dim, 4096),
        "eps": (model.eps, 1e-6),
    }
    differing = {name: value for name, (value, guessed) in sizes.items() if value != guessed}
    return {"config": json.dumps({"transformer": differing})} if differing else {}


def _write_vae(path: Path, plan: ExportPlan, advance: Advance) -> None:
    """The autoencoder with the release's names and, where it has a Wan autoencoder's sizes, its fixed latent statistics."""
    vae = load_vae(plan.config.vae.path or "")
    weights, config = vae.state_dict(), vae.config
    if has_wan_form(config):
        weights, _ = fold_statistics(weights, config, *wan_latent_statistics(config.z_dim))
    tensors = counted(Tensors.of(weights), advance)
    _write_file(path, tensors.renamed(from_diffusers_keys(weights, Component.vae, Layout.original)), {})


def _write_file(path: Path, tensors: Tensors, header: dict[str, str]) -> None:
    write_tensors(path, dict(tensors), header)
    check_written(path, tensors)
