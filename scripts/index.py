"""`muybridge index SRC [OUT]`: an index over WebDataset tars that are already there, which are left as they are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from ..data.index import ClipIndex
from ..data.indexing import REPORT_NAME, IndexReport, IndexSettings, Progress, build_index, check_target, is_up_to_date
from ..data.storage import is_remote
from ..data.tar_samples import CAPTION_EXTENSIONS, MEDIA_EXTENSIONS
from .dataset_commands import add_sample_options, add_workers_option, caption_rules, console, print_left_out, say

_SHOWN_WARNINGS = 10


def main(argv: list[str]) -> int:
    """Runs the command. Raises ValueError for a user's mistake, which the `muybridge` command prints."""
    arguments = _parser().parse_args(argv)
    out = arguments.out or _default_out(arguments.src)
    settings = IndexSettings(
        captions=caption_rules(arguments), decode=not arguments.no_decode, quality=arguments.quality
    )
    index_shards(
        arguments.src,
        out,
        settings=settings,
        workers=arguments.workers,
        timeout_seconds=arguments.timeout,
        max_rejected_share=arguments.max_rejected,
        skip_damaged=arguments.skip_damaged_shards,
    )
    return 0


def index_shards(
    source: str,
    out: Path,
    *,
    settings: IndexSettings,
    workers: int,
    timeout_seconds: float,
    max_rejected_share: float,
    skip_damaged: bool,
) -> ClipIndex:
    """Indexes shards with a progress bar, and says what was left out. Raises ValueError as `indexing.build_index` does."""
    check_target(source, out)
    if is_up_to_date(source, out, settings):
        index = ClipIndex.open(out)
        say(f"{out} holds the index of {len(index)} clips in {len(index.shard_names)} shards; nothing changed.")
        say("Nothing to do.")
        return index
    with _Bar() as bar:
        try:
            index, report = build_index(
                source,
                out,
                settings=settings,
                workers=workers,
                timeout_seconds=timeout_seconds,
                max_rejected_share=max_rejected_share,
                skip_damaged=skip_damaged,
                progress=bar,
            )
        finally:
            bar.stop()
    _print_report(report)
    minutes = index.column("duration_seconds")[~index.column("is_image")].sum() / 60
    images = int(index.column("is_image").sum())
    kinds = f"{minutes:.1f} minutes of video" + (f", {images} images" if images else "")
    read = f"read {report.read_shards} of {report.shards} shards" + (
        ", the others had not changed" if report.read_shards < report.shards - len(report.damaged) else ""
    )
    say(f"Wrote the index of {len(index)} clips ({kinds}) to {out}; {read}.")
    if report.rejections:
        say(f"Left out {len(report.rejections)}; the reasons are in {out / REPORT_NAME}.")
    say(f"Next: muybridge train +experiment=NAME data.path={out}")
    return index


class _Bar(Progress):
    def __init__(self) -> None:
        columns = (
            TextColumn("reading shards"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = ProgressBar(*columns, console=console)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, total_bytes: int) -> None:
        self._task = self._progress.add_task("", total=total_bytes)
        self._progress.start()

    def advance(self, done_bytes: int) -> None:
        self._progress.advance(self._task, done_bytes)

    def stop(self) -> None:
        self._progress.stop()


def _print_report(report: IndexReport) -> None:
    warnings = [f"left out: {name}: {reason}" for name, reason in report.damaged.items()] + report.warnings
    for warning in warnings[:_SHOWN_WARNINGS]:
        say(f"warning: {warning}")
    if len(warnings) > _SHOWN_WARNINGS:
        say(f"and {len(warnings) - _SHOWN_WARNINGS} more warnings")
    print_left_out((f"{rejection.key} in {rejection.shard}", rejection.reason) for rejection in report.rejections)


def _default_out(source: str) -> Path:
    if not is_remote(source) and Path(source).is_dir():
        return Path(source)
    raise ValueError(f"SRC={source} is no local folder, so OUT must say where the index shall be written")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # as any other mistake, and not with argparse's own exit code
        hint = "; quote a pattern, so that the shell leaves it alone" if "unrecognized arguments" in message else ""
        raise ValueError(f"{message}{hint} (see muybridge index --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="muybridge index",
        description=__doc__,
        epilog=f"A sample is KEY.({'|'.join(MEDIA_EXTENSIONS)}) and KEY.({'|'.join(CAPTION_EXTENSIONS)}); the key is the name "
        "up to the first dot after its last slash. Run the command again after a change: only changed shards are read.",
    )
    parser.add_argument(
        "src",
        metavar="SRC",
        help="folder of tars, one tar, or a quoted pattern such as 's3://bucket/shard-{000000..000999}.tar'; local, http(s), or "
        "s3, gs, az, abfs, hf through fsspec",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        nargs="?",
        help="folder to write the index to (default: SRC, if it is a local folder)",
    )
    add_workers_option(parser)
    add_sample_options(parser)
    parser.add_argument(
        "--max-rejected",
        type=_share,
        default=0.5,
        metavar="SHARE",
        help="of samples left out, more is an error (default: 0.5)",
    )
    parser.add_argument(
        "--no-decode",
        action="store_true",
        help="look at the packets of videos only: far faster, but damage inside a packet is found in training",
    )
    parser.add_argument("--skip-damaged-shards", action="store_true", help="leave out shards that cannot be read")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be in 0..1")
    return value
