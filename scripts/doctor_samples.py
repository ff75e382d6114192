"""The clips that `muybridge doctor` reads: the first of each bucket as the run will get them, timed, and shown with captions."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data.batch import VideoBatch
from ..data.ledger import to_lines
from ..data.loader import VideoLoader
from ..data.mp4 import write_mp4
from ..data.plan import Plan
from .dataset_commands import console
from .pictures import MAX_CLIPS, captioned_grid, contact_sheet

CLIPS_A_STEP = 8  # are read of each step, the first ones
SHEET_NAME = "contact_sheet.png"
_SHEET_FRAMES = 5


@dataclass
class Samples:
    """What was read, and what came of it."""

    clips: list[dict[str, Any]] = field(default_factory=list)  # where each one stands in the run, and its caption
    clips_per_cpu_second: dict[int, float] = field(default_factory=dict)  # by bucket
    unreadable: list[dict[str, Any]] = field(default_factory=list)  # as in the ledger of a checkpoint
    fallback_decodes: int = 0  # clips that data.decoder could not read and the other one did
    files: list[str] = field(default_factory=list)  # with pictures, relative to the folder that they were written to


def read_samples(loader: VideoLoader, steps: dict[int, list[int]], out: Path, *, processes: int, fps: float) -> Samples:
    """Reads the steps of each bucket and writes pictures of the first ones to `out`; none of latents.

    The loader's groups are those of `CLIPS_A_STEP` clips that it gives to rank 0, its prefetch is 0, and it has so many decoding
    processes.
    """
    samples = Samples()
    on_sheet = max(1, min(CLIPS_A_STEP, MAX_CLIPS // max(1, len(steps))))
    strips: list[np.ndarray] = []
    captions: list[str] = []
    _warm_up(loader, processes)
    columns = (
        TextColumn("reading clips"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(map(len, steps.values())))
        for number, bucket_steps in sorted(steps.items()):
            clips, cpu_seconds = 0, 0.0
            for step in bucket_steps:
                before = _cpu_seconds()
                batch = _read_step(loader, step)
                cpu_seconds += _cpu_seconds() - before
                clips += len(batch)
                samples.clips += _described(batch, number, loader)
                if step == bucket_steps[0] and batch.frames is not None:
                    name = loader.buckets[number].name
                    shown = _shown_captions(batch, loader)
                    samples.files.append(_write_pictures(out, batch, shown, name, fps=fps))
                    places = np.linspace(0, batch.frames.shape[1] - 1, _SHEET_FRAMES).round().astype(int)
                    strips += list(batch.frames[:on_sheet].numpy()[:, np.unique(places)])
                    captions += [f"{name}: {caption}" for caption in shown[:on_sheet]]
                progress.advance(task)
            if clips:
                samples.clips_per_cpu_second[number] = clips / max(cpu_seconds, 1e-6)
    if strips:
        contact_sheet(strips, captions, out / SHEET_NAME, frames_per_clip=_SHEET_FRAMES)
        samples.files.insert(0, SHEET_NAME)
    samples.unreadable = [json.loads(line) for line in to_lines(loader.ledger.clips()).splitlines()]
    samples.fallback_decodes = loader.counts().get("fallback_decodes", 0)
    return samples


def first_steps(plan: Plan, count: int, *, last_step: int) -> dict[int, list[int]]:
    """The first `count` steps of each bucket that can come, of those before `last_step`."""
    found: dict[int, list[int]] = {place: [] for place, share in enumerate(plan.step_shares) if share > 0}
    missing = len(found) * count
    for step in range(last_step):
        steps = found[plan.bucket(step)]
        if len(steps) < count:
            steps.append(step)
            missing -= 1
        if not missing:
            break
    return found


def _read_step(loader: VideoLoader, step: int) -> VideoBatch:
    reading = loader.steps(step)
    [batch] = next(reading)
    reading.close()  # type: ignore[attr-defined]
    return batch


def _warm_up(loader: VideoLoader, processes: int) -> None:
    # Every decoding process gets a clip: to start one takes longer than many clips.
    clips = loader.every_row(processes)
    next(clips, None)
    clips.close()  # type: ignore[attr-defined]


def _cpu_seconds() -> float:
    # Of this process and of the decoding processes, which are its children.
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:  # renewed just now
            continue
        total += times.user + times.system
    return total


def _described(batch: VideoBatch, bucket: int, loader: VideoLoader) -> list[dict[str, Any]]:
    names = [dataset.name for dataset in loader.plan.datasets]
    return [
        {
            "step": batch.step,
            "slot": slot,
            "bucket": loader.buckets[bucket].name,
            "dataset": names[dataset],
            "row": row,
            "key": key,
            "caption": text,
        }
        for slot, dataset, row, key, text in zip(
            batch.slots.tolist(), batch.datasets.tolist(), batch.rows.tolist(), batch.keys, batch.captions, strict=True
        )
        if key
    ]


def _shown_captions(batch: VideoBatch, loader: VideoLoader) -> list[str]:
    shown = []
    for caption, key, dataset, row in zip(batch.captions, batch.keys, batch.datasets.tolist(), batch.rows.tolist()):
        if not key:
            shown.append("(no clip could be read here)")
        elif not caption and any(loader.indexes[dataset].captions(row)):
            shown.append("(caption dropped for guidance)")
        else:
            shown.append(caption or "(empty caption)")
    return shown


def _write_pictures(out: Path, batch: VideoBatch, captions: list[str], bucket: str, *, fps: float) -> str:
    assert batch.frames is not None
    frames = batch.frames.numpy()
    rate = f" at {fps:g} frames/s" if frames.shape[1] > 1 else ""
    grid = captioned_grid(
        frames,
        captions,
        batch.keys,
        title=f"{bucket}{rate}: step {batch.step}, {len(batch)} of its {batch.step_samples} samples",
    )
    name = f"{bucket}_step_{batch.step:06d}"
    if len(grid) == 1:
        Image.fromarray(grid[0]).save(out / f"{name}.png")
        return f"{name}.png"
    write_mp4(out / f"{name}.mp4", grid, fps=fps)
    return f"{name}.mp4"
