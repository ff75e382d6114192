"""`muybridge sample`: videos from prompts with a trained run, as mp4s and one contact sheet."""

from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..train.compose import compose_config
from ..train.config import TaskKind, read_config

USAGE = """\
usage: muybridge sample run=RUN_DIR prompts=FILE [KEY=VALUE ...]

Generate one video for each line of FILE with the EMA weights of the run's newest checkpoint.

  run=RUN_DIR           directory of a text-to-video training run
  prompts=FILE          text file with one prompt a line
  out=FOLDER            where the mp4s and contact_sheet.png go (default RUN_DIR/samples)
  weights=ema|master    average or last weights (default ema)
  seed=N                seed of the noise (default 0)
  batch=N               videos sampled at once (default 8)
  steps=N shift=X guidance_scale=X    sampler settings (default: the run's)"""


class WeightKind(Enum):
    ema = "ema"
    master = "master"


@dataclass
class SampleConfig:
    """What to sample, from what and how."""

    # Directory of a text-to-video training run.
    run: str = ""
    # Text file with one prompt a line.
    prompts: str = ""
    # Folder for the mp4s; null is `samples` in the run directory.
    out: str | None = None
    weights: WeightKind = WeightKind.ema
    seed: int = 0
    # Videos sampled at once.
    batch: int = 8
    # Sampler steps, shift and guidance; null takes the run's.
    steps: int | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    # Check everything and stop.
    dry_run: bool = False


def main(argv: list[str]) -> int:
    """Sample; returns the exit code. Raises ValueError for a run or prompts that cannot be used."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    config: SampleConfig = compose_config(
        argv, config_class=SampleConfig, config_name="sample", schema_name="sample_schema"
    )
    prompts = read_prompts(config)
    if config.batch < 1:
        raise ValueError(f"batch={config.batch} must be at least 1")
    run = read_config(Path(config.run))
    if run.task is not TaskKind.text_to_video:
        raise ValueError(f"run={config.run} has task={run.task.name}; sampling needs a text_to_video run")
    for name in ("steps", "shift", "guidance_scale"):
        if (value := getattr(config, name)) is not None:
            setattr(run.sampler, name, value)
    if faults := run.sampler.faults("sampler"):
        raise ValueError("; ".join(faults))

    # Imported late: everything above answers within a second.
    import torch

    from ..train.checkpoint import check_checkpoint, committed_checkpoints, read_weights
    from ..train.engine import Precision
    from ..train.generate import generate_frames, write_clips
    from ..train.tasks import TextToVideoTask
    from .pictures import contact_sheet

    checkpoints = committed_checkpoints(Path(config.run) / "checkpoints")
    if not checkpoints:
        raise ValueError(f"run={config.run} has no checkpoint yet")
    if fault := check_checkpoint(checkpoints[-1]):
        raise ValueError(fault)
    if config.dry_run:
        print(f"muybridge: would sample {len(prompts)} prompts from {checkpoints[-1]}; nothing was started")
        return 0

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = TextToVideoTask(run, device)
    model = task.build_model().eval().requires_grad_(False)
    model.load_state_dict(read_weights(checkpoints[-1], config.weights.value))
    if run.deepspeed.precision is Precision.bf16:
        model.bfloat16()  # as in training

    out = Path(config.out) if config.out else Path(config.run) / "samples"
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    clips, paths = [], []
    with Progress(*columns) as progress:
        bar = progress.add_task("sampling", total=len(prompts) * run.sampler.steps)
        for start in range(0, len(prompts), config.batch):
            chunk = prompts[start : start + config.batch]
            numbers = list(range(start, start + len(chunk)))
            frames = generate_frames(
                model,
                task,
                chunk,
                numbers,
                sampler=run.sampler,
                seed=config.seed,
                progress=partial(_show, progress, bar, start, len(chunk)),
            )
            paths += write_clips(out, frames, chunk, numbers, run)
            clips += list(frames)
    contact_sheet(clips, prompts, out / "contact_sheet.png")
    print(f"muybridge: wrote {len(paths)} mp4s and contact_sheet.png to {out}")
    return 0


def _show(progress: Progress, bar: TaskID, start: int, size: int, done: int, steps: int) -> None:
    """After `done` of `steps` sampler steps of the `size` prompts from `start` on."""
    progress.update(bar, completed=start * steps + size * done)


def read_prompts(config: SampleConfig) -> list[str]:
    """The non-empty lines of the prompts file."""
    if not config.run or not config.prompts:
        raise ValueError("run=RUN_DIR and prompts=FILE must both be given (see muybridge sample --help)")
    path = Path(config.prompts)
    if not path.is_file():
        raise ValueError(f"prompts={config.prompts} must be a text file with one prompt a line")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={config.prompts} holds no prompt")
    return prompts
