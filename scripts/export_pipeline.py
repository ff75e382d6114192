"""A pipeline folder of a run: what diffusers, FastVideo and vLLM-Omni open, and what training and sampling here start from."""

import json
from pathlib import Path

import torch

from ..models.diffusion.scheduler_file import scheduler_config
from ..models.pipeline_folder import write_model_index
from ..models.text import TextEncoderKind
from ..models.vae.folder import load_vae
from ..models.weight_files import Tensors
from ..train.config import TrainConfig
from .export_parts import trained_tensors, transformer_dtype, write_model
from .export_plan import RunWeights
from .export_text import PROMPT_EMBEDS_NAME, copy_text_parts, write_prompt_embeds

README_NAME = "README.md"


def write_pipeline(folder: Path, experts: list[RunWeights], *, dtype: torch.dtype, prompts: list[str]) -> None:
    """Write a pipeline into the empty `folder`: one expert, or that of high noise and that of low noise."""
    config = experts[0].config
    for part, expert in zip(("transformer", "transformer_2"), experts, strict=False):
        with trained_tensors(expert, "transformer.") as tensors:
            stored = tensors.as_type(lambda name: transformer_dtype(name, dtype))
            write_model(folder / part, expert.config.model.to_diffusers(), stored, expert.header())
    vae = load_vae(config.vae.path or "")
    # Float32 whatever the transformer is in: in bf16 latents move by 2 % and frames by 3 %.
    weights = vae.state_dict()
    tensors = Tensors({name: value.shape for name, value in weights.items()}, weights.__getitem__)
    write_model(folder / "vae", vae.config.to_diffusers(), tensors, {})
    if config.text.kind is TextEncoderKind.umt5:
        copy_text_parts(Path(config.text.path or ""), folder)
    elif prompts:
        with trained_tensors(experts[0], "text_encoder.") as encoder:
            write_prompt_embeds(folder, config.text, dict(encoder), prompts)
    (folder / "scheduler").mkdir()
    settings = json.dumps(scheduler_config(config.sampler), indent=2) + "\n"
    (folder / "scheduler" / "scheduler_config.json").write_text(settings, encoding="utf-8")
    write_model_index(folder)
    (folder / README_NAME).write_text(_readme(config, prompts), encoding="utf-8")


def _readme(config: TrainConfig, prompts: list[str]) -> str:
    """How the folder is opened."""
    data, sampler = config.data, config.sampler
    settings = (
        f"height={data.height}, width={data.width}, num_frames={data.frames}, "
        f"num_inference_steps={sampler.steps}, guidance_scale={sampler.guidance_scale:g}"
    )
    if config.text.kind is TextEncoderKind.umt5:
        code = f"""\
from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("THIS_FOLDER")
video = pipeline("a prompt", {settings}).frames[0]
"""
        words = ""
    else:
        code = f"""\
from diffusers import WanPipeline
from safetensors.torch import load_file

pipeline = WanPipeline.from_pretrained("THIS_FOLDER", text_encoder=None, tokenizer=None)
text = load_file("THIS_FOLDER/{PROMPT_EMBEDS_NAME}")
prompt, negative = text["prompt_embeds"][:1], text["negative_prompt_embeds"]
video = pipeline(prompt_embeds=prompt, negative_prompt_embeds=negative, {settings}).frames[0]
"""
        numbered = "".join(f"{number}. {prompt}\n" for number, prompt in enumerate(prompts))
        words = f"""
The text encoder of this model is no part of diffusers, which takes the features of prompts instead: `{PROMPT_EMBEDS_NAME}`
holds those of an empty negative prompt and of the prompts below, in their order. Made without `prompts=FILE`, an export has none.

{numbered}"""
    return f"# A text-to-video model\n\nWritten by `muybridge export`.\n\n```python\n{code}```\n{words}"
