"""The tables of `muybridge plan`."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..train.cost_rates import Cluster
from ..train.costs_run import RunCosts
from ..train.gpus import GIB
from .plan_search import SPARE, has_room
from .plan_verdict import Verdict, advice, reason
from .report_times import duration

SHOWN_BUCKETS = 12
SHOWN_CHANGES = 12
# An effective time above this needs no mention.
ALL = 0.9995
# Parts of a step below this share of it are not shown.
SHOWN_SHARE = 0.001


def print_plan(verdict: Verdict, facts: dict[str, Any], to: Console) -> None:
    """The memory, the time, the run, and what fits."""
    asked = verdict.asked
    to.print(_headline(verdict), markup=False, soft_wrap=True)
    to.print(_memory_table(asked))
    if asked.step_seconds is None:
        to.print(
            "The activations of an autoencoder's training, and its time, are not modelled: the figures are what it needs at least.",
            markup=False,
            soft_wrap=True,
        )
    else:
        to.print(_time_table(asked))
        to.print(_run_table(asked, facts["asked"]))
    to.print(_what_fits_table(verdict))
    if words := advice(verdict):
        to.print(words, markup=False, soft_wrap=True)
    if verdict.too_large is not None:
        changed = " ".join(verdict.changes_to(verdict.too_large))
        what = f"With {changed} it" if changed else "What was asked for"
        to.print(f"{what} {reason(verdict.too_large)}.", markup=False, soft_wrap=True)
    if not asked.fits:
        to.print(_changes_table(verdict))
    _print_measured(facts["measured"], to)


def _headline(verdict: Verdict) -> str:
    asked = verdict.asked
    available = asked.cluster.gpu.memory_gib
    trained = "" if asked.counts.trainable == asked.counts.all else f" ({asked.counts.trainable / 1e6:.1f} M trained)"
    verb = f"It {_fit_words(asked)}"
    at_least = "" if asked.step_seconds is not None else " at least"
    return (
        f"{asked.counts.all / 1e9:.3f} B parameters{trained} on {cluster_words(asked.cluster)}. {verb}: {asked.peak / GIB:.1f} GiB"
        f"{at_least} at the peak of a process, of {available:.1f} GiB"
    )


def cluster_words(cluster: Cluster) -> str:
    """How many GPUs of which kind."""
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} x {cluster.gpus_per_node} {cluster.gpu.name}"
    return f"{cluster.world} GPUs, {nodes}" if cluster.world > 1 else f"1 {cluster.gpu.name}"


def _memory_table(costs: RunCosts) -> Table:
    shown = sorted(costs.buckets, key=lambda one: -one.memory.peak)[:SHOWN_BUCKETS]
    more = (
        f", the largest {SHOWN_BUCKETS} of {len(costs.buckets)} buckets" if len(costs.buckets) > SHOWN_BUCKETS else ""
    )
    table = Table(title=f"Memory of a process at its peak, GiB{more}", title_justify="left")
    table.add_column("")
    for one in shown:
        table.add_column(f"{one.bucket.name}\nmicro-batch {one.bucket.micro_batch}", justify="right", no_wrap=True)
    names = dict.fromkeys(name for one in shown for name in one.memory.parts)
    for name in names:
        table.add_row(name, *(_gib(one.memory.parts.get(name)) for one in shown))
    table.add_section()
    table.add_row("peak", *(_gib(one.memory.peak) for one in shown))
    return table


def _time_table(costs: RunCosts) -> Table:
    shown = [(one.bucket, one.clip, one.time) for one in costs.buckets[:SHOWN_BUCKETS]]
    more = f", the first {SHOWN_BUCKETS} of {len(costs.buckets)} buckets" if len(costs.buckets) > SHOWN_BUCKETS else ""
    table = Table(title=f"A step, predicted{more}", title_justify="left")
    table.add_column("")
    for bucket, _, _ in shown:
        table.add_column(f"{bucket.name}\nbatch {bucket.global_batch}", justify="right", no_wrap=True)
    rows: dict[str, list[str]] = {}
    times = [time for _, _, time in shown if time is not None]
    counted = {name for time in times for name, value in time.seconds.items() if value >= SHOWN_SHARE * time.total}
    for _, clip, time in shown:
        assert clip is not None
        assert time is not None
        figures = {
            "tokens of a clip": f"{clip.tokens:,}",
            "TFLOP of a clip, forward and backward": number(clip.model / 1e12),
            "  encoding its video": number(clip.vae / 1e12),
            "  encoding its text": number(clip.text / 1e12),
            **{f"{name}, s": number(value) for name, value in time.seconds.items() if name in counted},
            "whole step, s": number(time.total),
            "(communication that is hidden, s)": number(time.hidden_communication),
            "(sent by a process, GB)": number(time.communicated_bytes / 1e9),
            "MFU": f"{time.mfu:.1%}",
            "tokens/s of all GPUs": f"{time.tokens_per_second:,.0f}",
            "places without a sample": f"{time.idle_share:.1%}",
        }
        for name, words in figures.items():
            rows.setdefault(name, []).append(words)
    for name, cells in rows.items():
        if any(cell not in ("0", "0.0%") for cell in cells):
            table.add_row(name, *cells)
    return table


def _run_table(costs: RunCosts, facts: dict[str, Any]) -> Table:
    table = Table(title="The run", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    assert costs.step_seconds is not None
    rows = {
        "steps, samples": f"{costs.config.steps:,}, {costs.samples:,.0f}",
        "computing": duration(costs.config.steps * costs.step_seconds),
        "with checkpoints and failures": duration(costs.wall_seconds),
        "GPU hours": number(costs.gpu_hours),
        "price": "" if facts["price"] is None else number(facts["price"]),
        "checkpoint": f"{number(costs.checkpoint_bytes / 1e9)} GB, stands still {number(costs.checkpoint_blocking_seconds)} s, "
        f"on the disk after {duration(costs.checkpoint_write_seconds)}",
        "host memory of a node, for copies of the states": f"{_gib(costs.host_bytes)} GiB",
        "a checkpoint every": duration(costs.checkpoint_seconds_apart),
        "a failure every": duration(costs.seconds_between_failures),
        "failures expected": number(costs.failures) if costs.failures >= 0.01 else "",
        "effective time": f"{costs.effective_share:.1%}" if costs.effective_share < ALL else "",
    }
    for name, words in rows.items():
        if words:
            table.add_row(name, words)
    return table


def _what_fits_table(verdict: Verdict) -> Table:
    table = Table(title=f"What fits {verdict.asked.cluster.gpu.memory_gib:.1f} GiB", title_justify="left")
    table.add_column("", overflow="fold")
    for name in ("GPUs", "peak\nGiB", "host\nGiB", "s/step", "days", "GPU\nhours"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = {
        "as asked": verdict.asked,
        "fastest here": verdict.fastest,
        "fewest nodes": verdict.smallest,
        "also": verdict.too_large if verdict.too_large is not verdict.asked else None,
    }
    for name, costs in rows.items():
        if costs is None:
            if name != "also":
                table.add_row(f"{name}: none with {SPARE:.0%} to spare")
            continue
        times = "", "", ""
        if costs.step_seconds is not None:
            times = number(costs.step_seconds), number(costs.wall_seconds / 86400), number(costs.gpu_hours)
        words = "\n  ".join([f"{name}: {_fit_words(costs)}", *verdict.changes_to(costs)])
        table.add_row(Text(words), str(costs.cluster.world), _gib(costs.peak), _gib(costs.host_bytes), *times)
    return table


def _fit_words(costs: RunCosts) -> str:
    if not costs.fits:
        return "does not fit"
    return "fits" if has_room(costs) else "fits barely"


def _changes_table(verdict: Verdict) -> Table:
    table = Table(title="What each of these alone gains", title_justify="left")
    table.add_column("settings", overflow="fold")
    for name in ("less GiB", "peak GiB", "s/step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("then", no_wrap=True)
    for texts, costs in verdict.changes[:SHOWN_CHANGES]:
        seconds = "" if costs.step_seconds is None else number(costs.step_seconds)
        gained = _gib(verdict.asked.peak - costs.peak)
        table.add_row(Text("\n".join(texts)), gained, _gib(costs.peak), seconds, f"it {_fit_words(costs)}")
    return table


def _print_measured(measured: list[dict[str, Any]], to: Console) -> None:
    if not measured:
        to.print("There is no GPU result of this model to compare with; make gpu measures some.", markup=False)
        return
    table = Table(title="Predictions against measured steps", title_justify="left")
    for name in ("step", "GPU", "measured s", "predicted s", "error", "measured GiB", "predicted GiB", "error"):
        table.add_column(name, justify="left" if name in ("step", "GPU") else "right")
    for one in measured:
        memory = ("", "", "")
        if one["peak_gib"] is not None:
            memory = f"{one['peak_gib']:.1f}", f"{one['predicted_peak_gib']:.1f}", f"{one['memory_error']:+.1%}"
        times = number(one["seconds"]), number(one["predicted_seconds"]), f"{one['time_error']:+.1%}"
        table.add_row(Text(one["name"]), Text(one["device"]), *times, *memory)
    to.print(table)


def without_nan(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:,.1f}"


def number(value: float) -> str:
    """Three digits, or all of a larger number; 0 for what is next to nothing."""
    if value < 1e-4:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
