"""The picture of a run's report: loss and gradient norm over its steps, and a line of what its time went into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .pictures import metric_column, smoothed
from .report_times import Row, RunTimes, Spent, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, RESTART, ROLL_BACK = "#20242c", "#8a909c", "#8a909c", "#8e44ad"
COLOURS = {
    Spent.training: "#3b76c4",
    Spent.saving: "#1c2f4a",
    Spent.validation: "#3aa675",
    Spent.set_up: "#e0a030",
    Spent.lost: "#d1495b",
    Spent.other: "#9aa3b2",
    Spent.down: "#e4e6ea",
}
# Labels over the time line stand apart by at least this share of its width.
LABEL_SHARE = 0.03


def report_picture(run_name: str, times: RunTimes, path: Path) -> None:
    """Write a PNG, 1400 pixels wide."""
    # Drawing on a figure of our own leaves a notebook's or user's choice of backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), dpi=140, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)  # type: ignore[union-attr, call-arg]
    losses, norms, line = figure.subplots(3, 1, height_ratios=(3, 1.5, 0.75))
    norms.sharex(losses)
    _draw_losses(losses, times)
    _draw_norms(norms, times)
    for axes in (losses, norms):
        _mark_turns(axes, times)
    _label_restarts(losses, times)
    _draw_time_line(line, times)
    furthest = max((row["step"] for row in times.rows), default=0)
    figure.suptitle(
        f"{run_name}: step {furthest}, {duration(times.wall_seconds)}, effective time {times.effective_share:.1%}",
        color=INK,
        fontsize=12,
    )
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_losses(axes: Axes, times: RunTimes) -> None:
    steps, loss = metric_column(times.rows, "loss")
    smooth = smoothed(loss)
    _draw_dropped(axes, times, "loss")
    axes.plot(steps, loss, color=COLOURS[Spent.training], alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color=COLOURS[Spent.training], linewidth=1.8, label="training (smoothed)")
    validation_steps, validation = metric_column(times.rows, "validation_loss")
    if len(validation):
        (line,) = axes.plot(validation_steps, validation, "o--", color=COLOURS[Spent.validation], linewidth=1.2)
        line.set(markersize=4, label="validation")
    _scale(axes, np.concatenate([smooth, validation]))
    _tidy(axes, "loss")
    axes.tick_params(labelbottom=False)


def _draw_norms(axes: Axes, times: RunTimes) -> None:
    _draw_dropped(axes, times, "grad_norm")
    steps, norms = metric_column(times.rows, "grad_norm")
    axes.plot(steps, norms, color=COLOURS[Spent.training], linewidth=0.9)
    _scale(axes, norms)
    skipped = steps[~np.isfinite(norms)]
    if len(skipped):
        top = np.full(len(skipped), norms[np.isfinite(norms)].max(initial=0.0))
        axes.plot(skipped, top, "x", color=COLOURS[Spent.lost], label="not finite: the step is left out")
        axes.legend(frameon=False, fontsize=8)
    _tidy(axes, "gradient norm")
    axes.set_xlabel("step", color=INK)


def _draw_dropped(axes: Axes, times: RunTimes, name: str) -> None:
    steps, values = _pieces(times.dropped, name)
    if len(steps):
        (line,) = axes.plot(steps, values, ".-", color=COLOURS[Spent.lost], linewidth=0.9, markersize=3)
        line.set(alpha=0.8, label="done again later")


def _pieces(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, with a gap between what was dropped at different times."""
    rows = [row for row in rows if name in row]
    steps, values = metric_column(rows, name)
    jumps, attempts = np.diff(steps), np.array([row.get("attempt", 1) for row in rows])
    usual = np.median(jumps) if len(jumps) else 0
    gaps = 1 + np.flatnonzero((np.diff(attempts) != 0) | (jumps <= 0) | (jumps > 3 * usual))
    return np.insert(steps, gaps, np.nan), np.insert(values, gaps, np.nan)


def _scale(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic where values are far apart, with plain numbers along the axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = values[np.isfinite(values) & (values > 0)]
    if not len(values) or values.max() <= 3 * values.min():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    is_narrow = values.max() < 50 * values.min()
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if is_narrow else NullFormatter())


def _tidy(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, color=INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _mark_turns(axes: Axes, times: RunTimes) -> None:
    for current in times.attempts[1:]:
        axes.axvline(current.start_step, color=RESTART, linewidth=1, linestyle=":")
    for current in times.attempts:
        for event in current.attempt.roll_backs:
            axes.axvspan(event["to_step"], event["from_step"], color=ROLL_BACK, alpha=0.12, linewidth=0)
            axes.axvline(event["to_step"], color=ROLL_BACK, linewidth=1, linestyle="-.")


def _label_restarts(axes: Axes, times: RunTimes) -> None:
    """Numbers of the attempts over the steps where they began, and the legend."""
    starts: dict[int, list[int]] = {}
    for current in times.attempts[1:]:
        starts.setdefault(current.start_step, []).append(current.attempt.number)
    left, right = axes.get_xlim()
    last = -np.inf
    for step, numbers in sorted(starts.items()):
        if step - last < LABEL_SHARE * (right - left):
            continue
        last = step
        text = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
        axes.annotate(
            text, (step, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            ha="center", fontsize=8, color=INK,
        )  # fmt: skip
    if starts:
        axes.plot([], [], color=RESTART, linewidth=1, linestyle=":", label="restart, with the attempt's number")
    if any(current.attempt.roll_backs for current in times.attempts):
        axes.plot([], [], color=ROLL_BACK, linewidth=1, linestyle="-.", label="roll-back")
    axes.legend(frameon=False, fontsize=8)


def _draw_time_line(axes: Axes, times: RunTimes) -> None:
    begin = times.attempts[0].begin
    unit, size = _unit(times.wall_seconds)
    for spent, colour in COLOURS.items():
        bars = [
            ((span.begin - begin) / size, (span.end - span.begin) / size) for span in times.spans if span.spent is spent
        ]
        waited = times.seconds[Spent.data] if spent is Spent.training else 0.0
        seconds = times.seconds[spent] + waited
        name = f"{spent.value}{' and waiting for data' if waited else ''} {duration(seconds)}"
        if bars:
            axes.broken_barh(
                bars, (0, 1), color=colour, linewidth=0, label=f"{name} ({seconds / times.wall_seconds:.1%})"
            )
    last = -np.inf
    for current in times.attempts:
        position = (current.begin - begin) / size
        axes.plot([position, position], [0, 1.12], color=INK, linewidth=0.8)
        if position - last >= LABEL_SHARE * times.wall_seconds / size:
            last = position
            axes.annotate(
                str(current.attempt.number), (position, 1.12), ha="center", va="bottom", fontsize=8, color=INK
            )
    if times.spans:
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.55))
    axes.set_ylim(0, 1.5)
    axes.set_yticks([])
    axes.set_xlim(0, max(times.wall_seconds / size, 1e-9))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(f"{unit} since the run began; numbers are attempts", color=INK)


def _unit(seconds: float) -> tuple[str, float]:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 3 * size:
            return unit, size
    return "seconds", 1.0
