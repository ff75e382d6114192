"""`muybridge encode`: what the frozen models make of every clip and caption, computed once and cached as shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data.buckets import NO_BUCKET, Bucket
from ..data.config import Access, DataConfig, single_clips
from ..data.decode import DecodeError
from ..data.draws import MIDDLE
from ..data.frame_ring import FrameRing, Spot
from ..data.index import ClipIndex, read_manifest
from ..data.latent_cache import LatentBucket, cache_description
from ..data.latent_writer import EncodedClip, LatentWriter
from ..data.ledger import MAX_IN_A_ROW, DataBudgetError
from ..data.media_bytes import DatasetChangedError
from ..data.open_dataset import open_datasets
from ..data.pixels import to_pixels
from ..data.raw_clips import RawClips
from ..data.read_ahead import ReadAhead
from ..data.storage import TransientReadError
from ..data.workers import WorkerPool
from ..models.text import Umt5TextEncoder, text_fingerprint
from ..models.vae import VideoVAE
from ..models.vae.folder import load_vae, vae_fingerprint
from ..train.config import TaskKind, TrainConfig, load_train_config
from ..train.exit_codes import ExitCode
from .dataset_commands import console, say

USAGE = """\
usage: muybridge encode +experiment=NAME [KEY=VALUE ...] [--overwrite]
       torchrun --nproc-per-node N -m muybridge.scripts.cli encode +experiment=NAME [KEY=VALUE ...]

Encode data.path (and validation.path, where it is set) with the autoencoder vae.path, and its captions with a frozen text encoder
text.path, into data.latents. A run with data.access=latents trains from there: the same clips in the same order, without decoding
and encoding them at every step. Takes the settings of `muybridge train`.

Each of several processes (RANK of WORLD_SIZE, as torchrun sets them; they need not run at the same time) encodes every N-th shard.
Run a stopped command again to go on: whole shards are kept. A folder with latents of other models, clips or settings is refused;
--overwrite replaces them."""

# Of one forward: as many pixels as one clip of 81 x 480 x 832, and no more clips than fill a CPU or GPU.
BATCH_PIXELS, BATCH_CLIPS = 33_000_000, 16
CAPTIONS_AT_A_TIME = 16
BATCHES_AHEAD = 2
SHOWN_FAILURES = 5


def main(argv: list[str]) -> int:
    """Encode; returns the exit code. Raises ValueError for settings or a dataset that cannot be used."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    overwrite = "--overwrite" in argv
    settings = [argument for argument in argv if argument != "--overwrite"]
    config = load_train_config(settings)
    if config.task is not TaskKind.text_to_video:
        raise ValueError(f"task={config.task.name} must be text_to_video: a VAE learns from pixels")
    if not config.data.latents:
        raise ValueError("data.latents must name the folder for the latents")
    caches = _caches(config)
    if config.dry_run:
        for folder, data in caches.items():
            print(f"muybridge: would encode {data.path} into {folder}")
        print("muybridge: nothing was started")
        return 0
    rank, world_size = _place()
    encoder = ClipEncoder(config, _device())
    has_finished = False
    try:
        for folder, data in caches.items():
            has_finished |= encode_dataset(data, folder, encoder, rank=rank, world_size=world_size, overwrite=overwrite)
    except TransientReadError as error:
        return _fail(f"{error}; the same command goes on from there", ExitCode.requeue)
    except DatasetChangedError as error:  # on the rank that reads the clip
        return _fail(str(error), ExitCode.config)
    except DataBudgetError as error:
        return _fail(str(error), ExitCode.data_budget)
    except torch.OutOfMemoryError as error:
        return _fail(f"out of memory ({error})", ExitCode.out_of_memory)
    if (rank == 0 or has_finished) and all(
        (manifest := read_manifest(folder)) and manifest["complete"] for folder in caches
    ):
        access = [] if config.data.access is Access.latents else ["data.access=latents"]
        say(f"Next: muybridge train {' '.join([*settings, *access])}")
    return 0


