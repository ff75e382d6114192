"""`muybridge sync`: hands what W&B's client wrote offline, attempt after attempt of a run, to W&B."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data.captions import printable
from ..redaction import redacted
from ..slurm.run_files import is_at_work, is_run_dir
from ..train.exit_codes import ExitCode
from ..train.outputs import replace_text
from ..train.tracking import URL_NAME

USAGE = """\
usage: muybridge sync RUN [RUN ...]

Hand a run that was tracked offline to W&B: what each of its attempts wrote, in their order, into one W&B run. What W&B has
already is left out, so that it may be called again. Needs the network and a login (`wandb login`, or WANDB_API_KEY), so
call it where both are, such as on a cluster's login node.

  RUN                   directory of a training run

What an attempt writes that goes on is left for later, as W&B takes a file once.
Exit code 0: W&B has everything that is over; 75: it has not, and the same again may work."""

# Without a network W&B's client would try for hours what fails within seconds.
_RETRIES = {"WANDB__GRAPHQL_RETRY_MAX": "4", "WANDB__FILE_STREAM_RETRY_MAX": "6", "WANDB__FILE_TRANSFER_RETRY_MAX": "6"}
_NO_LOGIN = ("api key", "not authenticated", "401", "403", "unauthorized", "permission denied")
_NO_NETWORK = ("dial tcp", "giving up after", "no such host", "timeout", "timed out", "connection re")

console = Console(highlight=False)


@dataclass(frozen=True)
class OfflineAttempt:
    """What W&B's client wrote of one attempt."""

    folder: Path
    file: Path
    is_synced: bool  # by the mark that W&B leaves beside the file


def main(argv: list[str]) -> int:
    """Hand the runs to W&B; returns the exit code. Raises ValueError for what is no run that was tracked offline."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if unknown := [text for text in argv if text.startswith("-")]:
        raise ValueError(f"unknown option {unknown[0]} (see muybridge sync --help)")
    runs = [Path(text) for text in argv]
    for run_dir in runs:
        if not is_run_dir(run_dir) and not offline_attempts(run_dir):
            raise ValueError(f"RUN={run_dir} must be the directory of a training run")
    return max(_sync_run(run_dir) for run_dir in runs)


def offline_attempts(run_dir: Path) -> list[OfflineAttempt]:
    """In the order of their starts; those of which W&B's client wrote nothing are left out."""
    files = [file for file in run_dir.glob("wandb/offline-run-*/run-*.wandb") if file.stat().st_size]
    files.sort(key=lambda file: file.parent.name)
    return [OfflineAttempt(file.parent, file, _mark(file).exists()) for file in files]


def _mark(file: Path) -> Path:
    return file.with_name(f"{file.name}.synced")


def _sync_run(run_dir: Path) -> int:
    attempts = offline_attempts(run_dir)
    if not attempts:
        was_online = any(run_dir.glob("wandb/run-*"))
        _say(f"{run_dir}: nothing to do, {'W&B was online' if was_online else 'it was not tracked by W&B'}.")
        return 0
    waiting = [attempt for attempt in attempts if not attempt.is_synced]
    if waiting and waiting[-1] is attempts[-1] and is_at_work(run_dir, time.time()):
        _say(f"{waiting.pop().folder} is left for later: its attempt goes on.")
    if not waiting:
        had = sum(attempt.is_synced for attempt in attempts)
        _say(f"{run_dir}: nothing to do, W&B has {had} of {len(attempts)} attempts.")
        return 0
    words = _hand_over(waiting)
    left = [attempt for attempt in waiting if not _mark(attempt.file).exists()]
    if left:
        print(
            f"muybridge: W&B did not take {len(left)} of {len(waiting)} attempts of {run_dir}: {_cause(words)}",
            file=sys.stderr,
        )
        return ExitCode.requeue
    had = len(attempts) - len(waiting)
    _say(f"{run_dir}: W&B has taken {len(waiting)} of {len(attempts)} attempts{f', and had {had}' if had else ''}.")
    addresses = [line.rpartition(" at ")[2] for line in words if "View run" in line]
    if addresses:
        replace_text(run_dir / URL_NAME, addresses[-1])
    _say(f"Next: look at {addresses[-1] if addresses else 'the run in W&B'}")
    return 0


def _hand_over(attempts: list[OfflineAttempt]) -> list[str]:
    """Call W&B's client, which does attempts of one run one after the other, oldest first; returns what it said."""
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    command = [sys.executable, "-m", "wandb", "sync", *(str(attempt.folder) for attempt in attempts)]
    columns = (TextColumn("W&B"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    words = []
    with (
        Progress(*columns, console=console) as progress,
        subprocess.Popen(
            command,
            env={**_RETRIES, **environment},
            stdin=subprocess.DEVNULL,  # it asks for no key
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as client,
    ):
        task = progress.add_task("", total=len(attempts))
        for line in _lines(client):
            words.append(line)
            progress.console.print(line, markup=False, soft_wrap=True)
            progress.update(task, completed=sum(_mark(attempt.file).exists() for attempt in attempts))
        client.wait()
        progress.update(task, completed=sum(_mark(attempt.file).exists() for attempt in attempts))
    return words


def _lines(client: subprocess.Popen[str]) -> Iterator[str]:
    assert client.stdout is not None
    for line in client.stdout:
        yield printable(redacted(line.rstrip("\n")))


def _cause(words: list[str]) -> str:
    """What W&B's client complained about, and what there is to do."""
    complaints = [line for line in words if "error" in line.lower() and "debug-cli" not in line] or words[-1:]
    text = (complaints or ["it did not say why"])[0].removeprefix("wandb: ").removeprefix("ERROR ")
    lower = text.lower()
    if any(part in lower for part in _NO_LOGIN):
        return f"{text}; log in with `wandb login`, or set WANDB_API_KEY, and call this again"
    if any(part in lower for part in _NO_NETWORK):
        return f"{text}; call this again on a machine that reaches W&B, such as the cluster's login node"
    return f"{text}; call this again, as what it took stays taken"


def _say(text: str) -> None:
    console.print(printable(text), markup=False, soft_wrap=True)
