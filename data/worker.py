"""The program of a decoding process: `python -m muybridge.data.worker`, driven by `workers.py` over its pipes.

It reads requests from stdin and answers on stdout; a message is a JSON header and raw bytes behind it. It holds no state, so it
can be killed and replaced at any time. It does not import torch, which would take longer to load than most clips to decode.
"""

from __future__ import annotations

import gc
import io
import json
import math
import mmap
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .decode import DecodeError, Decoder, read_frames_with_fallback
from .images import is_image, read_image
from .media_info import index_fields, inspect_clip, inspect_media, inspect_range
from .mp4 import write_mp4
from .resize import cover_crop
from .scenes import inspect_scenes
from .synthetic import FPS, draw_clip, render_clip

LENGTHS = struct.Struct("<IQ")  # of the header and of the payload, in bytes
# A file of 100 KB can hold frames of gigabytes. Enough for 121 frames of 3840x2160, which the decoders hold twice: at their peak
# PyAV needs 6.2 GB and decord 7.4 GB. A constant, as a limit that knew the machine would have it train on other clips than another.
MEMORY_BYTES = 8 * 2**30
# The second is what a library's thread gets that cannot be started for want of memory (EAGAIN).
_OUT_OF_MEMORY = (MemoryError, BlockingIOError)
_GRACE_SECONDS = 5  # on top of a request's time, in which the parent, if it lives, ends a process that hangs


def synthesize(seed: int, split: str, number: int) -> tuple[dict[str, Any], bytes]:
    """Renders a synthetic clip; answers with what the index keeps of it, and the mp4."""
    clip = draw_clip(seed, split, number)
    file = io.BytesIO()
    write_mp4(file, render_clip(clip), fps=FPS)
    info = index_fields(inspect_media(file.getvalue()))
    return {**info, "caption": clip.caption, "labels": asdict(clip.combination)}, file.getvalue()


def decode_clip(
    data: bytes,
    times_seconds: list[float],
    seekable: bool,
    decoder: str,
    height: int,
    width: int,
    crop_x: float,
    crop_y: float,
    out: np.ndarray | None = None,
) -> tuple[dict[str, Any], bytes]:
    """Decodes a clip; answers with the decoder used and frames uint8 [T, height, width, 3], or writes these to `out`.

    A still image is a clip of one frame, whatever the times.
    """
    if is_image(data):
        frames, used = read_image(data)[None], Decoder(decoder)
    else:
        frames, used = read_frames_with_fallback(data, times_seconds, decoder=Decoder(decoder), seekable=seekable)
    frames = cover_crop(frames, height=height, width=width, crop_x=crop_x, crop_y=crop_y, out=out)
    return {"decoder": used.value}, frames.tobytes() if out is None else b""


OPERATIONS: dict[str, Callable[..., tuple[dict[str, Any], bytes]]] = {
    "inspect_clip": inspect_clip,
    "inspect_range": inspect_range,
    "inspect_scenes": inspect_scenes,
    "synthesize": synthesize,
    "decode_clip": decode_clip,
}


def read_message(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message, or None at the end of the stream."""
    lengths = file.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header_bytes, payload_bytes = LENGTHS.unpack(lengths)
    return json.loads(file.read(header_bytes)), file.read(payload_bytes)


def write_message(file: BinaryIO, header: dict[str, Any], payload: bytes = b"") -> None:
    """Writes one message and flushes."""
    file.write(packed_header(header, len(payload)))
    file.write(payload)
    file.flush()


def packed_header(header: dict[str, Any], payload_bytes: int) -> bytes:
    """What comes before the payload of a message."""
    text = json.dumps(header).encode()
    return LENGTHS.pack(len(text), payload_bytes) + text


def main() -> None:
    """Answers requests until stdin ends. The file of the frame ring, where there is one, is an open file named by argv[1]."""
    _limit_memory()
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # a crash is expected here, and its core would hold the user's clips
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever a native library prints must not land between the answers, nor fill the log with a line for every damaged clip: what
    # there is to say is in the answer.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    ring: np.ndarray | None = None
    write_message(answers, {})  # loaded, and ready for requests
    while (message := read_message(requests)) is not None:
        header, data = message
        arguments = {**header["arguments"], **({"data": data} if header["has_data"] else {})}
        if header["out"] is not None:
            if ring is None:
                ring = np.frombuffer(mmap.mmap(int(sys.argv[1]), 0), dtype=np.uint8)
            start, shape = header["out"]
            arguments["out"] = ring[start : start + math.prod(shape)].reshape(shape)
        # The parent kills a worker that hangs; should the parent be gone, the alarm ends even a hang in native code.
        signal.alarm(int(header["timeout_seconds"]) + _GRACE_SECONDS)
        answer, payload = answer_to(header["operation"], arguments)
        signal.alarm(0)
        write_message(answers, answer, payload)
        # Libraries leave cycles that hold whole files, and Python looks for cycles by their number, not by their size. What is
        # alive between requests stays: not to look at it again makes this cheap.
        del message, header, data, arguments, answer, payload
        gc.collect()
        gc.freeze()


def answer_to(operation: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Runs an operation; its result and payload, or what was wrong: the data, the memory that they need, or our code."""
    try:
        result, payload = OPERATIONS[operation](**arguments)
        return {"result": result}, payload
    except Exception as error:
        if isinstance(error, _OUT_OF_MEMORY) or isinstance(error.__cause__, _OUT_OF_MEMORY):
            return {"exhausted": f"decoding needs more than {MEMORY_BYTES / 2**30:g} GiB of memory"}, b""
        if isinstance(error, DecodeError):
            # Decoders have many words for an allocation that failed, those for damage among them: see what there is to allocate.
            limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
            is_short = limit != resource.RLIM_INFINITY and 2 * _private_bytes() > limit  # without a limit it says -1
            return {"unreadable": str(error), "is_short_of_memory": is_short}, b""
        return {"error": f"{type(error).__name__}: {error}"}, b""


def _private_bytes() -> int:
    # What the limit below counts: as long as `error` lives, also most of what the failed operation had.
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * mmap.PAGESIZE
    except OSError:  # no Linux, so no limit either
        return 0


def _limit_memory() -> None:
    # Of private memory that can be written: the size of the address space says little, as libraries and allocators reserve more
    # of it than they use, and the frame ring is in it as well.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(0)  # the parent is gone
