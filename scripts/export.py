"""`muybridge export`: a run's model as a folder that diffusers opens, or as files for ComfyUI and Wan's own code."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..train.compose import compose_config
from .sample import read_prompts

if TYPE_CHECKING:
    from .export_plan import ExportPlan

USAGE = """\
usage: muybridge export run=RUN_DIR out=FOLDER [KEY=VALUE ...]
       muybridge export run=LORA_RUN out=FILE.safetensors [KEY=VALUE ...]

Write the averaged weights of a run's newest checkpoint, with the autoencoder, text encoder and sampler that belong to them, in the
form of other tools. What was written is read again and, where diffusers is installed, computed there as well. Of a LoRA run
the LoRA is written, one file.

  run=RUN_DIR           directory of a text-to-video training run
  out=FOLDER            where it goes; must not exist yet
  format=diffusers|comfy|original
                        a pipeline folder (default), files for ComfyUI's models/, or the names and places of Wan's release
  format=comfy|diffusers|kohya
                        of a LoRA: the form that most tools read (default), or that of diffusers or musubi-tuner
  merge=true            of a LoRA run: write the whole model, with the LoRA added to the weights under it
  weights=ema|raw|ema-0.999
                        the run's first average (default), its last weights, or another of its ema.decays
  dtype=bf16|fp32       of the transformer or LoRA (default bf16; a transformer's parts that need fp32 have it)
  low_run=RUN_DIR       the run of the low-noise expert, where run= is that of the high-noise expert; one of the two may be
                        the pipeline folder that the other started from
  prompts=FILE          text file with one prompt a line, whose features are written beside the model: for a text encoder
                        that the tools do not have (text.kind=bytes; umt5_small in any format but diffusers)
  dry_run=true          check everything and stop

  muybridge export run=runs/quickstart out=exports/quickstart prompts=runs/quickstart/prompts.txt"""


class ExportFormat(Enum):
    """Whose form is written."""

    diffusers = "diffusers"
    comfy = "comfy"
    original = "original"
    kohya = "kohya"


class ExportDtype(Enum):
    """Named as the command takes them; the values are torch's names."""

    bf16 = "bfloat16"
    fp32 = "float32"


@dataclass
class ExportConfig:
    """What to export, and in which form."""

    # Directory of a text-to-video training run, of two experts that of high noise.
    run: str = ""
    # Directory of the low-noise expert's run; null: the run trained the whole model.
    low_run: str | None = None
    # Folder to write, or a LoRA's file; must not exist.
    out: str = ""
    # Null is diffusers, and comfy for a LoRA.
    format: ExportFormat | None = None
    # Of a LoRA run: the whole model instead of the LoRA.
    merge: bool = False
    # ema (the run's first average), raw, or an average's name; of both runs where there are two.
    weights: str = "ema"
    # Of the transformer; time embedding, modulation tables and LayerNorms stay in float32.
    dtype: ExportDtype = ExportDtype.bf16
    # Text file with one prompt a line, for a text encoder that other tools do not have; null: none.
    prompts: str | None = None
    # Check everything and stop.
    dry_run: bool = False


def main(argv: list[str]) -> int:
    """Export; returns the exit code. Raises ValueError for a run that cannot be exported, or an export that does not hold up."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    config: ExportConfig = compose_config(
        argv, config_class=ExportConfig, config_name="export", schema_name="export_schema"
    )
    if not config.run or not config.out:
        raise ValueError("run=RUN_DIR and out=FOLDER must both be given (see muybridge export --help)")
    if Path(config.out).exists():
        raise ValueError(f"out={config.out} exists already: choose another, or remove it")
    prompts = read_prompts(Path(config.prompts)) if config.prompts else []

    from .export_plan import plan_export  # torch takes seconds to import: a mistake above is reported before that

    plan = plan_export(config.run, config.low_run, config.weights, lora=not config.merge)
    config.format = config.format or (ExportFormat.comfy if plan.is_lora else ExportFormat.diffusers)
    if faults := _faults(config, plan):
        raise ValueError("; ".join(faults))
    if config.dry_run:
        print(f"muybridge: would export {plan.run.checkpoint} to {config.out}; nothing was written")
        return 0
    if plan.is_lora:
        _export_lora(config, plan)
    else:
        _export_model(config, plan, prompts)
    return 0


def _faults(config: ExportConfig, plan: "ExportPlan") -> list[str]:
    """Settings that contradict the run, as messages that name the field, the value and the rule."""
    found = []
    assert config.format is not None
    form, text = config.format.name, plan.config.text.kind.value
    if plan.is_lora and form == "original":
        found.append("format=original must be comfy, diffusers or kohya for a LoRA (or merge=true)")
    if plan.is_lora and Path(config.out).suffix != ".safetensors":
        found.append(f"out={config.out} must end in .safetensors for a LoRA, which is one file (or merge=true)")
    if not plan.is_lora and form == "kohya":
        found.append("format=kohya must be diffusers, comfy or original for a whole model")
    if config.merge and not plan.config.lora.is_on:
        found.append(f"merge=true is for LoRA runs, and run={config.run} trained all weights")
    if config.prompts and plan.is_lora:
        found.append(f"prompts={config.prompts} is for whole models: a LoRA has no text encoder")
    elif config.prompts and (text == "umt5" or (text == "umt5_small" and form == "diffusers")):
        found.append(
            f"prompts={config.prompts} is for text encoders that other tools do not have: with format={form}, "
            f"text.kind={text} is one that they do"
        )
    return found


def _export_lora(config: ExportConfig, plan: "ExportPlan") -> None:
    import torch

    from .export_weights import write_lora_file

    assert config.format is not None
    out = Path(config.out)
    layers = write_lora_file(out, plan.run, config.format.value, getattr(torch, config.dtype.value))
    print(f"muybridge: wrote {out}: a LoRA on {layers} layers; it was read again and is as it was meant")
    print(f"next: `muybridge sample model=FOLDER lora=[{out}]` with the pipeline folder that it was trained on")


def _export_model(config: ExportConfig, plan: "ExportPlan", prompts: list[str]) -> None:
    import torch

    from .export_checks import Comparison, compare_with_diffusers
    from .export_files import write_comfy, write_original
    from .export_pipeline import write_pipeline
    from .export_report import parts_table, print_report

    assert config.format is not None
    write = {"diffusers": write_pipeline, "comfy": write_comfy, "original": write_original}[config.format.name]
    out = Path(config.out)
    comparisons: list[Comparison] = []
    # Only a whole export that can be told of gets the name that was asked for: a folder of this name is refused by the next try.
    staging = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:12]}")
    staging.mkdir(parents=True)
    try:
        with _progress(plan.count_numbers()) as advance:
            write(staging, plan, dtype=getattr(torch, config.dtype.value), prompts=prompts, advance=advance)
        if config.format is ExportFormat.diffusers:
            comparisons = compare_with_diffusers(staging)
        table = parts_table(staging, comparisons, title=str(out))
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    print_report(out, plan, comparisons, table)


@contextmanager
def _progress(numbers: int) -> Iterator[Callable[[int], None]]:
    """A bar over all numbers, each of which is written and read again."""
    columns = (TextColumn("writing and checking"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=2 * numbers)
        yield lambda count: bar.advance(task, count)
