"""The contestants of `muybridge bench loader`, each a program of its own: python -m muybridge.scripts.bench_loader_contestants.

And what they read: real H.264 clips with latents of them, in the same tars for all.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.buckets import Bucket
from ..data.config import Access, DataConfig
from ..data.decode import Decoder
from ..data.resize import cover_crop

BATCH = 8
FIRST_BATCHES = 2  # are not measured
DISTINCT_CLIPS = 16  # the others repeat their bytes, which costs a reader the same
WORK_NAME, SETTINGS_NAME = "work.json", "settings.json"
_TEXT_WIDTH = 4096  # of UMT5-XXL


@dataclass(frozen=True)
class Material:
    """What is read: videos, the training clips cut out of them, and latents beside them."""

    clips: int
    frames: int  # of a video
    height: int
    width: int
    fps: float
    clip_frames: int  # of a training clip
    clip_height: int
    clip_width: int
    clip_fps: float
    latents: dict[str, list[int]]  # latent shapes z, T', H', W' by the name of their cache
    cache_bytes: int  # of each cache, about

    def cached_batches(self, cache: str) -> int:
        """Batches of a cache. Each is read once: what was mapped into memory before would cost less than it does in training."""
        size = 2 * (math.prod(self.latents[cache]) + _TEXT_WIDTH * int(np.mean([_tokens(row) for row in range(80)])))
        return max(FIRST_BATCHES + 1, self.cache_bytes // (size * BATCH))

    def bucket(self) -> Bucket:
        """The training clips and their batch."""
        return Bucket(self.clip_frames, self.clip_height, self.clip_width, global_batch=BATCH, micro_batch=BATCH)

    def config(self, folder: Path, decoder: Decoder = Decoder.decord) -> DataConfig:
        """Settings of a run on the videos."""
        return DataConfig(
            path=str(folder / "videos"),
            frames=self.clip_frames,
            height=self.clip_height,
            width=self.clip_width,
            fps=self.clip_fps,
            decoder=decoder,
            workers=1,
            caption_dropout=0.0,
        )


def write_material(folder: Path, material: Material, progress: Callable[[], None]) -> None:
    """Writes videos, latents, and what the bare loops are to read: the same frames and crops as the loader's plan says."""
    _write_videos(folder, material, progress)
    for name, shape in material.latents.items():
        _write_latents(folder, material, name, shape)
        progress()
    (folder / SETTINGS_NAME).write_text(json.dumps(asdict(material)))


def write_work(folder: Path, material: Material, batches: int) -> None:
    """Row, first second and crop of every sample of the first steps, for the bare loops."""
    from ..data.draws import draw
    from ..data.loader import VideoLoader

    loader = VideoLoader(
        replace(material.config(folder), workers=0), buckets=[material.bucket()], rank=0, world_size=1, seed=0
    )
    slack_seconds = (material.frames - 1) / material.fps - (material.clip_frames - 1) / material.clip_fps
    work = []
    for step in range(batches):
        for slot in loader.plan.slots(step):
            drawn = draw(0, "", slot.row, slot.pass_number, captions=1, caption_dropout=0.0)
            work.append([slot.row, drawn.start * slack_seconds, drawn.crop_x, drawn.crop_y])
    (folder / WORK_NAME).write_text(json.dumps(work))


def _write_videos(folder: Path, material: Material, progress: Callable[[], None]) -> None:
    from ..data.index import Clip
    from ..data.media_info import index_fields, inspect_media
    from ..data.mp4 import write_mp4
    from ..data.shards import DatasetWriter, shard_key

    media: list[bytes] = []
    with DatasetWriter(folder / "videos", kind="raw", description={}, shard_bytes=32 * 2**20) as writer:
        for number in range(material.clips):
            if number < DISTINCT_CLIPS:
                file = io.BytesIO()
                write_mp4(file, _moving_scene(material, number), fps=material.fps)
                media.append(file.getvalue())
                if number == 0:
                    info = index_fields(inspect_media(media[0]))
                progress()
            clip = Clip(key=shard_key(number, "clip"), caption="a scene that moves", **info)
            writer.add(clip, media[number % DISTINCT_CLIPS], extension="mp4")
        writer.close()


