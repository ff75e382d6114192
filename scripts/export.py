"""`muybridge export`: a run's model as a folder that diffusers opens, or as files for ComfyUI and Wan's own code."""

import shutil
import uuid
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..train.compose import compose_config
from .export_plan import check_prompts, find_run_weights
from .sample import WeightKind, read_prompts

USAGE = """\
usage: muybridge export run=RUN_DIR out=FOLDER [KEY=VALUE ...]

Write the EMA weights of a run's newest checkpoint, with the autoencoder, text encoder and sampler that belong to them, as a
folder that diffusers opens. What was written is read again and, where diffusers is installed, computed there as well.

  run=RUN_DIR           directory of a text-to-video training run
  out=FOLDER            where it goes; must not exist yet
  weights=ema|master    average or last weights (default ema)
  dtype=bf16|fp32       of the transformer (default bf16, but for the parts that need fp32)
  prompts=FILE          text file with one prompt a line, whose features are written beside the model: for text.kind=bytes,
                        a text encoder that other tools do not have
  dry_run=true          check everything and stop

  muybridge export run=runs/quickstart out=exports/quickstart prompts=runs/quickstart/prompts.txt"""


class ExportDtype(Enum):
    """Named as the command takes them; the values are torch's names."""

    bf16 = "bfloat16"
    fp32 = "float32"


@dataclass
class ExportConfig:
    """What to export, and in which form."""

    # Directory of a text-to-video training run.
    run: str = ""
    # Folder to write, which must not exist.
    out: str = ""
    weights: WeightKind = WeightKind.ema
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
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"out={config.out} exists already: choose another folder, or remove it")
    experts = [find_run_weights(Path(config.run), config.weights.value, field="run")]
    check_prompts(config.prompts, experts[0])
    prompts = read_prompts(Path(config.prompts)) if config.prompts else []
    if config.dry_run:
        print(f"muybridge: would export {experts[0].checkpoint} to {out}; nothing was written")
        return 0

    # Imported late: everything above answers within a second.
    import torch

    from .export_checks import compare_with_diffusers
    from .export_pipeline import write_pipeline
    from .export_report import print_report

    # Only a whole export gets the name that was asked for.
    staging = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:12]}")
    staging.mkdir(parents=True)
    try:
        write_pipeline(staging, experts, dtype=getattr(torch, config.dtype.value), prompts=prompts)
        comparisons = compare_with_diffusers(staging)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    print_report(out, experts[0].config, comparisons)
    return 0
