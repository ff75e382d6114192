"""The facts of `muybridge doctor` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Column, Table
from rich.text import Text

from .doctor_report import BucketFacts, DatasetFacts, HistogramBar

_BAR_WIDTH = 24


def dataset_table(datasets: Iterable[DatasetFacts]) -> Table:
    """A row for each dataset, with the reasons why clips are left out."""
    table = Table(
        "dataset", *_right("clips", "taken", "weight", "samples"), Column("left out", overflow="fold"), title="Datasets"
    )
    for found in datasets:
        reasons = "\n".join(f"{count} {reason}" for reason, count in found.left_out.items())
        figures = (str(found.clips), str(found.taken), f"{found.weight:g}", f"{found.sample_share:.1%}")
        table.add_row(Text(found.name or "data.path"), *figures, Text(reasons or "-"))
    return table


def histogram_table(histograms: dict[str, list[HistogramBar]]) -> Table:
    """Bars of the clips by duration, size and aspect ratio; the dark part is taken."""
    table = Table(
        "clips by",
        "",
        *_right("clips", "taken"),
        Column("", no_wrap=True),
        title="Clips",
        caption="█ taken  ░ left out",
    )
    for name, bars in histograms.items():
        most = max((bar.clips for bar in bars), default=0)
        for place, bar in enumerate(bars):
            length = -(-bar.clips * _BAR_WIDTH // most)
            dark = round(length * bar.taken / max(1, bar.clips))
            row = ("" if place else name, bar.label, str(bar.clips), str(bar.taken), "█" * dark + "░" * (length - dark))
            table.add_row(*row, end_section=place == len(bars) - 1)
    return table


def bucket_table(buckets: Iterable[BucketFacts]) -> Table:
    """What a step of each bucket is."""
    columns = ("clips", "of steps", "samples", "micro-batch", "tokens", "cost")
    table = Table(Column("bucket", no_wrap=True), *_right(*columns), title="Buckets: a step over all processes")
    for found in buckets:
        tokens = "-" if found.tokens_per_step is None else f"{found.tokens_per_step}"
        table.add_row(
            *(found.name, str(found.clips), f"{found.step_share:.1%}", str(found.samples_per_step)),
            *(f"{found.micro_steps} x {found.micro_batch}", tokens, f"{found.relative_cost:.2f}"),
        )
    return table


def waste_table(buckets: Iterable[BucketFacts], *, cores: int, step_seconds: float | None) -> Table:
    """What is computed or decoded for nothing, and how fast clips are read."""
    asked = "steps/s at most" if step_seconds is None else f"cores for {step_seconds:g} s steps"
    columns = ("ghosts", "cut off", "scale", "enlarged", "clips/s a core", "clips a rank", asked)
    table = Table(Column("bucket", no_wrap=True), *_right(*columns), title="Waste, and the speed of reading")
    for found in buckets:
        speed = "-"
        if seconds := found.step_cpu_seconds:
            speed = f"{cores / seconds:.3g}" if step_seconds is None else f"{seconds / step_seconds:.2f}"
        table.add_row(
            *(found.name, f"{found.ghost_share:.1%}", _shown(found.cut_share, ".1%"), _shown(found.scale, ".2f")),
            *(_shown(found.enlarged_share, ".0%"), _shown(found.clips_per_cpu_second, ".3g")),
            *(str(found.clips_per_rank), speed),
        )
    return table


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
