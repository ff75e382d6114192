"""`muybridge import SRC OUT`: public Wan weights, of whatever layout, as a pipeline folder that training and sampling read."""

from __future__ import annotations

import argparse
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..models.diffusion.samplers import SamplerConfig
from ..models.diffusion.scheduler_file import scheduler_config
from ..models.dit import DiTConfig
from ..models.pipeline_folder import MODEL_INDEX_NAME, is_pipeline_folder, write_model_index
from ..models.wan_keys import Component, transformer_dtype
from ..models.weight_files import (
    PICKLE_SUFFIXES,
    TRANSFORMERS_STEM,
    WEIGHTS_STEM,
    Tensors,
    check_written,
    copy_files,
    write_json,
)
from ..models.weights import save_model
from .dataset_commands import console, say
from .export_plan import EXPORTED_SETTINGS
from .import_parts import OpenPart, open_part
from .import_plan import ImportPlan, component_of, plan_import

# Of --help.
STEPS = """\
From a folder of Wan's release to a model of your own:

  muybridge import Wan2.1-T2V-1.3B/ weights/wan_1_3b
  muybridge sample model=weights/wan_1_3b prompts=prompts.txt
  muybridge prepare my_videos/ datasets/train
  muybridge train +experiment=wan_1_3b_lora dry_run=true           check every setting, start nothing
  torchrun --nproc-per-node 8 -m muybridge.train +experiment=wan_1_3b_lora
  muybridge sample run=runs/wan_1_3b_lora prompts=prompts.txt
  muybridge export run=runs/wan_1_3b_lora out=my_lora.safetensors  for ComfyUI and diffusers

Other experiments: wan_14b_full, wan2_2_5b_full, wan2_2_a14b_two_experts, wan_i2v. A folder of diffusers needs no import."""

_DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.float64: "fp64"}
# Timesteps from 1000 x this on belong to the expert of high noise.
_T2V_BOUNDARY, _I2V_BOUNDARY = 0.875, 0.9
_EXPECTED = ("vae", "text_encoder", "tokenizer")
_OF_IMAGES = ("image_encoder", "image_processor")
# In the list of what is missing: how to bring a part in.
_REMEDIES = {
    "vae": "--vae FILE (Wan2.1_VAE.pth or Wan2.2_VAE.pth of the release)",
    "text_encoder": "--text-encoder FILE (models_t5_umt5-xxl-enc-bf16.pth of the release)",
    "tokenizer": "--tokenizer FOLDER (google/umt5-xxl of the release)",
    "image_encoder": "copy image_encoder/ from a pipeline folder of Wan 2.1 I2V",
    "image_processor": "copy image_processor/ from a pipeline folder of Wan 2.1 I2V",
}


def main(argv: list[str]) -> int:
    """Runs the command. Raises ValueError for a user's mistake, which the `muybridge` command prints."""
    arguments = _parser().parse_args(argv)
    import_weights(
        plan_import(
            arguments.src,
            low_noise=arguments.low_noise,
            vae=arguments.vae,
            text_encoder=arguments.text_encoder,
            tokenizer=arguments.tokenizer,
        ),
        arguments.out,
        dtype=_DTYPES[arguments.dtype],
        overwrite=arguments.overwrite,
    )
    return 0