def _moving_scene(material: Material, seed: int) -> np.ndarray:
    # uint8 [T, H, W, 3]: smooth colours that pan, with grain, so that vectors and coefficients cost what they do in a film.
    from PIL import Image

    generator = np.random.default_rng(seed)
    size = (2 * material.width, 2 * material.height)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 16, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    fine = Image.fromarray(generator.integers(0, 256, (90, 160, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    scene = (0.6 * np.asarray(coarse) + 0.4 * np.asarray(fine)).astype(np.int16)
    frames = []
    for t in range(material.frames):
        left, top = (round(side * t / (2 * material.frames)) for side in (material.width, material.height))
        view = scene[top : top + material.height, left : left + material.width]
        frames.append((view + generator.integers(-3, 4, view.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def _write_latents(folder: Path, material: Material, name: str, shape: list[int]) -> None:
    import torch

    from ..data.index import Clip
    from ..data.latent_cache import LatentBucket, cache_description
    from ..data.latent_writer import EncodedClip, LatentWriter
    from ..data.shards import DatasetWriter, shard_key

    # A cache is one of videos, of which only their rows are needed here.
    seconds = material.frames / material.fps
    about = Clip(
        "", "a scene that moves", material.frames, 24, 1, seconds, material.width, material.height, seekable=True
    )
    with DatasetWriter(folder / f"rows of {name}", kind="raw", description={}) as rows:
        for row in range(BATCH * material.cached_batches(name)):
            rows.add(replace(about, key=shard_key(row, "clip")), b"video", extension="mp4")
        source = rows.close()
    writer = LatentWriter(
        folder / name,
        source,
        cache_description(source, material.config(folder), vae_fingerprint="none", text_fingerprint="none"),
        bucket_table=[LatentBucket(material.bucket().name, tuple(shape))],
        bucket_of_row=np.zeros(len(source), dtype=np.int16),
    )
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(*shape, generator=generator)
    text = torch.randn(_tokens(row=79), _TEXT_WIDTH, generator=generator)

    def encoded(row: int) -> EncodedClip:
        return EncodedClip(row, latents, text=[text[: _tokens(row)]])

    writer.write_empty_text(text[:1])
    for shard in writer.missing_shards():
        writer.write_shard(shard, map(encoded, writer.rows(shard).tolist()))
    writer.close()


def _tokens(row: int) -> int:
    return 60 + row % 80  # of a caption


def run_bare(folder: Path, material: Material, decoder: Decoder, batches: int) -> None:
    """The least code that decodes and crops the loader's clips, whose bytes lie in memory."""
    from ..data.index import ClipIndex

    index = ClipIndex.open(folder / "videos")
    clips = [index.clip(row) for row in range(len(index))]
    shards = [path.read_bytes() for path in index.shards]
    media = [shards[clip.shard][clip.offset : clip.offset + clip.size] for clip in clips]
    work = json.loads((folder / WORK_NAME).read_text())
    for row, start_seconds, crop_x, crop_y in work[: batches * BATCH]:
        _decoded(media[row], material, decoder, start_seconds, crop_x, crop_y)


def run_webdataset(folder: Path, material: Material, decoder: Decoder, batches: int) -> None:
    """A pipeline that reads the tars in their order, decodes and crops at random places, and batches, in one process."""
    import torch
    import webdataset

    generator = np.random.default_rng(0)
    slack_seconds = (material.frames - 1) / material.fps - (material.clip_frames - 1) / material.clip_fps

    def decode(sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
        start, crop_x, crop_y = generator.random(3)
        frames = _decoded(sample["mp4"], material, decoder, start * slack_seconds, crop_x, crop_y)
        return torch.from_numpy(frames), sample["txt"].decode()

    _exhaust(iter(_tars(webdataset, folder / "videos").map(decode).batched(BATCH)), batches)


def run_webdataset_cached(folder: Path, material: Material, cache: str) -> None:
    """A pipeline that reads the cache's tars in their order, loads the tensors and batches, in one process."""
    import webdataset
    from safetensors.torch import load
    from webdataset.filters import default_collation_fn

    def decode(sample: dict[str, Any]) -> tuple[Any, Any, str]:
        tensors = load(sample["latents.safetensors"])
        return tensors["latents"], tensors["text.0"], sample["txt"].decode()

    def collate(samples: list[tuple[Any, Any, str]]) -> list[Any]:
        latents, text, captions = zip(*samples, strict=True)
        return [default_collation_fn([(tensor,) for tensor in latents])[0], list(text), list(captions)]

    pipeline = _tars(webdataset, folder / cache).map(decode).batched(BATCH, collation_fn=collate)
    _exhaust(iter(pipeline), material.cached_batches(cache))


def run_ours(folder: Path, material: Material, decoder: Decoder, batches: int) -> None:
    """`VideoLoader` with one decoding process."""
    from ..data.loader import VideoLoader

    loader = VideoLoader(material.config(folder, decoder), buckets=[material.bucket()], rank=0, world_size=1, seed=0)
    _exhaust(loader.steps(0), batches)
    assert loader.counts()["fallback_decodes"] == 0, f"{decoder.value} does not read these clips"
    loader.close()


def run_ours_cached(folder: Path, material: Material, cache: str) -> None:
    """`VideoLoader` on the cache."""
    from ..data.loader import VideoLoader

    config = replace(
        material.config(folder), path=str(folder / cache), access=Access.latents, latents=str(folder / cache)
    )
    loader = VideoLoader(
        config,
        buckets=[material.bucket()],
        rank=0,
        world_size=1,
        seed=0,
        vae_fingerprint="none",
        text_fingerprint="none",
    )
    _exhaust(loader.steps(0), material.cached_batches(cache))
    loader.close()


def _tars(webdataset: Any, folder: Path) -> Any:
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).repeat()


def _exhaust(steps: Iterator[Any], batches: int) -> None:
    began = 0.0
    for number in range(batches):
        if number == FIRST_BATCHES:
            began = time.process_time()
        batch = next(
            steps
        )  # the one before lives until here, as it does in a training loop: it decides where memory comes from
    # Of this process alone, so for contestants without others: more exact than a difference of two runs.
    print(time.process_time() - began)
    del batch


def _decoded(
    data: bytes, material: Material, decoder: Decoder, start_seconds: float, crop_x: float, crop_y: float
) -> np.ndarray:
    indices = [int((start_seconds + i / material.clip_fps + 1e-3) * material.fps) for i in range(material.clip_frames)]
    frames = (_decord_frames if decoder is Decoder.decord else _pyav_frames)(data, indices)
    return cover_crop(frames, height=material.clip_height, width=material.clip_width, crop_x=crop_x, crop_y=crop_y)


def _decord_frames(data: bytes, indices: list[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(io.BytesIO(data), num_threads=1).get_batch(indices).asnumpy()


def _pyav_frames(data: bytes, indices: list[int]) -> np.ndarray:
    import av

    wanted = set(indices)
    frames = []
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            if number == indices[-1]:
                break
    return np.stack(frames)


def main(argv: list[str]) -> None:
    """Runs one contestant: FOLDER, its name, the decoder or cache, and for a decoder how many batches.

    Those of a cache print the CPU seconds of all batches but the first.
    """
    folder, name, what, *numbers = Path(argv[0]), *argv[1:]
    material = Material(**json.loads((folder / SETTINGS_NAME).read_text()))
    if name == "bare":
        run_bare(folder, material, Decoder(what), int(numbers[0]))
    elif name == "webdataset":
        run_webdataset(folder, material, Decoder(what), int(numbers[0]))
    elif name == "ours":
        run_ours(folder, material, Decoder(what), int(numbers[0]))
    elif name == "webdataset_cached":
        run_webdataset_cached(folder, material, what)
    else:
        assert name == "ours_cached"
        run_ours_cached(folder, material, what)


if __name__ == "__main__":
    main(sys.argv[1:])
