"""How a run's status is shown: one run in full, or a line of a table each, and what to do next."""

import shlex
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..data.captions import printable
from ..scripts.report_times import duration
from ..train.exit_codes import ExitCode
from .run_status import Progress, QueuedJob, RunStatus

_SHOWN_STRETCHES = 10
_LABEL_WIDTH = 12
_COLOURS = {
    **dict.fromkeys(("running", "done"), "bold green"),
    **dict.fromkeys(("waiting", "ending", "stopped", "cancelled", "new"), "bold yellow"),
    **dict.fromkeys(("gave_up", "failed", "lost"), "bold red"),
}
_REMEDIES = {
    ExitCode.config: "mend the setting or the data that it names",
    ExitCode.data_budget: "look at the clips that it names, mend the data or raise data.max_bad_share",
    ExitCode.diverged: "look at the curves; a lower optimizer.lr or other data may help",
    ExitCode.out_of_memory: "lower micro_batch, set activations.policy=block, or take more GPUs",
    ExitCode.no_progress: "find out from the log why no attempt got as far as a checkpoint",
}


def print_status(status: RunStatus, to: Console) -> None:
    """One run in full."""
    name = status.state.replace("_", " ")
    to.print(Text.assemble((printable(status.run), "bold"), "  ", (name, _COLOURS[status.state])), soft_wrap=True)
    if status.words not in (name, *(job.words for job in status.jobs)):
        _line(to, "state", status.words)
    for job in status.jobs:
        _line(to, "job", _job_words(job, status))
    if status.slurm_fault:
        _line(to, "Slurm", f"{status.slurm_fault}; below is what the files say")
    _print_progress(status, to)
    if status.checkpoint is not None:
        _line(to, "checkpoint", _checkpoint_words(status))
    if status.history:
        _print_history(status, to)
    if status.fruitless:
        _line(to, "no progress", f"{_count(status.fruitless, 'life', 'lives')} in a row left no new checkpoint")
    for node in status.bad_nodes:
        _line(to, "bad node", f"{node.name}: {node.reason}")
    if excluded := ", ".join(job.excluded_nodes for job in status.jobs if job.excluded_nodes):
        _line(to, "left out", excluded)
    if status.wandb is not None:
        _line(to, "W&B", _wandb_words(status))
    if status.log is not None:
        _line(to, "log", status.log)
    for fault in status.faults:
        _line(to, "damaged", fault)
    for number, text in enumerate(status.next):
        _line(to, "" if number else "next", text)