def import_weights(plan: ImportPlan, out: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Writes the pipeline folder `out`, whole or not at all, and says what it holds and lacks.

    `dtype` None keeps every tensor's own; the autoencoder's is kept always, for in bf16 it is 2 % off. Raises ValueError where
    a part is not whole, parts do not belong together, or `out` is in the way; nothing is written then.
    """
    _check_out(plan, out, overwrite=overwrite)
    with ExitStack() as stack:
        parts = {part: open_part(component_of(part), path, stack) for part, path in plan.weights.items()}
        _check_together(parts)
        _check_space(out, _copied_bytes(plan) + sum(_bytes(opened, dtype) for opened in parts.values()))
        with _staged(out) as folder:
            table = Table("part", "parameters", "dtype", "from")
            with _progress(parts) as advance:
                for part, opened in parts.items():
                    dtypes = _write(opened, folder / part, dtype, advance)
                    table.add_row(part, f"{opened.parameters / 1e6:,.1f} M", dtypes, Text(str(opened.source)))
            for part, path in plan.copies.items():
                copy_files(path, folder / part)
                table.add_row(part, "", "", Text(str(path)))
            shift = None if "scheduler" in plan.copies else _write_scheduler(folder / "scheduler", parts)
            boundary, expand_timesteps = _pipeline_settings(plan, parts)
            write_model_index(folder, boundary_ratio=boundary, expand_timesteps=expand_timesteps)
    console.print(table)
    _say_end(out, parts, shift=shift, boundary=boundary)


def _write(part: OpenPart, folder: Path, dtype: torch.dtype | None, advance: Callable[[int], None]) -> str:
    """Writes a part, reads it again and compares; returns the dtypes in it."""
    seen: dict[torch.dtype, int] = {}

    def read(name: str) -> torch.Tensor:
        tensor = part.tensors.read(name)
        if dtype is not None and part.component is Component.transformer:
            tensor = tensor.to(transformer_dtype(name, dtype))
        elif dtype is not None and part.component is Component.text_encoder:
            tensor = tensor.to(dtype)
        seen[tensor.dtype] = seen.get(tensor.dtype, 0) + tensor.numel()
        advance(tensor.numel())
        return tensor

    tensors = Tensors(part.tensors.shapes, read)
    stem = TRANSFORMERS_STEM if part.component is Component.text_encoder else WEIGHTS_STEM
    save_model(folder, part.config, tensors, stem=stem, metadata=part.header)
    check_written(folder, tensors)
    return ", ".join(_DTYPE_NAMES[kind] for kind in sorted(seen, key=lambda kind: -seen[kind]))


def _check_together(parts: dict[str, OpenPart]) -> None:
    """Raises ValueError for parts of different models."""
    transformer = parts["transformer"]
    low = parts.get("transformer_2")
    if low is not None and low.config != transformer.config:
        odd = [name for name, value in transformer.config.items() if low.config.get(name) != value]
        sizes = ", ".join(f"{name}={low.config.get(name)} must be {transformer.config[name]}" for name in odd)
        raise ValueError(f"{low.source} is no expert beside {transformer.source}: {sizes}")
    vae = parts.get("vae")
    if vae is not None and vae.channels != transformer.channels:
        raise ValueError(
            f"{vae.source} has latents of {vae.channels} channels and {transformer.source} makes {transformer.channels}: give "
            f"Wan 2.1's autoencoder for 16 (also that of the A14B models), Wan 2.2's for 48 (the 5B model)"
        )
    text, text_dim = parts.get("text_encoder"), transformer.config["text_dim"]
    if text is not None and text.channels != text_dim:
        raise ValueError(
            f"{text.source} has features of width {text.channels}, and {transformer.source} reads {text_dim}"
        )


def _bytes(part: OpenPart, dtype: torch.dtype | None) -> int:
    """About what a part takes on disk."""
    if dtype is not None and part.component is not Component.vae:
        return part.parameters * dtype.itemsize
    files = part.source.glob("*.safetensors") if part.source.is_dir() else [part.source]
    return sum(path.stat().st_size for path in files)


def _copied_bytes(plan: ImportPlan) -> int:
    files = [path for folder in plan.copies.values() for path in folder.iterdir() if path.is_file()]
    return sum(path.stat().st_size for path in files if path.suffix not in PICKLE_SUFFIXES)


def _check_space(out: Path, needed: int) -> None:
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ValueError(f"{out} takes {needed / 1e9:.1f} GB, and the disk of {parent} has {free / 1e9:.1f} GB left")


def _pipeline_settings(plan: ImportPlan, parts: dict[str, OpenPart]) -> tuple[float | None, bool]:
    """The boundary between two experts, and whether each token has a timestep (Wan 2.2's 5B model, of 48 channels)."""
    expand = plan.expand_timesteps
    if expand is None:
        expand = parts["transformer"].channels == 48
    if "transformer_2" not in parts:
        return None, expand
    published = _I2V_BOUNDARY if _takes_images(parts) else _T2V_BOUNDARY
    return plan.boundary_ratio or published, expand


def _write_scheduler(folder: Path, parts: dict[str, OpenPart]) -> float | None:
    """With the shift of the run that an export is of, else the one published for these sizes, which releases keep in their code.

    Returns the latter, None for the former.
    """
    folder.mkdir()
    for part in ("transformer", "transformer_2"):
        settings = json.loads(parts[part].header.get(EXPORTED_SETTINGS, "{}")) if part in parts else {}
        if "sampler" in settings:
            sampler = SamplerConfig(shift=settings["sampler"]["shift"])
            write_json(folder / "scheduler_config.json", scheduler_config(sampler))
            return None
    shift = 5.0
    if parts["transformer"].config["pos_embed_seq_len"] is not None:  # first and last frame to video
        shift = 16.0
    elif "transformer_2" in parts and not _takes_images(parts):
        shift = 12.0
    write_json(folder / "scheduler_config.json", scheduler_config(SamplerConfig(shift=shift)))
    return shift


def _takes_images(parts: dict[str, OpenPart]) -> bool:
    return parts["transformer"].config["in_channels"] != parts["transformer"].channels


def _check_out(plan: ImportPlan, out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"{out} exists already: choose another OUT, or replace it with --overwrite")
    if not is_pipeline_folder(out):
        raise ValueError(
            f"{out} is no pipeline folder (it has no {MODEL_INDEX_NAME}), so --overwrite does not replace it"
        )
    inside = [
        path for path in (*plan.weights.values(), *plan.copies.values()) if path.resolve().is_relative_to(out.resolve())
    ]
    if inside:
        raise ValueError(f"{out} would be replaced while {inside[0]} is read: choose another OUT")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, and is removed otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    staging.mkdir()
    try:
        yield staging
        if out.exists():
            former = staging.with_suffix(".former")
            out.rename(former)
            try:
                staging.rename(out)
            except BaseException:
                former.rename(out)
                raise
            shutil.rmtree(former)
        else:
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _progress(parts: dict[str, OpenPart]) -> Iterator[Callable[[int], None]]:
    """A bar over all numbers, each of which is written and read again."""
    columns = (
        TextColumn("converting and checking"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=2 * sum(part.parameters for part in parts.values()))
        yield lambda count: bar.advance(task, count)


def _say_end(out: Path, parts: dict[str, OpenPart], *, shift: float | None, boundary: float | None) -> None:
    say(f"Wrote {out}; every tensor was read again and is what the source has.")
    if boundary is not None:
        say(f"Two experts: transformer/ from timestep {1000 * boundary:g} on, transformer_2/ below.")
    if shift is not None:
        say(f"The sources name no sampler: scheduler/ is UniPC with the published shift {shift:g}.")
    transformer = DiTConfig.from_diffusers(parts["transformer"].config)
    needed = _EXPECTED + (_OF_IMAGES if transformer.image_dim is not None else ())
    missing = [part for part in needed if not (out / part).is_dir()]
    for part in missing:
        say(f"Missing: {part}/. Import again with --overwrite and {_REMEDIES[part]}.")
    if "vae" in missing:
        say("Without an autoencoder this folder serves init_from= of a run that has one.")
    train = f"muybridge train +experiment=NAME init_from={out}"
    train += "" if "vae" in missing else f" vae.path={out / 'vae'}"
    train += "" if {"text_encoder", "tokenizer"} & set(missing) else f" text.path={out}"
    if transformer.image_dim is not None:
        train += "" if set(_OF_IMAGES) & set(missing) else f" conditioning.image_encoder={out}"
    if not missing:
        images = " image=first.png" if _takes_images(parts) else ""
        images += " last_image=last.png" if transformer.pos_embed_seq_len is not None else ""
        say("Write prompts.txt, one prompt a line.")
        say(f"Next: muybridge sample model={out} prompts=prompts.txt{images}")
    say(f"Next: {train}" if missing else f"or:   {train}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # as any other mistake, and not with argparse's own exit code
        raise ValueError(f"{message} (see muybridge import --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="muybridge import",
        description=__doc__,
        epilog=STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "src",
        metavar="SRC",
        type=Path,
        help="folder of Wan's release (2.1, 2.2 5B, or A14B with high_noise_model/ and low_noise_model/), pipeline folder of "
        "diffusers, or one file of a transformer with the names of the release, of ComfyUI or of diffusers",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="pipeline folder to write")
    parser.add_argument("--vae", metavar="PATH", type=Path, help="autoencoder's file, or folder in diffusers' form")
    parser.add_argument(
        "--text-encoder", metavar="PATH", type=Path, help="umT5 encoder's file, or folder with config.json"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="umT5's tokenizer, such as google/umt5-xxl")
    parser.add_argument(
        "--low-noise", metavar="PATH", type=Path, help="expert of low noise, where SRC is that of high noise alone"
    )
    parser.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        default="keep",
        help="of the transformers and the text encoder (default: %(default)s, each tensor's own); with bf16, time embedding, "
        "modulation and LayerNorm are fp32 as everywhere, and the autoencoder keeps its own",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a pipeline folder in OUT")
    return parser
