"""`muybridge prepare SRC OUT`: captioned videos and images, or `synthetic` ones, into WebDataset shards and an index."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..data.decode import DecodeError
from ..data.index import Clip, ClipIndex
from ..data.scenes import check_scene_detection
from ..data.shards import DatasetWriter, shard_key
from ..data.source_media import MediaPlace, MediaPlaces, extension_of
from ..data.sources import Source, find_sources, listing_fingerprint
from ..data.synthetic import FPS, FRAMES, SIZE
from ..data.tar_samples import CaptionRules
from ..data.workers import WorkerPool
from .dataset_commands import (
    Reply,
    add_sample_options,
    add_workers_option,
    caption_rules,
    in_order,
    is_done,
    positive,
    print_left_out,
    say,
    say_dataset,
)
from .prepare_synthetic import prepare_synthetic

REJECTED_NAME = "rejected.jsonl"


@dataclass(frozen=True)
class PrepareOptions:
    """How sources become a dataset."""

    captions: CaptionRules
    shard_bytes: int
    quality: bool = False  # measure luma, sharpness and motion
    scene_split: bool = False  # cut videos at their scene changes

    def described(self) -> dict[str, Any]:
        """What the manifest keeps of them: those that are not usual, so that older outputs stay recognised."""
        extra = {"quality": self.quality, "scene_split": self.scene_split}
        captions = {name: value for name, value in asdict(self.captions).items() if value not in (None, False)}
        return {"shard_bytes": self.shard_bytes, **{k: v for k, v in extra.items() if v}, **captions}


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
            options=PrepareOptions(
                captions=caption_rules(arguments),
                shard_bytes=arguments.shard_megabytes * 1_000_000,
                quality=arguments.quality,
                scene_split=arguments.scene_split,
            ),
            workers=arguments.workers,
            timeout_seconds=arguments.timeout,
            overwrite=arguments.overwrite,
        )
    return 0


def prepare_videos(
    source: Path, out: Path, *, options: PrepareOptions, workers: int, timeout_seconds: float, overwrite: bool
) -> ClipIndex:
    """Checks every video and image of a folder, table or tars and writes the readable ones as a dataset.

    Raises ValueError if nothing can be written, or `out` holds something else.
    """
    if options.scene_split:
        check_scene_detection()
    sources = find_sources(source, options.captions)
    description = {"source": str(source), "listing": listing_fingerprint(sources), **options.described()}
    if is_done(out, {".": description}, own_files=[REJECTED_NAME], overwrite=overwrite):
        return ClipIndex.open(out)
    rejected = [(s.name, s.fault) for s in sources if s.fault]
    usable = [(number, s) for number, s in enumerate(sources) if not s.fault]
    with (
        DatasetWriter(out, kind="raw", description=description, shard_bytes=options.shard_bytes) as writer,
        _spool(out) as spool,
        WorkerPool(workers, timeout_seconds=timeout_seconds) as pool,
    ):
        requests = _requests(usable, spool, pool, options)
        for (number, item, place), reply in in_order("checking media", requests, len(usable), ahead=4 * workers):
            try:
                found, _ = reply.result()
                for suffix, clip_place, fields in _clips_of(found, place):
                    key = shard_key(number, Path(item.name).stem) + suffix
                    _add(writer, item, key, clip_place, fields)
            except DecodeError as error:
                rejected.append((item.name, str(error)))
            if place is not None:
                place.remove_copy()
    rejected.sort()
    print_left_out(rejected)
    if not len(writer):
        writer.abandon()
        raise ValueError(f"SRC={source}: none of its {len(sources)} videos can be used, so nothing was written")
    with (out / REJECTED_NAME).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in rejected)
    index = writer.close()
    say_dataset(index)
    if rejected:
        say(f"Left out {len(rejected)}; the reasons are in {out / REJECTED_NAME}.")
    say(f"Next: muybridge train +experiment=NAME data.path={out}")
    return index


@contextmanager
def _spool(out: Path) -> Iterator[Path]:
    # Copies lie beside the shards, where there is room; those of a run that was killed are removed here.
    spool = out / ".spool"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir()
    try:
        yield spool
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _requests(
    sources: list[tuple[int, Source]], spool: Path, pool: WorkerPool, options: PrepareOptions
) -> Iterator[tuple[tuple[int, Source, MediaPlace | None], Future[Reply]]]:
    places = MediaPlaces(spool)
    for number, source in sources:
        try:
            place = places.place(source)
        except DecodeError as error:
            failed: Future[Reply] = Future()
            failed.set_exception(error)
            yield (number, source, None), failed
            continue
        where: dict[str, Any] = {"name": str(place.path), "offset": place.offset, "size": place.size}
        if options.scene_split:
            reply = pool.submit("inspect_scenes", folder=str(spool), quality=options.quality, **where)
        else:
            reply = pool.submit("inspect_range", quality=options.quality, **where)
        yield (number, source, place), reply


def _clips_of(found: dict[str, Any], place: MediaPlace | None) -> Iterator[tuple[str, MediaPlace, dict[str, Any]]]:
    # The end of the key, the bytes and the fields of each clip that a source gives: several where it is cut into scenes.
    assert place is not None, "what has no place has no answer"
    if "scenes" not in found:
        yield "", place, found
        return
    for number, fields in enumerate(found["scenes"]):
        path = Path(fields.pop("file"))
        scene = MediaPlace(path, 0, path.stat().st_size, is_copy=True)
        suffix = f"_scene{number:04d}" if len(found["scenes"]) > 1 else ""
        yield suffix, scene, {name: value for name, value in fields.items() if name != "start_seconds"}
        scene.remove_copy()


def _add(writer: DatasetWriter, source: Source, key: str, place: MediaPlace, fields: dict[str, Any]) -> None:
    media = place.read()
    choices = json.dumps(source.captions, ensure_ascii=False) if source.captions else ""
    clip = Clip(key=key, caption=source.caption, caption_choices=choices, labels=source.labels, **fields)
    extension = "" if place.is_copy else source.extension
    writer.add(clip, media, extension=extension or extension_of(media))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # as any other mistake, and not with argparse's own exit code
        raise ValueError(f"{message} (see muybridge prepare --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="muybridge prepare", description=__doc__)
    parser.add_argument(
        "src",
        metavar="SRC",
        help="folder of videos or images with captions beside them (NAME.txt), .csv, .jsonl or .parquet table, WebDataset tar or "
        "folder of them, or: synthetic",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write the dataset to")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this command in OUT")
    add_workers_option(parser)
    videos = parser.add_argument_group("videos and images")
    add_sample_options(videos)
    videos.add_argument(
        "--scene-split", action="store_true", help="cut videos at their scene changes (needs PySceneDetect)"
    )
    videos.add_argument(
        "--shard-megabytes", type=positive, default=256, metavar="N", help="size of a shard (default: %(default)s)"
    )
    synthetic = parser.add_argument_group("synthetic", f"clips of {FRAMES} frames at {FPS} fps, {SIZE}x{SIZE} pixels")
    synthetic.add_argument("--clips", type=int, default=2000, metavar="N", help="training clips (default: %(default)s)")
    synthetic.add_argument("--test-clips", type=int, default=200, metavar="N", help="test clips (default: %(default)s)")
    synthetic.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    return parser
