"""What a run reports: metrics.jsonl (the record), W&B (the view) and the progress bar. Only rank 0 makes one.

A row has its step, the attempt that made it, the time, and figures. Rows of steps that are done once more, after a resume or a
roll-back, move to metrics_dropped.jsonl, so that every step has one row.
"""

import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data.captions import clean_caption, printable
from ..redaction import is_secret_name, redacted
from .json_lines import JsonLines, read_json_lines
from .outputs import replace_text

METRICS_NAME = "metrics.jsonl"
DROPPED_NAME = "metrics_dropped.jsonl"
# Where to look at the run, once W&B has it.
URL_NAME = "wandb_url.txt"
PLAIN_LINE_SECONDS = 10
MAX_CAPTION_CHARACTERS = 500  # of a video in W&B
# The column that tells that a validation is complete.
VALIDATION_SECONDS = "validation_seconds"


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class TrackingConfig:
    """Metrics and their view in W&B."""

    # auto is online where the user is logged in to W&B and offline (files under run_dir/wandb) elsewhere.
    wandb: WandbMode = WandbMode.auto
    project: str = "muybridge"
    # Name shown in W&B; null takes the run directory's name.
    name: str | None = None
    # Steps between two rows of metrics; each row waits for the device once.
    log_every_steps: int = 10

    def faults(self, field: str) -> list[str]:
        if self.log_every_steps < 1:
            return [f"{field}.log_every_steps={self.log_every_steps} must be at least 1"]
        return []


class Tracker:
    """Writes rows of metrics and media; a failure of W&B or of the disk never reaches the training loop."""

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        *,
        run_config: dict[str, Any],
        total_steps: int,
        start_step: int,
        attempt: int,
    ) -> None:
        self._run_dir, self._attempt = run_dir, attempt
        _drop_rows_after(run_dir, start_step)
        self._rows = JsonLines(run_dir / METRICS_NAME)
        self._failure = ""
        self.run_id = _run_id(run_dir)
        self._wandb = _start_wandb(run_dir, config, run_id=self.run_id, run_config=run_config)
        # Online, W&B counts on from what it has. Offline it counts from 0 in every attempt, and where attempts are put together
        # later, a row whose count was there before is lost.
        is_offline = self._wandb is not None and self._wandb.offline
        self._offline_count = _beyond_former_counts(run_dir, attempt) if is_offline else None
        self._bar = _ProgressBar(run_dir.name, total_steps, start_step)
        # What the parts log (such as the attention backend that was chosen) reaches the person who watches, once per run.
        self._log_handler = _NoteHandler(self.note)
        _package_logger().addHandler(self._log_handler)
        _package_logger().setLevel(logging.INFO)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Record a row of metrics after `step` steps. The file leaves out what is not finite: JSON has no word for it."""
        stamp = {"step": step, "attempt": self._attempt}
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        failure = self._rows.append({**stamp, "unix_seconds": round(time.time(), 3), **finite})
        if failure and not self._failure:
            self.note(f"muybridge: {failure}; training goes on, and the rows are written when they can be")
        self._failure = failure
        self._log_to_wandb({**row, **stamp})
        if "loss" in row:
            self._bar.show(step, row)

    def has(self, step: int, column: str) -> bool:
        """Whether a row of this step with such a column was recorded, in this attempt or an earlier one."""
        return any(row.get("step") == step and column in row for row in read_json_lines(self._run_dir / METRICS_NAME))

    def validation_losses(self) -> dict[int, float]:
        """The validation losses so far, by their steps."""
        rows = read_json_lines(self._run_dir / METRICS_NAME)
        return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}

    def drop_rows_after(self, step: int) -> None:
        """Forget what was recorded of later steps, before they are done once more in this attempt."""
        self._rows.close()
        try:
            _drop_rows_after(self._run_dir, step)
        except OSError as error:
            self.note(f"muybridge: the rows after step {step} are in {METRICS_NAME} twice from here on ({error})")
        self._rows = JsonLines(self._run_dir / METRICS_NAME)
        self._bar.go_back(step)

    def log_videos(self, step: int, videos: list[tuple[Path, str]]) -> None:
        """Record sample videos: mp4 files and their captions."""
        if self._wandb is not None and videos:
            self._log_to_wandb({"step": step, "attempt": self._attempt}, videos)

    def note(self, text: str) -> None:
        """Say something to the person who watches."""
        self._bar.note(text)

    def begin(self, step: int) -> None:
        """The steps begin: what is left is estimated by their time from here on."""
        self._bar.go_back(step)

    def close(self) -> None:
        _package_logger().removeHandler(self._log_handler)
        self._bar.close()
        self._rows.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self.note(f"muybridge: W&B did not get everything ({error}); metrics.jsonl has it")

    def _log_to_wandb(self, row: dict[str, Any], videos: Sequence[tuple[Path, str]] = ()) -> None:
        if self._wandb is None:
            return
        try:
            if videos:
                import wandb

                shown = [(str(path), clean_caption(caption)[:MAX_CAPTION_CHARACTERS]) for path, caption in videos]
                row["samples"] = [wandb.Video(path, caption=caption, format="mp4") for path, caption in shown]
            self._wandb.log(row, step=self._offline_count)
            if self._offline_count is not None:
                self._offline_count += 1
        except Exception as error:  # whatever goes wrong in W&B, its service process or the disk
            self.note(f"muybridge: W&B is off from here on ({error}); metrics.jsonl has everything")
            self._wandb = None


class _ProgressBar:
    """A bar with ETA on a terminal; on a log file one line now and then."""

    def __init__(self, name: str, total: int, start: int) -> None:
        self._name, self._total, self._start = name, total, start
        self._began = time.monotonic()
        self._last_line = -math.inf
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
            )
            self._progress.start()
            self._task = self._progress.add_task(escape(name), total=total, completed=start, facts="")

    def show(self, step: int, row: dict[str, float]) -> None:
        facts = (
            f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3g}  lr {row['lr']:.3g}  "
            f"{row['seconds_per_step']:.3g} s/step  {row['samples_per_second']:.3g} samples/s"
            + (f"  MFU {row['mfu']:.1%}" if "mfu" in row else "")
        )
        now = time.monotonic()
        if self._progress is not None:
            self._progress.update(self._task, completed=step, facts=facts)
        elif now - self._last_line > PLAIN_LINE_SECONDS or step == self._total:
            self._last_line = now
            rate = (now - self._began) / max(1, step - self._start)
            eta = time.strftime("%H:%M:%S", time.gmtime(rate * (self._total - step)))
            print(f"{self._name}  step {step}/{self._total}  {facts}  eta {eta}", file=sys.stderr, flush=True)

    def go_back(self, step: int) -> None:
        self._start, self._began = step, time.monotonic()
        if self._progress is not None:
            self._progress.reset(self._task, completed=step)

    def note(self, text: str) -> None:
        # It may quote anything: no brackets of it are rich's markup, nothing in it moves the cursor, and no line broken at
        # the terminal's width hides a secret from `redact_output`.
        text = "\n".join(map(printable, redacted(text).split("\n")))
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class _NoteHandler(logging.Handler):
    """Passes log records on as notes."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(record.getMessage())


