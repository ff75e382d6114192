"""The picture of a plan: what the memory of a process and the time of the GPUs go into, for each bucket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..train.costs_run import BucketCosts, RunCosts
from ..train.gpus import GIB
from .plan_report import cluster_words, number
from .plan_verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, LIMIT = "#20242c", "#d1495b"
PALETTE = (
    "#1c2f4a", "#3b76c4", "#7aa6dc", "#b9d2ee", "#3aa675", "#93cfae", "#cfe8d9", "#e0a030", "#f0cf8e", "#8e44ad", "#c39bd3",
    "#5f6b7a", "#9aa3b2", "#d3d7dd", "#a0522d", "#d8a78a",
)  # fmt: skip
MOST_BARS = 10
# Parts that are smaller in every bar have no name: GiB, and share of the longest bar of times.
NAMED_GIB, NAMED_SHARE = 0.3, 0.004


def plan_picture(verdict: Verdict, path: Path) -> None:
    """Write a PNG, 1540 pixels wide."""
    # Drawing on a figure of our own leaves a notebook's or user's choice of backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    memories = [(words, costs) for words, costs in _runs(verdict)]
    has_times = verdict.asked.step_seconds is not None
    buckets = min(len(verdict.asked.buckets), MOST_BARS)
    # Each part has room for its bars and for the names beside them.
    height = max(4.0, 2.5 + 0.5 * (len(memories) + buckets - 1))
    figure = Figure(figsize=(11, (1 + has_times) * height), dpi=140, layout="constrained")
    axes = figure.subplots(1 + has_times, 1, squeeze=False)[:, 0]
    _draw_memory(axes[0], verdict, memories)
    if has_times:
        _draw_times(axes[1], verdict, memories)
    figure.suptitle(f"{cluster_words(verdict.asked.cluster)}: {_outcome(verdict.asked)}", color=INK, fontsize=12)
    FigureCanvasAgg(figure).print_png(str(path))


def _outcome(asked: RunCosts) -> str:
    verb = "fits" if asked.fits else "does not fit"
    speed = "" if asked.step_seconds is None else f", {number(asked.step_seconds)} s a step, MFU {asked.mfu:.0%}"
    return f"{verb}, {asked.peak / GIB:.0f} of {asked.cluster.gpu.memory_gib:.0f} GiB{speed}"


def _runs(verdict: Verdict) -> list[tuple[str, RunCosts]]:
    runs = [("as asked", verdict.asked)]
    others = {"fastest here": verdict.fastest, "fewest nodes": verdict.smallest, "does not fit": verdict.too_large}
    for name, costs in others.items():
        if costs is not None and costs is not verdict.asked and (changes := verdict.changes_to(costs)):
            runs.append((f"{name}:\n" + "\n".join(changes), costs))
    return runs


def _draw_memory(axes: Axes, verdict: Verdict, runs: list[tuple[str, RunCosts]]) -> None:
    bars = [(_bucket_label(one.bucket.name, verdict), one.memory.parts) for one in verdict.asked.buckets[:MOST_BARS]]
    bars += [(words, costs.worst.memory.parts) for words, costs in runs[1:]]
    _stack(axes, [(words, {name: size / GIB for name, size in parts.items()}) for words, parts in bars], NAMED_GIB)
    limit = verdict.asked.cluster.gpu.memory_gib
    axes.axvline(limit, color=LIMIT, linewidth=1.5)
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.08 * limit))
    axes.annotate(
        f"{limit:.0f} GiB", (limit, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
        ha="center", fontsize=8, color=LIMIT,
    )  # fmt: skip
    axes.set_xlabel("GiB of a process at its peak", color=INK)


def _draw_times(axes: Axes, verdict: Verdict, runs: list[tuple[str, RunCosts]]) -> None:
    # Of a clip and a GPU: seconds of a step would be no comparison between clusters of different sizes.
    asked = verdict.asked
    bars = [(_bucket_label(one.bucket.name, verdict), _gpu_seconds(asked, one)) for one in asked.buckets[:MOST_BARS]]
    bars += [(words, _gpu_seconds(costs, costs.worst)) for words, costs in runs[1:]]
    _stack(axes, bars, NAMED_SHARE * max(sum(parts.values()) for _, parts in bars))
    axes.set_xlabel("GPU-seconds of a clip, predicted", color=INK)


def _gpu_seconds(costs: RunCosts, one: BucketCosts) -> dict[str, float]:
    assert one.time is not None
    return {name: value * costs.cluster.world / one.bucket.global_batch for name, value in one.time.seconds.items()}


def _bucket_label(name: str, verdict: Verdict) -> str:
    return f"as asked:\n{name}" if len(verdict.asked.buckets) > 1 else f"as asked\n({name})"


def _stack(axes: Axes, bars: list[tuple[str, dict[str, float]]], named: float) -> None:
    """Horizontal bars of parts, the first on top; parts below `named` in every bar have no name."""
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    whole = max(sum(parts.values()) for _, parts in bars)
    places = range(len(bars))
    left = [0.0] * len(bars)
    for name, colour in zip(names, (PALETTE * 2)[: len(names)], strict=True):
        sizes = [parts.get(name, 0.0) for _, parts in bars]
        label = name if max(sizes) > named else None
        axes.barh(places, sizes, left=left, color=colour, height=0.6, label=label)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.annotate(
            number(total), (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.set_yticks(places, [words for words, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * whole)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
