"""A pipeline folder of a run: what diffusers, FastVideo and vLLM-Omni open, and what training and sampling here start from."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..models.diffusion.conditioning import ConditioningForm
from ..models.diffusion.scheduler_file import scheduler_config
from ..models.pipeline_folder import write_model_index
from ..models.text import TextEncoderKind
from ..models.vae.folder import load_vae
from ..models.wan_keys import transformer_dtype
from ..models.weight_files import Tensors, check_written, copy_files, write_json
from ..models.weights import save_model
from ..train.config import TrainConfig
from .export_plan import ExportPlan
from .export_readme import README_NAME, pipeline_readme
from .export_weights import write_prompt_embeds, write_trained_umt5

Advance = Callable[[int], None]  # is told how many numbers were written or read again


def write_pipeline(folder: Path, plan: ExportPlan, *, dtype: torch.dtype, prompts: list[str], advance: Advance) -> None:
    """Write all parts of a pipeline into the empty `folder`, the transformers in `dtype`."""
    config = plan.config
    for part, source in zip(("transformer", "transformer_2"), plan.transformers, strict=False):
        with source.open() as tensors:
            stored = counted(tensors, advance).as_type(lambda name: transformer_dtype(name, dtype))
            save_model(folder / part, source.model.to_diffusers(), stored, metadata=plan.header(source))
            check_written(folder / part, stored)
    vae = load_vae(config.vae.path or "")
    # Float32 whatever the transformer is in: in bf16 latents move by 2 % and frames by 3 %.
    tensors = counted(Tensors.of(vae.state_dict()), advance)
    save_model(folder / "vae", vae.config.to_diffusers(), tensors)
    check_written(folder / "vae", tensors)
    write_text_parts(folder, plan, prompts)
    copy_image_parts(config, folder)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(config.sampler))
    is_clean_frames = config.conditioning.form is ConditioningForm.clean_frames
    write_model_index(folder, boundary_ratio=plan.boundary, expand_timesteps=is_clean_frames)
    (folder / README_NAME).write_text(pipeline_readme(config, prompts), encoding="utf-8")


def write_text_parts(folder: Path, plan: ExportPlan, prompts: list[str]) -> None:
    """The text encoder and its tokenizer, or the features of prompts where other tools have no such encoder."""
    text = plan.config.text
    if text.kind is TextEncoderKind.umt5:
        for part in ("text_encoder", "tokenizer"):
            copy_files(Path(text.path or "") / part, folder / part)
    elif text.kind is TextEncoderKind.umt5_small:
        write_trained_umt5(folder, plan.run)
    elif prompts:
        write_prompt_embeds(folder, plan.run, prompts)


def copy_image_parts(config: TrainConfig, folder: Path) -> None:
    """The image encoder of a model that reads image features beside the text (Wan 2.1 I2V)."""
    if config.model.image_dim is not None and config.conditioning.image_encoder:
        for part in ("image_encoder", "image_processor"):
            copy_files(Path(config.conditioning.image_encoder) / part, folder / part)


def counted(tensors: Tensors, advance: Advance) -> Tensors:
    """The same tensors; `advance` is told the size of each that is read."""

    def read(name: str) -> torch.Tensor:
        advance(tensors.shapes[name].numel())
        return tensors.read(name)

    return Tensors(tensors.shapes, read)
