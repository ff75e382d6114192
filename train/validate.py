"""Validation during training: the loss on held-out clips with fixed noise, and sample videos, both with the EMA weights."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .group_batches import each_shared
from .mesh import Mesh
from .ranks import from_all_ranks, on_rank_0
from .tracking import VALIDATION_SECONDS, Tracker

if TYPE_CHECKING:
    from ..data.loader import VideoLoader
    from .config import TrainConfig
    from .engine import Engine
    from .tasks import Task

_log = logging.getLogger(__name__)


@dataclass
class ValidationConfig:
    """What is looked at while a run goes on."""

    # Steps between validations; 0 is off.
    every_steps: int = 0
    # Prepared dataset of held-out clips for the validation loss; null leaves the loss out.
    path: str | None = None
    # Clips for the loss, the same ones each time; all where there are fewer.
    clips: int = 64
    # Prompts of the sample videos; none leaves them out (diffusion runs only).
    prompts: list[str] = field(default_factory=list)

    def faults(self, field: str) -> list[str]:
        found = []
        if self.every_steps < 0:
            found.append(f"{field}.every_steps={self.every_steps} must be 0 (off) or more")
        if self.clips < 1:
            found.append(f"{field}.clips={self.clips} must be at least 1")
        if self.every_steps and self.path is None and not self.prompts:
            found.append(f"{field}.every_steps={self.every_steps} must be 0 where neither path nor prompts is set")
        return found


class Validation:
    """What is looked at, and when; with whatever weights the engine has."""

    def __init__(
        self, config: "TrainConfig", engine: "Engine", task: "Task", loader: "VideoLoader | None", mesh: Mesh
    ) -> None:
        """`loader` gives the held-out clips, if there are any."""
        self._config, self._engine, self._task, self._loader, self._mesh = config, engine, task, loader, mesh

    def is_due(self, step: int) -> bool:
        """Whether to look after so many steps."""
        every = self._config.validation.every_steps
        return every > 0 and (step % every == 0 or step == self._config.steps)

    def is_owed(self, step: int, tracker: Tracker | None) -> bool:
        """Whether the attempt before ended in the validation at the step of its checkpoint. Collective; rank 0 has a tracker."""
        is_missing = on_rank_0(lambda: tracker is not None and not tracker.has(step, VALIDATION_SECONDS))
        return step > 0 and self.is_due(step) and is_missing

    def inputs(self) -> dict[str, Any]:
        """What the model will be called with here: whether on clips, and for how many prompts at once."""
        every, prompts = self._config.validation.every_steps, len(self._config.validation.prompts)
        per_rank = -(-prompts // self._mesh.data.size)
        return {"validates": self._loader is not None, "prompts": per_rank if every > 0 else 0}

    def look(self, step: int, *, may_stop: Callable[[], None]) -> tuple[dict[str, float], list[tuple[Path, str]]]:
        """The losses, and on rank 0 the sample videos with their prompts. Collective. `may_stop` may raise."""
        from .tasks import TextToVideoTask

        row: dict[str, float] = {}
        videos: list[tuple[Path, str]] = []
        config, engine, task, mesh = self._config, self._engine, self._task, self._mesh
        if self._loader is not None:
            clips = config.validation.clips
            row = validation_losses(engine, task, self._loader, clips=clips, mesh=mesh, may_stop=may_stop)
        if isinstance(task, TextToVideoTask) and config.validation.prompts:
            folder = Path(config.run_dir) / "validation" / f"step-{step:08d}"
            videos = sample_videos(engine, task, config, folder, mesh=mesh, may_stop=may_stop)
        return row, videos


@torch.no_grad()
def validation_losses(
    engine: "Engine",
    task: "Task",
    loader: "VideoLoader",
    *,
    clips: int,
    mesh: Mesh,
    may_stop: Callable[[], None],
) -> dict[str, float]:
    """Mean loss and terms over `clips` of the validation set, each once, with the same noise each time. Collective.

    Empty where not one of them can be read. `may_stop` is called before each batch, and may raise.
    """
    sums: dict[str, torch.Tensor] = {}
    seen = torch.zeros((), device=task.device)
    engine.eval()
    for batch in each_shared(loader.each_once(clips), mesh.sequence, task.device):
        may_stop()
        batch = batch.to(task.device)
        losses = task.losses(engine, batch, purpose="validation/")
        for name, values in {"loss": losses.total, **losses.terms}.items():
            sums[name] = sums.get(name, torch.zeros((), device=task.device)) + (values.float() * batch.weights).sum()
        seen += batch.weights.sum()
    engine.train()
    names = sorted(sums)
    totals = torch.stack([*(sums[name] for name in names), seen])
    dist.all_reduce(totals)
    if totals[-1] == 0:
        return {}
    return {f"validation_{name}": (total / totals[-1]).item() for name, total in zip(names, totals, strict=False)}


def sample_videos(
    engine: "Engine",
    task: "Task",
    config: "TrainConfig",
    folder: Path,
    *,
    mesh: Mesh,
    may_stop: Callable[[], None],
) -> list[tuple[Path, str]]:
    """Sample `config.validation.prompts` into `folder`; rank 0 gets the paths and prompts. Collective.

    The prompts are spread over the ranks; those along `sequence` make the same ones together. `may_stop` is called after each step
    of the sampler, and may raise. What a disk refuses is reported and left out.
    """
    from .generate import NEGATIVE_PROMPT, VideoModels, decode_frames, generate_latents, prompt_noise, write_clips
    from .tasks import TextToVideoTask

    assert isinstance(task, TextToVideoTask)
    prompts, world, rank = config.validation.prompts, mesh.data.size, mesh.data.rank
    # Under ZeRO-3 every forward is collective, so all ranks make the same number of calls; the surplus is thrown away.
    per_rank = -(-len(prompts) // world)
    numbers = [(rank * per_rank + i) % len(prompts) for i in range(per_rank)]
    mine = [prompts[number] for number in numbers]
    engine.eval()
    text = task.encode_prompts([*mine, NEGATIVE_PROMPT])  # in one call, which reads a large encoder at most once
    latents = generate_latents(
        VideoModels(engine, task.vae),
        prompt_noise(config.seed, numbers, config.latent_shape(), task.device),
        text[:-1],
        text[-1:].expand_as(text[:-1]),
        sampler=config.sampler,
        progress=lambda done, steps: may_stop(),
    )
    engine.train()
    written, failure = {}, ""
    if mesh.sequence.is_first:
        frames = decode_frames(task.vae, latents)
        try:
            paths = write_clips(folder, frames, mine, numbers, fps=config.data.fps)
            written = dict(zip(numbers, paths, strict=True))
        except OSError as error:  # a full disk costs no training
            failure = str(error)
    found = from_all_ranks((written, failure))
    if dist.get_rank() == 0 and (failures := [failure for _, failure in found if failure]):
        _log.warning("muybridge: not all sample videos were written: %s", "; ".join(failures))
    by_number = {number: path for part, _ in found for number, path in part.items()}
    return [(by_number[number], prompts[number]) for number in sorted(by_number)]
