"""Runs every shape of a run once before its first step, so that no step waits for the compiler."""

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data.batch import VideoBatch
from ..data.buckets import Bucket
from ..data.config import Access
from ..models.diffusion.guidance import guided_velocity
from .compile_blocks import CompilationCount

if TYPE_CHECKING:
    from .engine import Engine
    from .tasks import TextToVideoTask


def warm_up(
    engine: "Engine", task: "TextToVideoTask", buckets: Sequence[Bucket], *, validates: bool, prompts: int
) -> Iterator[str]:
    """Yields the name of each shape, then runs it: forward and backward, and forward alone where the run `validates` on clips.

    `prompts` are those of one call of the sampler on this rank, 0 where there are none. Weights, gradients, optimizer and random
    state stay as they are. Collective. The clips are zeros; frozen text encoders are not read.
    """
    began, count = time.monotonic(), CompilationCount()
    runs = {bucket.name: partial(_run_bucket, engine, task, bucket, validates=validates) for bucket in buckets}
    if prompts:
        runs["sample videos"] = partial(_sample, engine, task, prompts)
    with _Bar(len(runs)) as bar:
        for name, run in runs.items():
            bar.show(name)
            yield name
            with torch.random.fork_rng([task.device] if task.device.type == "cuda" else []):
                run()
    if dist.get_rank() == 0:
        seconds = time.monotonic() - began
        graphs, shapes = _counted(count.take(), "graph"), _counted(len(runs), "shape")
        done = f"compiled {graphs} for {shapes} in {seconds:.0f} s ({', '.join(runs)})"
        print(f"muybridge: {done}", file=sys.stderr, flush=True)


def ghosts(task: "TextToVideoTask", bucket: Bucket) -> VideoBatch:
    """A micro-batch of a bucket in which no place holds a clip, as the loader would hand it over."""
    config, size = task.config, bucket.micro_batch
    frames = latents = text = None
    if config.data.access is Access.latents:
        shape = config.vae.resolved().latent_shape(bucket.frames, bucket.height, bucket.width)
        latents = torch.zeros(size, *shape, dtype=torch.bfloat16)
    else:
        frames = torch.zeros(size, bucket.frames, bucket.height, bucket.width, 3, dtype=torch.uint8)
    if not config.text.is_trained:
        text = [torch.zeros(0, config.model.text_dim, dtype=torch.bfloat16)] * size
    nobody = torch.full((size,), -1)
    batch = VideoBatch(
        step=0,
        step_samples=bucket.global_batch,
        slots=torch.arange(size),
        datasets=nobody,
        rows=nobody,
        weights=torch.zeros(size),
        keys=[""] * size,
        captions=[""] * size,
        frames=frames,
        latents=latents,
        text=text,
    )
    return batch.to(task.device)


def _run_bucket(engine: "Engine", task: "TextToVideoTask", bucket: Bucket, *, validates: bool) -> None:
    batch = ghosts(task, bucket)
    _train(engine, task, batch)
    if validates:
        _validate(engine, task, batch)


def _train(engine: "Engine", task: "TextToVideoTask", batch: VideoBatch) -> None:
    loss = task.losses(engine, batch).total.sum() * 0.0
    engine.backward(loss, is_last=True)
    # A step that is called off: the one way by which all that a backward pass leaves in DeepSpeed's buffers goes again.
    engine.step(lr=0.0, accept=lambda norm: False)


@torch.no_grad()
def _validate(engine: "Engine", task: "TextToVideoTask", batch: VideoBatch) -> None:
    engine.eval()
    task.losses(engine, batch, purpose="validation/")
    engine.train()


@torch.no_grad()
def _sample(engine: "Engine", task: "TextToVideoTask", prompts: int) -> None:
    config = task.config
    latents = torch.zeros(prompts, *config.latent_shape(), device=task.device)
    if config.text.is_trained:
        text = task.encode_text([""] * prompts)
    else:
        text = torch.zeros(prompts, config.text.max_tokens, config.model.text_dim, device=task.device)
    scale, _ = config.sampler.expert_guidance_scales()
    engine.eval()
    guided_velocity(engine, text, text, scale)(latents, torch.zeros(prompts, device=task.device))
    engine.train()


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


class _Bar:
    """A bar with ETA on rank 0's terminal; in a log file a line for each shape."""

    def __init__(self, total: int) -> None:
        self._total, self._begun = total, 0
        self._progress: Progress | None = None
        self._is_shown = dist.get_rank() == 0

    def __enter__(self) -> Self:
        if self._is_shown and sys.stderr.isatty():
            columns = (
                TextColumn("compiling {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=Console(stderr=True))
            self._progress.start()
            self._task = self._progress.add_task("", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, name: str) -> None:
        """Say which shape is next; those before it are done."""
        if self._progress is not None:
            self._progress.update(self._task, description=name, completed=self._begun)
        elif self._is_shown:
            number = f"{self._begun + 1} of {self._total}"
            print(f"muybridge: compiling {name} ({number}), which may take minutes", file=sys.stderr, flush=True)
        self._begun += 1
