"""`python -m muybridge.slurm.stage TO OVERRIDE...`: copies the shards that a run reads to this machine's own disk.

The batch script runs it once on each machine before training (slurm.stage_to=TO), with the overrides of `muybridge train`. With
MUYBRIDGE_STAGED=TO training reads the copies, and the original of whatever is not there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..data.config import Access, DataConfig, DatasetConfig
from ..data.index import ClipIndex
from ..data.row_filter import select_rows
from ..data.staged import STAGED_VARIABLE, is_whole, shard_copy, staging_folder, stream_copy
from ..data.storage import file_facts
from ..data.stream_samples import find_streams
from ..redaction import redact_output
from ..train.compose import compose_config
from ..train.config import SCHEMA_NAME, TrainConfig
from ..train.exit_codes import ExitCode
from ..train.life import Asked, tell_end
from .copying import KEPT_FREE_SHARE, Copier, Outcome, Shard

USAGE = f"""\
usage: python -m muybridge.slurm.stage TO OVERRIDE...

Copies the shards that a run reads to this machine's own disk; run it on each machine with the overrides of `muybridge train`. With
{STAGED_VARIABLE}=TO in its environment, training reads the copies, and the originals of shards that are not there.

TO is a folder on the machine's own disk, not one that the machines share and not memory (/dev/shm); $VARIABLES in it are those of
the machine. The copies lie in TO/muybridge-staged-UID, for this user alone, and stay there: the next start and other runs
of the same data find them. To clean up, remove that folder, or what was not read for a month:
  find TO/muybridge-staged-UID -type f -atime +30 -delete

It leaves {KEPT_FREE_SHARE:.0%} of the disk free. The exit code is 0 also where not everything was copied, 64 for wrong settings."""

_COPIES_AT_A_TIME = 8
_LINE_SECONDS = 30.0  # between two lines of progress, where there is no terminal
_BUSY_SECONDS = 0.5
_SHOWN = 5
_console = Console(highlight=False)


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    redact_output()
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        folder = staging_folder(argv[0], field="TO")
        config = compose_config(argv[1:], config_class=TrainConfig, config_name="train", schema_name=SCHEMA_NAME)
        if faults := config.data.faults("data"):
            raise ValueError("; ".join(faults))
    except ValueError as error:
        if _node() == 0:  # all machines find the same mistake
            print(f"muybridge: {error}", file=sys.stderr)
        tell_end(ExitCode.config, Asked.nobody, str(error))
        return ExitCode.config
    try:
        found = find_shards(config, folder)
        report = copy_shards(found.shards, folder)
        report.faults = found.faults + report.faults
        _print_report(report, argv[0], folder)
    except Exception:  # it is no reason not to train
        traceback.print_exc()
        print("muybridge: copying ended with this fault; training reads the originals of what is not there", flush=True)
    return 0


@dataclass
class Found:
    """The shards of a run, and what was wrong with datasets or shards."""

    shards: list[Shard] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What became of shards: how many, and their bytes."""

    shards: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    size: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, shard: Shard, outcome: Outcome) -> None:
        self.shards[outcome] += 1
        self.size[outcome] += shard.size


def find_shards(config: TrainConfig, folder: Path) -> Found:
    """The shards that a run with these settings reads, those of validation first. A dataset that cannot be read costs itself."""
    found = Found()
    validation = config.validation_data()
    if validation is not None and config.validation.every_steps:
        _find(validation, folder, found)
    first = len(found.shards)
    _find(config.training_data(), folder, found)
    # Each machine begins elsewhere, so that not all of them read one file.
    own = found.shards[first:]
    start = len(own) * _node() // max(1, int(os.environ.get("SLURM_NNODES", "1")))
    by_target: dict[Path, Shard] = {}
    for shard in (*found.shards[:first], *own[start:], *own[:start]):
        by_target.setdefault(shard.target, shard)
    found.shards = list(by_target.values())
    return found


def copy_shards(shards: list[Shard], folder: Path) -> Report:
    """Copies shards to a staging folder, some at a time, with a progress bar; what cannot be copied is in the report."""
    report = Report()
    start = time.monotonic()
    missing = []
    for shard in shards:
        if is_whole(shard.target, shard.size):
            report.add(shard, Outcome.there)
        else:
            missing.append(shard)
    threads = ThreadPoolExecutor(_COPIES_AT_A_TIME)
    try:
        with _Bar(sum(shard.size for shard in missing)) as bar:
            copier = Copier(folder, bar.advance)
            copier.remove_leftovers()
            while missing:
                missing = _copy_all(copier, threads, missing, bar, report)
                if missing:
                    time.sleep(_BUSY_SECONDS)
    except OSError as error:
        report.faults.append(f"{folder}: {error.strerror or error}; nothing can be copied there")
    finally:
        threads.shutdown(cancel_futures=True)
    report.seconds = time.monotonic() - start
    return report


def _copy_all(
    copier: Copier, threads: ThreadPoolExecutor, shards: list[Shard], bar: _Bar, report: Report
) -> list[Shard]:
    """Copies what no other process is at; returns the others, which will soon be there."""
    busy = []
    futures = {threads.submit(copier.copy, shard): shard for shard in shards}
    for future in bar.each_done(futures):
        shard = futures[future]
        try:
            outcome = future.result()
        except (OSError, EOFError, ValueError) as error:
            report.faults.append(f"{shard.name}: {error}")
            continue
        if outcome is Outcome.busy:
            busy.append(shard)
            continue
        if outcome is Outcome.there:
            bar.advance(shard.size)
        report.add(shard, outcome)
    return busy


