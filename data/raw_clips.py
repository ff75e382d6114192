"""Encoded videos and still images as a source of training clips: which rows fit, and how one is read."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import torch

from . import worker
from .config import DataConfig
from .decode import Decoder, frame_times, has_decoder
from .index import ClipIndex
from .media_bytes import read_media
from .pixels import to_pixels
from .plan import keyed_uniform
from .row_filter import select_rows
from .workers import WorkerDied, WorkerPool

_log = logging.getLogger(__name__)
_SLACK_TOLERANCE_SECONDS = 1e-3  # durations are rounded in some containers


class RawClips:
    """Reads clips as frames uint8 [T, H, W, 3]; every draw is keyed by (seed, row, pass)."""

    def __init__(self, index: ClipIndex, config: DataConfig, *, seed: int) -> None:
        self._index = index
        self._config = config
        self._seed = seed
        self._lock = threading.Lock()
        self.pool = WorkerPool(config.workers, timeout_seconds=config.timeout_seconds) if config.workers else None
        self.counts = {"fallback_decodes": 0, "decoder_crashes": 0}
        # A clip's last frame must start no later than the video's last frame.
        span = (config.frames - 1) / config.fps
        durations = index.column("duration_seconds")
        last_starts = durations - index.column("fps_denominator") / index.column("fps_numerator")
        self._slack_seconds = last_starts - span
        is_chosen = np.zeros(len(index), dtype=bool)
        is_chosen[select_rows(index, config.filter or "")] = True
        is_long_enough = self._slack_seconds >= -_SLACK_TOLERANCE_SECONDS
        has_frames = np.ones(len(index), dtype=bool) if config.frames == 1 else ~index.column("is_image")
        self.rows = np.flatnonzero(is_chosen & has_frames & is_long_enough)
        reasons = {
            f"not in data.filter={config.filter!r}": ~is_chosen,
            f"still images, which have no {config.frames} frames": is_chosen & ~has_frames,
            f"too short for {config.frames} frames at {config.fps:g} fps": is_chosen & has_frames & ~is_long_enough,
        }
        self.excluded = {reason: np.flatnonzero(rows) for reason, rows in reasons.items() if rows.any()}

    def read(self, row: int, pass_number: int | None) -> np.ndarray:
        """Frames of a row, uint8 [T, H, W, 3]; without a pass, the middle of the clip and of the picture.

        Raises DecodeError, DatasetChangedError and OSError, see `media_bytes.read_media`.
        """
        start, crop_x, crop_y = (
            (0.5, 0.5, 0.5)
            if pass_number is None
            else (keyed_uniform(self._seed, purpose, row, pass_number) for purpose in ("start", "crop_x", "crop_y"))
        )
        clip, config = self._index.clip(row), self._config
        # Read here and not in the decoding process, whose time limit is for decoding: a slow storage is no fault of the clip.
        data = read_media(
            self._index.shard_names[clip.shard],
            key=clip.key,
            offset=clip.offset,
            size=clip.size,
            checksum=clip.checksum,
        )
        request = {
            "data": data,
            "times_seconds": frame_times(
                config.frames, fps=config.fps, start_seconds=start * max(0.0, float(self._slack_seconds[row]))
            ),
            "seekable": clip.seekable,
            "decoder": config.decoder.value,
            "height": config.height,
            "width": config.width,
            "crop_x": crop_x,
            "crop_y": crop_y,
        }
        result, payload = self._run(request)
        if result["decoder"] != config.decoder.value:
            with self._lock:
                self.counts["fallback_decodes"] += 1
        return np.frombuffer(payload, dtype=np.uint8).reshape(config.frames, config.height, config.width, 3)

    def _run(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes | bytearray]:
        if self.pool is None:
            return worker.decode_clip(**request)
        try:
            return self.pool.call("decode_clip", **request)
        except WorkerDied as error:
            with self._lock:
                self.counts["decoder_crashes"] += 1
            # Once more in a fresh process, with the decoder that is less easily crashed.
            _log.warning("%s; trying once more", error)
            safer = Decoder.pyav if has_decoder(Decoder.pyav) else self._config.decoder
            return self.pool.call("decode_clip", **{**request, "decoder": safer.value})

    def assemble(self, clips: list[np.ndarray | None]) -> dict[str, torch.Tensor]:
        """The fields of a `VideoBatch` that the clips fill; None stands for a ghost."""
        config = self._config
        blank = np.zeros((config.frames, config.height, config.width, 3), dtype=np.uint8)
        pixels = to_pixels(np.stack([blank if clip is None else clip for clip in clips]))
        for place, clip in enumerate(clips):
            if clip is None:
                pixels[place] = 0.0
        return {"pixels": pixels}

    def close(self) -> None:
        """Ends the decoding processes."""
        if self.pool is not None:
            self.pool.close()