def print_table(statuses: Sequence[RunStatus], to: Console) -> None:
    """A line a run."""
    if fault := next((status.slurm_fault for status in statuses if status.slurm_fault), ""):
        to.print(f"{fault}; below is what the files say", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold", min_width=14)
    table.add_column("state", no_wrap=True)
    is_wide = to.width >= 100
    for name in ("step", "loss", *(("s/step", "lives") if is_wide else ()), "to go", "last row", "job"):
        table.add_column(name, justify="right", no_wrap=True)
    for status in statuses:
        progress = status.progress
        age = "" if progress.row_unix_seconds is None else f"{_brief(status.now - progress.row_unix_seconds)} ago"
        wide = [_figure(progress.seconds_per_step), str(len(status.history) or "")]
        table.add_row(
            Text(printable(_short_path(status.run, statuses))),
            Text(status.state.replace("_", " "), _COLOURS[status.state]),
            f"{progress.step}/{progress.steps}" if progress.steps else str(progress.step or "-"),
            _figure(progress.loss),
            *(wide if is_wide else ()),
            "" if progress.eta_seconds is None else _brief(progress.eta_seconds),
            Text(age, "bold red" if progress.is_quiet else ""),
            status.jobs[0].id if status.jobs else "",
        )
    to.print(table)
    for status in statuses:
        if status.state in ("gave_up", "failed", "lost"):
            to.print(
                f"{printable(_short_path(status.run, statuses))}: {printable(status.words)}",
                markup=False,
                soft_wrap=True,
            )


def next_steps(status: RunStatus) -> list[str]:
    """What a person can do now, as sentences and commands."""
    run = shlex.quote(status.run)
    submit = "the same `muybridge submit`" if status.submitted_nodes is not None else "the same `muybridge train`"
    cancel = (
        f"muybridge cancel {run}"
        if status.submitted_nodes is not None
        else f"touch {shlex.quote(status.run + '/STOP')}"
    )
    saved = status.checkpoint
    goes_on = f"{submit} {f'goes on from step {saved.step:,}' if saved else 'begins it anew'}"
    match status.state:
        case "running" if status.progress.is_quiet:
            steps = [
                f"see in the log{_stacks(status)} whether it hangs; if so, `{cancel}{_now(status)}` and then {goes_on}"
            ]
        case "running" | "ending":
            steps = [f"{cancel}    saves and stops it"]
        case "waiting":
            steps = [f"{cancel}    takes it out of the queue"]
        case "done":
            steps = [f"muybridge report run={run}", "muybridge export --help"]
        case "gave_up" | "failed":
            remedy = _REMEDIES.get(ExitCode(status.code), "") if status.code in list(ExitCode) else ""
            steps = [f"{remedy or 'find the cause in the log'}; then {goes_on}"]
        case "new":
            steps = [f"`muybridge submit` or `muybridge train` with run_dir={run} begins it"]
        case "lost" if status.slurm_fault:
            steps = ["ask again on a machine where Slurm answers"]
        case _:
            steps = [goes_on]
    if status.wandb is not None and status.wandb.unsynced:
        steps.append(f"muybridge sync {run}    hands what is offline to W&B")
    if status.log is not None and status.state in ("running", "failed", "gave_up", "lost"):
        steps.append(f"tail -F {shlex.quote(status.log)}")
    return steps


def _now(status: RunStatus) -> str:
    return " --now" if status.submitted_nodes is not None else ""


def _stacks(status: RunStatus) -> str:
    return f" and {shlex.quote(status.run + '/stacks')}" if (Path(status.run) / "stacks").is_dir() else ""


def _job_words(job: QueuedJob, status: RunStatus) -> str:
    parts = [job.id]
    if job.nodes:
        parts.append(f"on {job.nodes}")
    if status.processes:
        parts.append(f"{status.processes} processes")
    if job.state == "PENDING":
        parts.append(job.words)
        if job.start is not None:
            parts.append(f"Slurm expects to start it {_moment(job.start, status.now)}")
    elif job.start is not None:
        parts.append(f"since {_moment(job.start, status.now)} ({_short(status.now - job.start)})")
    if job.state != "PENDING" and job.limit is not None:
        left = job.limit - status.now
        parts.append(f"{duration(left)} left" if left > 0 else "its time is over")
    if job.restarts:
        parts.append(f"start {job.restarts + 1}")
    return ", ".join(parts)


def _print_progress(status: RunStatus, to: Console) -> None:
    progress = status.progress
    done = f"step {progress.step:,}" + (f" of {progress.steps:,}" if progress.steps else "")
    if progress.eta_seconds is not None and progress.step < (progress.steps or 0):
        done += f", about {duration(progress.eta_seconds)} to go"
    if progress.steps:
        text = f"{100 * progress.step / progress.steps:.1f} %, {done}"
        width = min(30, max(8, to.width - _LABEL_WIDTH - 2 - len(text)))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=_LABEL_WIDTH - 2)
        grid.add_column(width=width)
        grid.add_row("progress", ProgressBar(progress.steps, min(progress.step, progress.steps), width=width), text)
        to.print(grid)
    elif progress.step or status.history:
        _line(to, "progress", done)
    if progress.loss is not None:
        _line(to, "loss", f"{_figure(progress.loss)} at learning rate {_figure(progress.lr)}")
        _line(to, "speed", _speed_words(progress))
    if progress.row_unix_seconds is not None:
        age = max(0.0, status.now - progress.row_unix_seconds)
        words = f"{_short(age)} ago" if status.state == "running" else _moment(progress.row_unix_seconds, status.now)
        _line(to, "last row", words, style="")
    if progress.is_quiet:
        what = "it is still setting up" if progress.row_unix_seconds is None else "that is unusually long for this run"
        _line(to, "quiet", f"it has written nothing for long ({what}): does it hang?", style="bold red")