def _find(data: DataConfig, folder: Path, found: Found) -> None:
    if data.access is Access.stream:
        _find_stream(data.path, folder, found)
        return
    for name, source in data.sources().items():
        if source.weight > 0:
            try:
                found.shards += _indexed(source, f"data.datasets.{name}" if name else "data", folder)
            except (OSError, ValueError) as error:
                found.faults.append(str(error))


def _find_stream(path: str, folder: Path, found: Found) -> None:
    try:
        names = find_streams(path, field="data.path")
    except (OSError, ValueError) as error:
        found.faults.append(str(error))
        return

    def shard(name: str) -> Shard | str:
        try:
            facts = file_facts(name)
        except OSError as error:
            return f"{name}: {error}"
        return Shard(name, facts.size, stream_copy(folder, name, facts), facts=facts)

    with ThreadPoolExecutor(_COPIES_AT_A_TIME) as threads:
        for result in threads.map(shard, names):
            if isinstance(result, str):
                found.faults.append(result)
            else:
                found.shards.append(result)


def _indexed(source: DatasetConfig, field: str, folder: Path) -> list[Shard]:
    """The shards of a dataset folder that hold a clip of its filter. Raises ValueError, and OSError where nothing answers."""
    index = ClipIndex.open(source.path, field=f"{field}.path")
    rows = np.arange(len(index))
    if source.filter:
        rows = select_rows(index, source.filter, field=f"{field}.filter")
    numbers = index.column("shard")
    used = set(np.unique(numbers[rows]).tolist())
    by_shard = np.argsort(numbers, kind="stable")
    places = np.arange(len(index.shard_names))
    bounds = np.searchsorted(numbers[by_shard], [places, places + 1]).T.tolist()  # first and last of each shard
    table = np.stack([index.column(name).astype(np.int64) for name in ("offset", "size", "checksum")], axis=1)[by_shard]
    return [
        Shard(name, about["bytes"], shard_copy(folder, index, number), clips=table[slice(*bounds[number])])
        for number, (name, about) in enumerate(zip(index.shard_names, index.manifest["shards"], strict=True))
        if number in used
    ]


class _Bar:
    """A progress bar on a terminal; in a log, lines from the first machine."""

    def __init__(self, total_bytes: int) -> None:
        self._total, self._done = total_bytes, 0
        self._lock = threading.Lock()
        self._start = self._last_line = time.monotonic()
        columns = (TextColumn("copying shards"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        is_shown = total_bytes > 0 and _console.is_terminal
        self._progress = Progress(*columns, *times, console=_console, disable=not is_shown)
        self._task = self._progress.add_task("", total=total_bytes)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, size: int) -> None:
        """Counts bytes, from any thread."""
        with self._lock:
            self._done += size
        self._progress.advance(self._task, size)

    def each_done(self, futures: Iterable[Future[Outcome]]) -> Iterator[Future[Outcome]]:
        """The futures as they get done."""
        left = set(futures)
        while left:
            done, left = wait(left, timeout=_LINE_SECONDS, return_when=FIRST_COMPLETED)
            self._print_line()
            yield from done

    def _print_line(self) -> None:
        now = time.monotonic()
        if _console.is_terminal or _node() or now - self._last_line < _LINE_SECONDS:
            return
        self._last_line = now
        speed = self._done / (now - self._start)
        minutes = f"{(self._total - self._done) / speed / 60:.0f} min left" if speed else "no end in sight"
        print(f"copying shards: {_gigabytes(self._done)} of {_gigabytes(self._total)}, {minutes}", flush=True)


def _print_report(report: Report, place: str, folder: Path) -> None:
    copied, there, no_room = (report.shards[o] for o in (Outcome.copied, Outcome.there, Outcome.no_room))
    sizes = {outcome: _gigabytes(size) for outcome, size in report.size.items()}
    speed = report.size[Outcome.copied] / max(report.seconds, 1e-3) / 1e6
    parts = [f"copied {copied} shards ({sizes[Outcome.copied]}, {report.seconds:.0f} s, {speed:.0f} MB/s)"]
    parts += [f"{there} were there ({sizes[Outcome.there]})"] if there else []
    if no_room:
        parts.append(f"{no_room} do not fit and stay where they are ({sizes[Outcome.no_room]})")
    parts += [f"{len(report.faults)} left out"] if report.faults else []
    print(f"{os.environ.get('SLURMD_NODENAME') or 'stage'}: {'; '.join(parts)}; in {folder}")
    for fault in report.faults[:_SHOWN]:
        print(f"  left out: {fault}")
    if len(report.faults) > _SHOWN:
        print(f"  and {len(report.faults) - _SHOWN} more")
    if _node() == 0:
        print(
            f"Next: muybridge train with {STAGED_VARIABLE}={place} in its environment; the copies stay for later runs.",
            flush=True,
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _node() -> int:
    """The number of this machine, of which each runs one process."""
    return int(os.environ.get("SLURM_PROCID", "0"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
