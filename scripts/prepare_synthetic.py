"""`muybridge prepare synthetic OUT`: the synthetic dataset, with the list of what it holds out and a preview."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..data.decode import available_decoder, read_frames
from ..data.index import Clip, ClipIndex
from ..data.shards import DatasetWriter, json_labels, shard_key
from ..data.synthetic import HELD_OUT
from ..data.workers import WorkerPool
from .dataset_commands import in_order, is_done, say, say_dataset

HELD_OUT_NAME = "held_out.json"
PREVIEW_NAME = "preview.png"

_VERSION = 1  # raise it when rendering changes, so that an older output is not taken for the same


def prepare_synthetic(out: Path, *, clips: int, test_clips: int, seed: int, workers: int, overwrite: bool) -> None:
    """Renders the synthetic dataset: train and test datasets, the list of held-out combinations and a preview.

    Raises ValueError for counts that make no dataset, or if `out` holds something else.
    """
    counts = {"train": clips, "test": test_clips}
    for name, count in (("clips", clips), ("test-clips", test_clips)):
        if count < 1:
            raise ValueError(f"--{name}={count} must be positive")
    descriptions = {
        split: {"source": "synthetic", "version": _VERSION, "split": split, "clips": count, "seed": seed}
        for split, count in counts.items()
    }
    if is_done(out, descriptions, own_files=[HELD_OUT_NAME, PREVIEW_NAME], overwrite=overwrite):
        return
    indices = {}
    with WorkerPool(workers, timeout_seconds=60.0) as pool:
        for split, count in counts.items():
            requests = ((n, pool.submit("synthesize", seed=seed, split=split, number=n)) for n in range(count))
            with DatasetWriter(out / split, kind="raw", description=descriptions[split]) as writer:
                for number, reply in in_order(f"rendering {split} clips", requests, count, ahead=8 * workers):
                    info, mp4 = reply.result()
                    labels = info.pop("labels")
                    key = shard_key(number, "_".join(labels.values()))
                    writer.add(Clip(key=key, labels=json_labels(labels), **info), bytes(mp4), extension="mp4")
                indices[split] = writer.close()
    held_out = [asdict(combination) for combination in HELD_OUT]
    (out / HELD_OUT_NAME).write_text(json.dumps(held_out, indent=1) + "\n", encoding="utf-8")
    write_preview(indices["train"], out / PREVIEW_NAME)
    for index in indices.values():
        say_dataset(index)
    say(f"{len(HELD_OUT)} combinations are in the test clips only ({out / HELD_OUT_NAME}); see {out / PREVIEW_NAME}.")
    say(f"Next: muybridge train +experiment=NAME data.path={out / 'train'}")


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