def _speed_words(progress: Progress) -> str:
    words = f"{_figure(progress.seconds_per_step)} s a step, {_figure(progress.samples_per_second)} samples/s"
    return (
        words if progress.data_share is None else f"{words}, {100 * progress.data_share:.0f} % of it waiting for data"
    )


def _checkpoint_words(status: RunStatus) -> str:
    saved = status.checkpoint
    assert saved is not None
    parts = [f"step {saved.step:,}"]
    if saved.unix_seconds is not None:
        parts.append(f"{_short(status.now - saved.unix_seconds)} ago")
    parts.append("its MANIFEST.json cannot be read" if saved.bytes is None else _size(saved.bytes))
    return ", ".join([*parts, saved.name])


def _print_history(status: RunStatus, to: Console) -> None:
    """A line of figures for each stretch, and how it ended below that."""
    history, shown = status.history, status.history[-_SHOWN_STRETCHES:]
    has_lives = any(stretch.life for stretch in history)
    rows, endings = [], []
    for stretch in shown:
        goes_on = stretch is history[-1] and status.state in ("running", "ending") and stretch.end is None
        end = status.now if goes_on else stretch.end
        if end is not None:
            lasted = _short(end - stretch.begin)
        else:
            lasted = "?" if stretch.seen is None else f"> {_short(stretch.seen - stretch.begin)}"
        steps = "no step" if stretch.start_step is None else f"steps {stretch.start_step} to {stretch.step}"
        name = (stretch.life or "by hand") if has_lives else str(stretch.attempt)
        rows.append([name, _moment(stretch.begin, status.now), lasted, printable(stretch.nodes), steps])
        unknown = "it goes on" if goes_on else "without a word: killed, or its node went down"
        endings.append(stretch.words or unknown)
    widths = [max(map(len, column)) for column in zip(*rows)]
    label = "lives" if has_lives else "attempts"
    if len(shown) < len(history):
        _line(to, label, f"{len(history)}, of which the last {len(shown)}:")
        label = ""
    for number, (row, ending) in enumerate(zip(rows, endings)):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        _line(to, "" if number else label, "  ".join(cells).rstrip(), wraps=False)
        _line(to, "", ending, indent=widths[0] + 2, style="dim")


def _wandb_words(status: RunStatus) -> str:
    wandb = status.wandb
    assert wandb is not None
    name = f"run {wandb.run_id}" + (f" of project {wandb.project}" if wandb.project else "")
    if wandb.url:
        name = wandb.url
    if wandb.is_online:
        return f"{name}, online"
    folder = f"{status.run}/wandb"
    if not wandb.unsynced:
        return f"{name}, offline, all handed over"
    return f"{name}, offline in {folder}, {wandb.unsynced} of {_count(wandb.offline, 'attempt', 'attempts')} not handed over"


def _line(to: Console, label: str, text: str, *, style: str = "", indent: int = 0, wraps: bool = True) -> None:
    """A label and its text, which is wrapped between words but never within a path or a command that one may copy."""
    text, left = printable(text), _LABEL_WIDTH + indent
    width = max(20, to.width - left)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) if wraps else [text]
    for number, line in enumerate(lines):
        to.print(Text(f"{'' if number else label:<{left}}").append(line, style), soft_wrap=True)


def _moment(seconds: float, now: float) -> str:
    """A time of today without its date, one of this year without the year."""
    then, today = time.localtime(seconds), time.localtime(now)
    if then[:3] == today[:3]:
        return time.strftime("%H:%M:%S", then)
    return time.strftime("%d %b %H:%M" if then[0] == today[0] else "%Y-%m-%d %H:%M", then)


def _short(seconds: float) -> str:
    return duration(round(max(0.0, seconds)))


def _brief(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}" if unit == "min" else f"{seconds / size:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _size(nbytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _short_path(run: str, statuses: Sequence[RunStatus]) -> str:
    """Without the folder that all runs are in."""
    parents = {str(Path(status.run).parent) for status in statuses}
    return Path(run).name if len(parents) == 1 else run