class ClipEncoder:
    """The frozen models of a run, read when the first clip needs them."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Raises ValueError where a model's folder is missing."""
        assert config.vae.path is not None
        self._config, self._device = config, device
        self.vae_fingerprint = vae_fingerprint(config.vae.path)
        self.text_fingerprint = text_fingerprint(config.text)

    @cached_property
    def _vae(self) -> VideoVAE:
        assert self._config.vae.path is not None
        return load_vae(self._config.vae.path).to(self._device).eval()

    @cached_property
    def _umt5(self) -> Umt5TextEncoder:
        return Umt5TextEncoder(self._config.text).to(self._device)

    @property
    def text_bytes(self) -> int:
        """About what a caption's features take; captions are seldom as long as they may be."""
        return 0 if self.text_fingerprint is None else 2 * self._config.text.dim * self._config.text.max_tokens // 4

    def latent_bucket(self, bucket: Bucket) -> LatentBucket:
        """The shape of the latents of a bucket's clips."""
        shape = self._config.vae.resolved().latent_shape(bucket.frames, bucket.height, bucket.width)
        return LatentBucket(bucket.name, shape)

    @torch.no_grad()
    def latents(self, frames: list[np.ndarray]) -> torch.Tensor:
        """Clips uint8 [T, H, W, 3] to their normalised latent means [B, z, T', H', W'], bfloat16 of a float32 computation."""
        pixels = to_pixels(torch.from_numpy(np.stack(frames)).to(self._device))
        return self._vae.normalise(self._vae.encode_chunked(pixels).mode()).to("cpu", torch.bfloat16)

    def text(self, captions: list[str]) -> list[torch.Tensor]:
        """Features bfloat16 [S, D] of each caption."""
        found = []
        for start in range(0, len(captions), CAPTIONS_AT_A_TIME):
            part = self._umt5.encode_unpadded(captions[start : start + CAPTIONS_AT_A_TIME])
            found += [features.to("cpu", torch.bfloat16) for features in part]
        return found


def encode_dataset(
    data: DataConfig,
    folder: Path,
    encoder: ClipEncoder,
    *,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
) -> bool:
    """Writes this process's share of what is missing in the latent cache `folder`; the last process finishes it.

    Returns whether this process did. Raises ValueError, TransientReadError, and DataBudgetError where nothing can be decoded.
    """
    buckets = single_clips(data)
    [dataset] = open_datasets(data, buckets)
    bucket_of_row = np.full(len(dataset.index), NO_BUCKET, dtype=np.int16)
    for place, rows in enumerate(dataset.rows.rows):
        bucket_of_row[rows] = place
    writer = LatentWriter(
        folder,
        dataset.index,
        cache_description(
            dataset.index, data, vae_fingerprint=encoder.vae_fingerprint, text_fingerprint=encoder.text_fingerprint
        ),
        bucket_table=[encoder.latent_bucket(bucket) for bucket in buckets],
        bucket_of_row=bucket_of_row,
        text_bytes=encoder.text_bytes,
        overwrite=overwrite,
    )
    if encoder.text_fingerprint is not None and not writer.has_empty_text:
        writer.write_empty_text(encoder.text([""])[0])
    if not writer.missing_shards() and writer.close() is not None:
        if rank == 0:
            say(f"{folder} is complete and fits; kept")
        return False
    pool = ring = None
    if data.workers:
        ring = FrameRing(BATCHES_AHEAD + 1, max(_batch_size(bucket) * bucket.clip_bytes for bucket in buckets))
        pool = WorkerPool(data.workers, timeout_seconds=data.timeout_seconds, ring=ring)
    raw = RawClips(dataset.index, data, pool=pool, ring=ring)
    try:
        _Share(writer, encoder, raw, pool, ring, buckets, bucket_of_row).write(rank, world_size)
    finally:
        if pool is not None and ring is not None:
            pool.close()
            ring.close()
    index = writer.close()
    if index is not None:
        _say_written(index, writer, encoder)
    elif rank == 0:
        left = len(writer.missing_shards())
        say(
            f"This process has written its shards of {folder}; {left} are left to the others, the last of which finishes it."
        )
    return index is not None


_ReadRow = tuple[int, np.ndarray | DecodeError]


