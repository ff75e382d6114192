"""`muybridge prepare SRC OUT`: captioned videos, or `synthetic` ones, into WebDataset shards and an index."""

from __future__ import annotations

import argparse
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..data.decode import DecodeError, available_decoder, read_frames
from ..data.index import Clip, ClipIndex, read_manifest
from ..data.shards import DatasetWriter, json_labels, remove_dataset, shard_key
from ..data.sources import find_sources, listing_fingerprint
from ..data.synthetic import FPS, FRAMES, HELD_OUT, SIZE
from ..data.workers import WorkerPool

REJECTED_NAME = "rejected.jsonl"
HELD_OUT_NAME = "held_out.json"
PREVIEW_NAME = "preview.png"

_SHOWN_REJECTIONS = 20
_SYNTHETIC_VERSION = 1  # raise it when rendering changes, so that an older output is not taken for the same

Reply = tuple[dict[str, Any], bytearray]
Item = TypeVar("Item")
console = Console(highlight=False)


def main(argv: list[str]) -> int:
    """Runs the command. Raises ValueError for a user's mistake, which the `muybridge` command prints."""
    arguments = _parser().parse_args(argv)
    if arguments.src == "synthetic":
        prepare_synthetic(
            arguments.out,
            clips=arguments.clips,
            test_clips=arguments.test_clips,
            seed=arguments.seed,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
        )
    else:
        prepare_videos(
            Path(arguments.src),
            arguments.out,
            workers=arguments.workers,
            timeout_seconds=arguments.timeout,
            shard_bytes=arguments.shard_megabytes * 1_000_000,
            overwrite=arguments.overwrite,
        )
    return 0


def prepare_videos(
    source: Path, out: Path, *, workers: int, timeout_seconds: float, shard_bytes: int, overwrite: bool
) -> ClipIndex:
    """Checks every video of a folder or table and writes the readable ones as a dataset.

    Raises ValueError if nothing can be written, or `out` holds something else.
    """
    sources = find_sources(source)
    description = {"source": str(source), "listing": listing_fingerprint(sources), "shard_bytes": shard_bytes}
    if _is_done(out, {".": description}, own_files=[REJECTED_NAME], overwrite=overwrite):
        return ClipIndex.open(out)
    rejected = [(s.name, s.fault) for s in sources if s.fault]
    numbered = [(number, s) for number, s in enumerate(sources) if not s.fault]
    with (
        DatasetWriter(out, kind="raw", description=description, shard_bytes=shard_bytes) as writer,
        WorkerPool(workers, timeout_seconds=timeout_seconds) as pool,
    ):
        requests = (
            (
                item,
                pool.submit(
                    "inspect_range", name=str(item[1].path.absolute()), offset=0, size=item[1].path.stat().st_size
                ),
            )
            for item in numbered
        )
        for (number, item), reply in _in_order("checking videos", requests, len(numbered), ahead=4 * workers):
            try:
                info, _ = reply.result()
            except DecodeError as error:
                rejected.append((item.name, str(error)))
                continue
            clip = Clip(key=shard_key(number, Path(item.name).stem), caption=item.caption, **info)
            writer.add(clip, item.path.read_bytes(), extension=item.path.suffix[1:].lower())
    rejected.sort()
    _print_rejections(rejected)
    if not len(writer):
        writer.abandon()
        raise ValueError(f"SRC={source}: none of its {len(sources)} videos can be used, so nothing was written")
    with (out / REJECTED_NAME).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in rejected)
    index = writer.close()
    _print_dataset(index)
    if rejected:
        _print(f"Skipped {len(rejected)}; the reasons are in {out / REJECTED_NAME}.")
    _print(f"Next: muybridge train +experiment=NAME data.path={out}")
    return index


def prepare_synthetic(out: Path, *, clips: int, test_clips: int, seed: int, workers: int, overwrite: bool) -> None:
    """Renders the synthetic dataset: train and test datasets, the list of held-out combinations and a preview.

    Raises ValueError for counts that make no dataset, or if `out` holds something else.
    """
    counts = {"train": clips, "test": test_clips}
    for name, count in (("clips", clips), ("test-clips", test_clips)):
        if count < 1:
            raise ValueError(f"--{name}={count} must be positive")
    descriptions = {
        split: {"source": "synthetic", "version": _SYNTHETIC_VERSION, "split": split, "clips": count, "seed": seed}
        for split, count in counts.items()
    }
    if _is_done(out, descriptions, own_files=[HELD_OUT_NAME, PREVIEW_NAME], overwrite=overwrite):
        return
    indices = {}
    with WorkerPool(workers, timeout_seconds=60.0) as pool:
        for split, count in counts.items():
            requests = ((n, pool.submit("synthesize", seed=seed, split=split, number=n)) for n in range(count))
            with DatasetWriter(out / split, kind="raw", description=descriptions[split]) as writer:
                for number, reply in _in_order(f"rendering {split} clips", requests, count, ahead=8 * workers):
                    info, mp4 = reply.result()
                    labels = info.pop("labels")
                    key = shard_key(number, "_".join(labels.values()))
                    writer.add(Clip(key=key, labels=json_labels(labels), **info), bytes(mp4), extension="mp4")
                indices[split] = writer.close()
    held_out = [asdict(combination) for combination in HELD_OUT]
    (out / HELD_OUT_NAME).write_text(json.dumps(held_out, indent=1) + "\n", encoding="utf-8")
    write_preview(indices["train"], out / PREVIEW_NAME)
    for index in indices.values():
        _print_dataset(index)
    _print(
        f"{len(HELD_OUT)} combinations are in the test clips only ({out / HELD_OUT_NAME}); see {out / PREVIEW_NAME}."
    )
    _print(f"Next: muybridge train +experiment=NAME data.path={out / 'train'}")


