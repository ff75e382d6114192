"""What the commands that make datasets share: options, progress, what they print, and the check of an output folder."""

from __future__ import annotations

import argparse
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..data.index import ClipIndex, read_manifest
from ..data.shards import remove_dataset
from ..data.tar_samples import CaptionRules, reason_class

Reply = tuple[dict[str, Any], bytearray]
Item = TypeVar("Item")
console = Console(highlight=False)

_SHOWN_EXAMPLES = 3  # of each class of reasons


def say(text: str) -> None:
    """Prints a line as it is."""
    console.print(text, markup=False, soft_wrap=True)


def say_dataset(index: ClipIndex, *, verb: str = "Wrote") -> None:
    """Prints how large a dataset is and where it lies."""
    megabytes = sum(shard["bytes"] for shard in index.manifest["shards"]) / 1e6
    images = int(index.column("is_image").sum())
    minutes = index.column("duration_seconds")[~index.column("is_image")].sum() / 60
    shards = f"{len(index.shard_names)} shard{'s' if len(index.shard_names) != 1 else ''}"
    kinds = f"{minutes:.1f} minutes of video" + (f", {images} images" if images else "")
    say(f"{verb} {len(index)} clips, {kinds}, {shards}, {megabytes:.1f} MB in {index.folder}")


def print_left_out(left_out: Iterable[tuple[str, str]]) -> None:
    """Prints how many samples were left out for each class of reasons, with examples; takes the names and reasons of all."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for name, reason in left_out:
        kind = reason_class(reason)
        counts[kind] += 1
        if counts[kind] <= _SHOWN_EXAMPLES:
            examples.setdefault(kind, []).append(f"{name}: {reason}")
    if not counts:
        return
    table = Table("left out", "samples", "such as", title_justify="left")
    for kind, count in counts.most_common():
        table.add_row(Text(kind), str(count), Text("\n".join(examples[kind])))
    console.print(table)


def is_done(out: Path, descriptions: dict[str, dict[str, Any]], *, own_files: list[str], overwrite: bool) -> bool:
    """Whether `out` holds the finished output of the same command; else clears what is ours, or refuses by ValueError.

    `descriptions` are those of the datasets in `out`, by subfolder; `own_files` lie beside them.
    """
    manifests = {part: read_manifest(out / part) for part in descriptions}
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT={out} must be a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if not any(manifests.values()):
        raise ValueError(f"OUT={out} is not empty, and nothing in it is from this command; choose another folder")
    same = all(m is None or m["description"] == descriptions[part] for part, m in manifests.items())
    if same and not overwrite and all(m is not None and m["complete"] for m in manifests.values()):
        for part in manifests:
            say_dataset(ClipIndex.open(out / part), verb="Already there:")
        say("Nothing to do: an earlier run of this command made it. --overwrite makes it again.")
        return True
    if same and not overwrite:
        say(f"{out} holds the unfinished output of an earlier run of this command: starting again.")
    elif not overwrite:
        made_from = next(m["description"].get("source") for m in manifests.values() if m is not None)
        raise ValueError(
            f"OUT={out} holds an earlier output of this command, made from {made_from} with other files or settings; "
            "--overwrite replaces it"
        )
    for part in descriptions:
        remove_dataset(out / part)
    for name in own_files:
        (out / name).unlink(missing_ok=True)
    return False


def in_order(
    title: str, requests: Iterable[tuple[Item, Future[Reply]]], total: int, *, ahead: int
) -> Iterator[tuple[Item, Future[Reply]]]:
    """Yields requests in their order, `ahead` of them under way, with a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    waiting: deque[tuple[Item, Future[Reply]]] = deque()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        for request in requests:
            waiting.append(request)
            if len(waiting) >= ahead:
                yield waiting.popleft()
                progress.advance(task)
        while waiting:
            yield waiting.popleft()
            progress.advance(task)


def add_sample_options(parser: Any) -> None:
    """Adds the options that `caption_rules` reads, and others about samples, to a parser or a group of one."""
    parser.add_argument(
        "--caption-field",
        metavar="PATH",
        help="read captions from NAME.json at this field, a.b for nested ones, also in lists; of a list all are kept (default: "
        "NAME.txt, else NAME.caption, else the field `caption` of NAME.json)",
    )
    parser.add_argument(
        "--default-caption", metavar="TEXT", help="for samples without a caption, '' for none (default: leave them out)"
    )
    parser.add_argument(
        "--allow-duplicates",
        choices=["first"],
        help="keep the first of two members of one name in a tar (default: an error)",
    )
    parser.add_argument("--quality", action="store_true", help="measure luma, sharpness and motion, for filters")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="leave out a file that takes longer to decode (default: %(default)s)",
    )


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Adds the number of decoding processes."""
    parser.add_argument(
        "--workers", type=positive, default=default_workers(), help="decoding processes (default: %(default)s)"
    )


def caption_rules(arguments: argparse.Namespace) -> CaptionRules:
    """The rules that the options of `add_sample_options` state."""
    return CaptionRules(
        field=arguments.caption_field,
        default=arguments.default_caption,
        first_of_duplicates=arguments.allow_duplicates == "first",
    )


def positive(text: str) -> int:
    """The type of an option that must be a positive whole number."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return value


def default_workers() -> int:
    """As many decoding processes as there are processors for us, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    return min(8, usable)