@dataclass(frozen=True)
class _Share:
    """One process's part of the work on a cache."""

    writer: LatentWriter
    encoder: ClipEncoder
    raw: RawClips
    pool: WorkerPool | None
    ring: FrameRing | None
    buckets: list[Bucket]
    bucket_of_row: np.ndarray

    def write(self, rank: int, world_size: int) -> None:
        """Write the shards of this process that are missing. Raises DataBudgetError."""
        missing, mine = set(self.writer.missing_shards()), self.writer.shards_of(rank, world_size)
        todo = [shard for shard in mine if shard in missing]
        clips_of = {shard: len(self.writer.rows(shard)) for shard in mine}
        columns = (TextColumn("encoding {task.description}"), BarColumn(), MofNCompleteColumn())
        columns_of_time = (TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *columns_of_time, console=console, disable=rank != 0) as progress:
            done = sum(clips_of[shard] for shard in mine if shard not in missing)
            bar = progress.add_task(self.writer.folder.name, total=sum(clips_of.values()), completed=done)
            ahead = ReadAhead(self._frames_shape, pool=self.pool, ring=self.ring, prefetch=BATCHES_AHEAD)
            batches = ([batch] for shard in todo for batch in self._batches(shard))
            encoding = ahead(batches, self._read, self._encode)
            unreadable_in_a_row = 0
            for shard in todo:
                encoded: dict[int, EncodedClip] = {}
                while len(encoded) < clips_of[shard]:
                    for clip in next(encoding):
                        encoded[clip.row] = clip
                        unreadable_in_a_row = unreadable_in_a_row + 1 if clip.latents is None else 0
                        if unreadable_in_a_row == MAX_IN_A_ROW:
                            raise DataBudgetError(
                                f"{unreadable_in_a_row} clips of {self.raw.index.folder} in a row cannot be read, the last one, "
                                f"{self.raw.index.text('key', clip.row)}, because: {clip.reason}"
                            )
                        progress.advance(bar)
                self.writer.write_shard(shard, (encoded[row] for row in self.writer.rows(shard).tolist()))

    def _batches(self, shard: int) -> Iterator[list[int]]:
        """Its rows in groups of one shape."""
        rows = self.writer.rows(shard)
        for place, bucket in enumerate(self.buckets):
            size, alike = _batch_size(bucket), rows[self.bucket_of_row[rows] == place]
            for start in range(0, len(alike), size):
                yield alike[start : start + size].tolist()

    def _frames_shape(self, row: int) -> tuple[int, int, int, int]:
        bucket = self.buckets[self.bucket_of_row[row]]
        return bucket.frames, bucket.height, bucket.width, 3

    def _read(self, row: int, spot: Spot | None) -> _ReadRow:
        try:
            return row, self.raw.read(row, self.buckets[self.bucket_of_row[row]], MIDDLE, spot)
        except DecodeError as error:
            return row, error

    def _encode(self, groups: list[list[_ReadRow]]) -> list[EncodedClip]:
        [clips] = groups
        encoded = [EncodedClip(row, None, reason=str(error)) for row, error in clips if isinstance(error, DecodeError)]
        readable = {row: frames for row, frames in clips if isinstance(frames, np.ndarray)}
        if not readable:
            return encoded
        has_text = self.encoder.text_fingerprint is not None
        captions = [self.raw.index.captions(row) if has_text else [] for row in readable]
        features = iter(self.encoder.text([caption for choices in captions for caption in choices]))
        latents = self.encoder.latents(list(readable.values()))
        for row, choices, clip in zip(readable, captions, latents, strict=True):
            encoded.append(EncodedClip(row, clip, text=[next(features) for _ in choices]))
        return encoded


def _batch_size(bucket: Bucket) -> int:
    return max(1, min(BATCH_CLIPS, BATCH_PIXELS // (bucket.frames * bucket.height * bucket.width)))


def _say_written(index: ClipIndex, writer: LatentWriter, encoder: ClipEncoder) -> None:
    megabytes = sum(shard["bytes"] for shard in index.manifest["shards"]) / 1e6
    clips = int((index.column("size") > 0).sum())
    what = f"the latents of {clips} clips" + (" and their captions' features" if encoder.text_fingerprint else "")
    shards = f"{len(index.shard_names)} shard{'s' if len(index.shard_names) != 1 else ''}"
    say(f"Wrote {what} ({shards}, {megabytes:.1f} MB) to {index.folder}.")
    if failures := writer.failures():
        shown = "; ".join(f"{key}: {reason}" for _, key, reason in failures[:SHOWN_FAILURES])
        say(
            f"Skipped {len(failures)} clips that cannot be read: {shown}{'; ...' if len(failures) > SHOWN_FAILURES else ''}"
        )
    if not clips:
        raise DataBudgetError(f"{index.folder} holds no latents: not one clip of its dataset can be read")


def _caches(config: TrainConfig) -> dict[Path, DataConfig]:
    """The folder of each cache, with the settings of the one dataset that it is made from."""
    alone = replace(config.data, access=Access.raw, datasets={}, image_share=None)
    root = Path(config.data.latents or "")
    caches = {
        root / "train" / name: replace(alone, path=dataset.path, filter=dataset.filter)
        for name, dataset in config.data.sources().items()
    }
    if config.validation.path is not None:
        caches[root / "validation"] = replace(alone, path=config.validation.path)
    return caches


def _place() -> tuple[int, int]:
    """This process's number and how many there are."""
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank} must be in 0..WORLD_SIZE-1, and WORLD_SIZE is {world_size}")
    return rank, world_size


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _fail(message: str, code: int) -> int:
    print(f"muybridge: {message}", file=sys.stderr)
    return code