def _package_logger() -> logging.Logger:
    return logging.getLogger(__name__.split(".")[0])


def _run_id(run_dir: Path) -> str:
    """The W&B id of this run directory, the same after every resume; an empty file is as good as none."""
    path = run_dir / "wandb_run_id.txt"
    run_id = path.read_text().strip() if path.exists() else ""
    if not run_id:
        run_id = secrets.token_hex(4)
        replace_text(path, run_id)
    return run_id


def _drop_rows_after(run_dir: Path, step: int) -> None:
    """Move the rows of steps that are done once more, so that every step has one row, and nothing is lost."""
    path = run_dir / METRICS_NAME
    rows = read_json_lines(path)
    dropped = [row for row in rows if row.get("step", 0) > step]
    if not dropped:
        return
    # First of all: a kill between the two leaves them in both files, which their readers know of.
    aside = JsonLines(run_dir / DROPPED_NAME)
    if failure := [text for text in map(aside.append, dropped) if text]:
        raise OSError(failure[-1])
    aside.close()
    staging = path.with_suffix(".tmp")
    staging.write_text("".join(json.dumps(row) + "\n" for row in rows if row.get("step", 0) <= step))
    staging.replace(path)


def _beyond_former_counts(run_dir: Path, attempt: int) -> int:
    """More than W&B was told rows of in the attempts before: each row may have come with videos, and a validation that was cut
    short leaves videos without a row."""
    return 2 * sum(len(read_json_lines(run_dir / name)) for name in (METRICS_NAME, DROPPED_NAME)) + attempt - 1


def _start_wandb(run_dir: Path, config: TrackingConfig, *, run_id: str, run_config: dict[str, Any]) -> Any:
    if config.wandb is WandbMode.off:
        return None
    import wandb

    mode = config.wandb.value
    if config.wandb is WandbMode.auto:
        mode = os.environ.get("WANDB_MODE") or ("online" if _is_logged_in() else "offline")
    # The address that a checkout was cloned from may have a token in it; which commit it is, is in provenance.json.
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True)
    try:
        with _without_slurm_secrets():
            run = wandb.init(
                project=config.project,
                name=config.name or run_dir.name,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=run_config,
                settings=settings,
            )
        # W&B drops rows whose own step counter goes back, as after a resume from an older step; ours is an ordinary metric.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if not run.offline and run.url:
            with suppress(OSError):
                replace_text(run_dir / URL_NAME, run.url)
        return run
    except Exception as error:  # no key, no network, a full disk
        print(f"muybridge: W&B is off for this run ({error}); metrics.jsonl has everything", file=sys.stderr)
        return None


@contextmanager
def _without_slurm_secrets() -> Iterator[None]:
    # W&B's service process notes down every variable of Slurm that it was started with, among them SLURM_JWT, a login.
    hidden = {name: value for name, value in os.environ.items() if name.startswith("SLURM_") and is_secret_name(name)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_logged_in() -> bool:
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
