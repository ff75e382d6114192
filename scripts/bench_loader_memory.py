"""The resident memory of a decoding process over thousands of small clips, without the renewal that it has in training."""

import argparse
import io
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..data.decode import DecodeError, Decoder, frame_times
from ..data.frame_ring import FrameRing, Spot
from ..data.mp4 import write_mp4
from ..data.workers import REQUESTS_PER_PROCESS, WorkerProcess

ALLOWED_GROWTH = 0.02
_FRAMES, _FPS, _HEIGHT, _WIDTH = 9, 8.0, 64, 96  # of the training clip
# Frames, height and width of the files: not all alike, as blocks of one size would find their place again in any allocator. Their
# number divides 100, so that the same file was read last whenever the memory is looked at.
_FILES = [(24, 96, 128), (90, 64, 96), (24, 240, 320), (33, 144, 256), (30, 180, 320)]


def main(argv: list[str]) -> int:
    """Measure, print and write the figures; returns 1 where a process grows too much before it is renewed."""
    parser = argparse.ArgumentParser(prog="python -m muybridge.scripts.bench_loader_memory", description=__doc__)
    parser.add_argument("--decodes", type=int, default=10_000, help="clips that each decoder reads (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(argv)
    result = measure_worker_memory(options.decodes)
    table = Table(title="resident memory of a decoding process")
    for column in (
        "clips",
        f"MiB after {result['settled_after']}",
        f"MiB after {options.decodes}",
        "growth",
        "bytes a clip",
    ):
        table.add_column(column, justify="right")
    for name, case in result["cases"].items():
        settled, final = (f"{case[key] / 2**20:.1f}" for key in ("settled_bytes", "final_bytes"))
        rest = f"{case['growth']:.2%}", f"{case['bytes_per_decode']:.0f}", f"{case['growth_until_renewal']:.2%}"
        table.add_row(name, settled, final, *rest)
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"muybridge: wrote {options.json}")
    return int(any(case["growth_until_renewal"] > ALLOWED_GROWTH for case in result["cases"].values()))


def measure_worker_memory(decodes: int) -> dict[str, Any]:
    """Resident bytes of one process each for decord, for PyAV, and for files of which every second is damaged.

    Growth counts from a tenth of the decodes on, when libraries are loaded and allocators have settled.
    """
    files = _h264_files()
    cases = {
        "decord": (Decoder.decord, files),
        "pyav": (Decoder.pyav, files),
        "damaged": (Decoder.decord, [part for file in files for part in (file, _cut(file), file, _overwritten(file))]),
    }
    with Progress(console=Console(stderr=True)) as progress:
        return {
            "decodes": decodes,
            "settled_after": decodes // 10,
            "requests_per_process": REQUESTS_PER_PROCESS,
            "cases": {name: _measure(decoder, own, decodes, name, progress) for name, (decoder, own) in cases.items()},
            "versions": {name: version(name) for name in ("av", "decord", "numpy")},
            "python": sys.version.split()[0],
        }


def _measure(decoder: Decoder, files: list[bytes], decodes: int, name: str, progress: Progress) -> dict[str, Any]:
    spot = Spot(0, 0, (_FRAMES, _HEIGHT, _WIDTH, 3))
    ring = FrameRing(1, spot.size)
    place = ring.acquire()
    assert place == spot.place
    process = WorkerProcess(ring=ring, requests_per_process=decodes + 1)
    sizes: dict[int, int] = {}
    unreadable = 0
    began = time.perf_counter()
    task = progress.add_task(name, total=decodes)
    for number in range(1, decodes + 1):
        request = {
            "times_seconds": frame_times(_FRAMES, fps=_FPS),
            "seekable": True,
            "decoder": decoder.value,
            "height": _HEIGHT,
            "width": _WIDTH,
            "crop_x": 0.5,
            "crop_y": 0.5,
        }
        try:
            process.call("decode_clip", request, timeout_seconds=60.0, data=files[number % len(files)], out=spot)
        except DecodeError:
            unreadable += 1
        if number % max(1, decodes // 100) == 0:
            sizes[number] = psutil.Process(process.pid).memory_info().rss
            progress.update(task, completed=number)
    seconds = time.perf_counter() - began
    assert process.crashes == process.timeouts == 0, "a new process would start from a small size"
    process.kill()
    ring.close()
    return {
        **_summary(sizes, decodes),
        "unreadable": unreadable,
        "decodes_per_second": round(decodes / seconds, 1),
        "resident_bytes": {str(count): size for count, size in sizes.items()},
    }


def _summary(sizes: dict[int, int], decodes: int) -> dict[str, Any]:
    settled, final = sizes[decodes // 10], sizes[decodes]
    # The slope of a line through all that follows: a single figure goes up and down with what the allocator gives back.
    counts = [count for count in sizes if count >= decodes // 10]
    slope = float(np.polyfit(np.array(counts), np.array([sizes[count] for count in counts]), 1)[0])
    return {
        "settled_bytes": settled,
        "final_bytes": final,
        "growth": final / settled - 1,
        "bytes_per_decode": slope,
        "growth_until_renewal": slope * REQUESTS_PER_PROCESS / settled,
    }


def _h264_files() -> list[bytes]:
    generator = np.random.default_rng(0)
    files = []
    for frames, height, width in _FILES:
        scene = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        file = io.BytesIO()
        write_mp4(file, np.stack([np.roll(scene, 2 * t, axis=1) for t in range(frames)]), fps=15)
        files.append(file.getvalue())
    return files


def _cut(file: bytes) -> bytes:
    return file[: len(file) * 2 // 3]


def _overwritten(file: bytes) -> bytes:
    # In the pictures: the header, which these files have at their end, stays whole.
    start, end = len(file) // 4, len(file) // 2
    return file[:start] + bytes(end - start) + file[end:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
