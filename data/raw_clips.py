"""Encoded videos and still images as a source of training clips: how one is read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import worker
from .buckets import Bucket
from .config import DataConfig
from .decode import Decoder, frame_times, has_decoder
from .draws import Draws
from .frame_ring import FrameRing, Spot
from .index import ClipIndex
from .staged import StagedShards
from .workers import WorkerDied, WorkerPool

_log = logging.getLogger(__name__)


def decode_arguments(
    config: DataConfig, bucket: Bucket, draws: Draws, *, last_start_seconds: float, seekable: bool
) -> dict[str, Any]:
    """What `worker.decode_clip` needs besides the data, for a video whose last frame starts at this time."""
    slack_seconds = last_start_seconds - (bucket.frames - 1) / config.fps
    start_seconds = draws.start * max(0.0, slack_seconds)
    return {
        "times_seconds": frame_times(bucket.frames, fps=config.fps, start_seconds=start_seconds),
        "seekable": seekable,
        "decoder": config.decoder.value,
        "height": bucket.height,
        "width": bucket.width,
        "crop_x": draws.crop_x,
        "crop_y": draws.crop_y,
    }


def decode_in(pool: WorkerPool, request: dict[str, Any]) -> tuple[dict[str, Any], bytearray]:
    """`worker.decode_clip` in a process of the pool, once more by PyAV where the process did not survive it. Raises DecodeError.

    decord crashes more easily, and what it holds in memory depends on how busy the machine is: its packets run ahead of its frames.
    """
    try:
        return pool.call("decode_clip", **request)
    except WorkerDied as error:
        _log.warning("%s; trying once more", error)
        safer = Decoder.pyav.value if has_decoder(Decoder.pyav) else request["decoder"]
        return pool.call("decode_clip", **{**request, "decoder": safer})


class RawClips:
    """Reads the clips of one dataset as frames uint8 [T, H, W, 3]."""

    def __init__(
        self, index: ClipIndex, config: DataConfig, *, pool: WorkerPool | None, ring: FrameRing | None = None
    ) -> None:
        """Without a pool, clips are decoded in this process, which a bad stream may crash."""
        self.index = index
        self.counts = {"fallback_decodes": 0}
        self._shards = StagedShards(index, self.counts)
        self._config = config
        self._pool, self._ring = pool, ring
        self._lock = threading.Lock()

    def read(self, row: int, bucket: Bucket, draws: Draws, spot: Spot | None = None) -> np.ndarray:
        """Frames of a row in the shape of the bucket; at a spot of the ring where one is given, which then holds them.

        Raises DecodeError, DatasetChangedError and OSError, see `media_bytes.read_media`.
        """
        clip, config = self.index.clip(row), self._config
        # Read here and not in the decoding process, whose time limit is for decoding: a slow storage is no fault of the clip.
        data = self._shards.read(clip)
        last_start = clip.duration_seconds - clip.fps_denominator / clip.fps_numerator
        arguments = decode_arguments(config, bucket, draws, last_start_seconds=last_start, seekable=clip.seekable)
        result, payload = self._run({"data": data, **arguments, **({} if spot is None else {"out": spot})})
        if result["decoder"] != config.decoder.value:
            with self._lock:
                self.counts["fallback_decodes"] += 1
        if spot is not None and self._ring is not None:
            return self._ring.view(spot)
        return np.frombuffer(payload, dtype=np.uint8).reshape(bucket.frames, bucket.height, bucket.width, 3)

    def _run(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes | bytearray]:
        return worker.decode_clip(**request) if self._pool is None else decode_in(self._pool, request)


def stack_frames(bucket: Bucket, clips: Sequence[np.ndarray | None]) -> dict[str, torch.Tensor]:
    """The fields of a `VideoBatch` that clips of one bucket fill; None stands for a ghost."""
    frames = np.zeros((len(clips), bucket.frames, bucket.height, bucket.width, 3), dtype=np.uint8)
    for place, clip in enumerate(clips):
        if clip is not None:
            frames[place] = clip
    return {"frames": torch.from_numpy(frames)}