def write_preview(index: ClipIndex, path: Path, *, clips: int = 24, columns: int = 4) -> None:
    """A contact sheet: first, middle and last frame of some clips, each above its caption."""
    rows = np.linspace(0, len(index) - 1, min(clips, len(index))).astype(int).tolist()
    tiles = []
    for row in rows:
        clip = index.clip(row)
        with index.shards[clip.shard].open("rb") as file:
            file.seek(clip.offset)
            data = file.read(clip.size)
        duration = (clip.frames - 1) * clip.fps_denominator / clip.fps_numerator
        frames = read_frames(data, [0.0, duration / 2, duration], decoder=available_decoder(), seekable=clip.seekable)
        tiles.append((np.concatenate(list(frames), axis=1), clip.caption))
    height, width = tiles[0][0].shape[:2]
    label, gap = 14, 6  # pixels
    lines = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + label + gap) + gap), (12, 12, 12))
    for number, (strip, caption) in enumerate(tiles):
        x, y = gap + number % columns * (width + gap), gap + number // columns * (height + label + gap)
        sheet.paste(Image.fromarray(strip), (x, y))
        # The text on an image of its own, so that a long caption stops at the tile's edge.
        line = Image.new("RGB", (width, label), (12, 12, 12))
        ImageDraw.Draw(line).text((0, 1), caption, fill=(220, 220, 220))
        sheet.paste(line, (x, y + height))
    sheet.save(path)


def _is_done(out: Path, descriptions: dict[str, dict[str, Any]], *, own_files: list[str], overwrite: bool) -> bool:
    # Whether `out` holds the finished output of the same command; else clears what is ours, or refuses.
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
            _print_dataset(ClipIndex.open(out / part), verb="Already there:")
        _print("Nothing to do: an earlier run of this command made it. --overwrite makes it again.")
        return True
    if same and not overwrite:
        _print(f"{out} holds the unfinished output of an earlier run of this command: starting again.")
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


def _in_order(
    title: str, requests: Iterable[tuple[Item, Future[Reply]]], total: int, *, ahead: int
) -> Iterator[tuple[Item, Future[Reply]]]:
    # Yields requests in their order, a bounded number of them under way, with a progress bar.
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


def _print(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _print_rejections(rejected: list[tuple[str, str]]) -> None:
    if not rejected:
        return
    table = Table("file", "why it is skipped", title=f"{len(rejected)} skipped", title_justify="left")
    for name, reason in rejected[:_SHOWN_REJECTIONS]:
        table.add_row(Text(name), Text(reason))
    if len(rejected) > _SHOWN_REJECTIONS:
        table.add_row("...", f"and {len(rejected) - _SHOWN_REJECTIONS} more")
    console.print(table)


def _print_dataset(index: ClipIndex, *, verb: str = "Wrote") -> None:
    megabytes = sum(shard["bytes"] for shard in index.manifest["shards"]) / 1e6
    minutes = index.column("duration_seconds").sum() / 60
    shards = f"{len(index.shards)} shard{'s' if len(index.shards) != 1 else ''}"
    _print(f"{verb} {len(index)} clips, {minutes:.1f} minutes of video, {shards}, {megabytes:.1f} MB in {index.folder}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # as any other mistake, and not with argparse's own exit code
        raise ValueError(f"{message} (see muybridge prepare --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="muybridge prepare", description=__doc__)
    parser.add_argument(
        "src",
        metavar="SRC",
        help="folder of videos with .txt captions beside them, .csv or .jsonl table, or: synthetic",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write the dataset to")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this command in OUT")
    parser.add_argument(
        "--workers", type=_positive, default=default_workers(), help="decoding processes (default: %(default)s)"
    )
    videos = parser.add_argument_group("videos")
    videos.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="skip a file that takes longer (default: %(default)s)",
    )
    videos.add_argument(
        "--shard-megabytes", type=_positive, default=256, metavar="N", help="size of a shard (default: %(default)s)"
    )
    synthetic = parser.add_argument_group("synthetic", f"clips of {FRAMES} frames at {FPS} fps, {SIZE}x{SIZE} pixels")
    synthetic.add_argument("--clips", type=int, default=2000, metavar="N", help="training clips (default: %(default)s)")
    synthetic.add_argument("--test-clips", type=int, default=200, metavar="N", help="test clips (default: %(default)s)")
    synthetic.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return value


def default_workers() -> int:
    """As many decoding processes as there are processors for us, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    return min(8, usable)
