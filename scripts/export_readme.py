"""README.md of an export: how other tools open it."""

from ..models.diffusion.conditioning import ConditioningForm
from ..models.text import TextEncoderKind
from ..train.config import TrainConfig

README_NAME = "README.md"
PROMPT_EMBEDS_NAME = "prompt_embeds.safetensors"


def pipeline_readme(config: TrainConfig, prompts: list[str]) -> str:
    """Of a pipeline folder."""
    takes_image = config.conditioning.form is not ConditioningForm.none
    class_name = "WanImageToVideoPipeline" if takes_image else "WanPipeline"
    data, sampler, text = config.data, config.sampler, config.text
    size = f"height={data.height}, width={data.width}, num_frames={data.frames}"
    low = f", guidance_scale_2={sampler.guidance_scale_low:g}" if sampler.guidance_scale_low is not None else ""
    settings = f"num_inference_steps={sampler.steps}, guidance_scale={sampler.guidance_scale:g}{low}"
    image = "image=image, " if takes_image else ""
    if text.kind is TextEncoderKind.bytes:
        code = f"""\
from diffusers import {class_name}
from safetensors.torch import load_file

pipeline = {class_name}.from_pretrained("THIS_FOLDER", text_encoder=None, tokenizer=None)
text = load_file("THIS_FOLDER/{PROMPT_EMBEDS_NAME}")
video = pipeline(
    prompt_embeds=text["prompt_embeds"][:1], negative_prompt_embeds=text["negative_prompt_embeds"],
    {image}{size}, {settings},
).frames[0]
"""
    else:
        # Rows of padding are attended to: the model knows as many as it was trained with.
        code = f"""\
from diffusers import {class_name}

pipeline = {class_name}.from_pretrained("THIS_FOLDER")
video = pipeline(
    prompt="a prompt", {image}{size}, {settings},
    max_sequence_length={text.max_tokens},
).frames[0]
"""
    known_prompts = prompt_list(prompts) if text.kind is TextEncoderKind.bytes else ""
    title = "An image-to-video model" if takes_image else "A text-to-video model"
    return f"# {title}\n\nWritten by `muybridge export`.\n\n```python\n{code}```\n{known_prompts}"


def files_readme(config: TrainConfig, prompts: list[str], files: dict[str, str]) -> str:
    """Of files for ComfyUI or Wan's own code; `files` says for each what to do with it."""
    lines = "".join(f"- `{name}`: {words}\n" for name, words in files.items())
    sampler = config.sampler
    known_prompts = prompt_list(prompts) if config.text.is_trained else ""
    settings = f"{sampler.steps} steps, shift {sampler.shift:g}, guidance {sampler.guidance_scale:g}"
    return (
        f"# A video model\n\nWritten by `muybridge export`.\n\n{lines}\nIt was made for {settings}, and clips of "
        f"{config.data.frames} frames of {config.data.width} x {config.data.height}.\n{known_prompts}"
    )


def prompt_list(prompts: list[str]) -> str:
    """Which prompts have their features in the file, for a text encoder that such tools do not have."""
    known_here = "\nTools that open this form do not have the text encoder of this model. "
    if not prompts:
        return known_here + f"With `prompts=FILE` an export has the features of prompts, in `{PROMPT_EMBEDS_NAME}`.\n"
    numbered = "".join(f"{number}. {prompt}\n" for number, prompt in enumerate(prompts))
    return (
        known_here
        + f"`{PROMPT_EMBEDS_NAME}` holds the features of an empty negative prompt\nand of these, in this order:\n\n{numbered}"
    )
