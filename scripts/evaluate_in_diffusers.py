r"""How well an exported model follows its prompts in diffusers: clips that are made there, judged as `muybridge evaluate` does.

    python -m muybridge.scripts.evaluate_in_diffusers --model runs/quickstart/pipeline --prompts runs/quickstart/prompts.txt \
        --labels runs/quickstart/prompt_labels.json --out runs/quickstart/diffusers_samples

Noise and settings are those of `muybridge sample`, so the table must be the one of the run itself, but for rounding.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..models.pipeline_folder import TEXT_TO_VIDEO, PipelineFiles
from ..models.vae.config import VAEConfig
from ..models.weight_files import read_header
from ..models.weights import load_config
from ..train.generate import NEGATIVE_PROMPT, clip_name, prompt_noise, write_clips
from .evaluate import evaluate_folder, print_scores, scores_to_json
from .export_plan import EXPORTED_SETTINGS
from .sample import read_prompts

BATCH = 8


def main(argv: list[str]) -> int:
    """Make the clips and judge them; returns the exit code. Raises ValueError for a folder, prompts or labels that do not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m muybridge.scripts.evaluate_in_diffusers", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="text-to-video folder that `muybridge export` wrote")
    parser.add_argument("--prompts", type=Path, required=True, help="text file with one prompt a line")
    parser.add_argument("--labels", type=Path, required=True, help="JSON of what each clip should show, as of evaluate")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the mp4s")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(argv)
    prompts = read_prompts(options.prompts)
    _check_labels(options.labels, prompts)
    if options.out.exists():
        raise ValueError(f"--out={options.out} exists already: choose another, or remove it")
    columns = (TextColumn("sampling in diffusers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=len(prompts))
        generate_in_diffusers(options.model, prompts, options.out, lambda clips: bar.advance(task, clips))
    scores = evaluate_folder(options.out, options.labels)
    print_scores(scores)
    if options.json:
        options.json.write_text(json.dumps(scores_to_json(scores), indent=2) + "\n", encoding="utf-8")
    print(f"muybridge: wrote {len(prompts)} mp4s to {options.out}")
    print("next: compare with the figures of `muybridge evaluate` over the run's own clips")
    return 0


def generate_in_diffusers(model: Path, prompts: list[str], out: Path, advance: Callable[[int], None]) -> None:
    """Write `NUMBER-prompt.mp4` of each prompt; `advance` is told how many more clips there are.

    Raises ValueError where the folder is no text-to-video model or does not say what it was trained for.
    """
    files = PipelineFiles.find(model)
    if files.class_name != TEXT_TO_VIDEO or files.transformer is None or files.vae is None:
        raise ValueError(f"--model={model} must be a text-to-video folder with transformer/ and vae/")
    settings = json.loads(read_header(files.transformer).get(EXPORTED_SETTINGS, "{}"))
    if not settings:
        raise ValueError(
            f"--model={model} does not say its sizes and sampler: it must be written by `muybridge export`"
        )
    size = settings["data"]
    shape = VAEConfig.from_diffusers(load_config(files.vae)).latent_shape(size["frames"], size["height"], size["width"])
    for numbers, frames in _clips(model, settings, prompts, shape):
        write_clips(out, frames, [prompts[number] for number in numbers], numbers, fps=size["fps"])
        advance(len(numbers))


def _clips(
    model: Path, settings: dict[str, Any], prompts: list[str], latent_shape: tuple[int, ...]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Places of prompts and their frames, uint8 [B, T, H, W, 3]."""
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = diffusers.WanPipeline.from_pretrained(model, local_files_only=True).to(device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size, sampler = settings["data"], settings["sampler"]
    for start in range(0, len(prompts), BATCH):
        numbers = list(range(start, min(start + BATCH, len(prompts))))
        frames = pipeline(
            [prompts[number] for number in numbers],
            negative_prompt=[NEGATIVE_PROMPT] * len(numbers),
            height=size["height"],
            width=size["width"],
            num_frames=size["frames"],
            num_inference_steps=sampler["steps"],
            guidance_scale=sampler["guidance_scale"],
            # None is for a pipeline of one transformer, or one scale for both.
            guidance_scale_2=sampler["guidance_scale_low"],
            max_sequence_length=settings["text"]["max_tokens"],
            latents=prompt_noise(0, numbers, latent_shape, device),
            output_type="np",
        ).frames
        yield numbers, np.round(255 * frames).astype(np.uint8)


def _check_labels(labels: Path, prompts: list[str]) -> None:
    """Raises ValueError before a clip is made where the labels are not of these prompts."""
    if not labels.is_file():
        raise ValueError(f"--labels={labels} does not exist; it says what each clip should show")
    known = json.loads(labels.read_text(encoding="utf-8")).keys()
    if odd := known ^ {clip_name(number, prompt) for number, prompt in enumerate(prompts)}:
        raise ValueError(
            f"--labels={labels} must name the clips of the prompts; not in both: {', '.join(sorted(odd)[:5])}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
