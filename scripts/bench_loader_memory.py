"""The resident memory of decoding processes over thousands of small clips: of one that is never renewed, and as in training."""

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
    """Measure, print and write the figures; returns 1 where a process, or what its successors come to, grows too much."""
    parser = argparse.ArgumentParser(prog="python -m muybridge.scripts.bench_loader_memory", description=__doc__)
    parser.add_argument("--decodes", type=int, default=10_000, help="clips that each decoder reads (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(argv)
    result = measure_worker_memory(options.decodes)
    print_worker_memory(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"muybridge: wrote {options.json}")
    growths = ("growth_until_renewal", "growth_with_renewal")
    return int(any(case[growth] > ALLOWED_GROWTH for case in result["cases"].values() for growth in growths))


def print_worker_memory(result: dict[str, Any]) -> None:
    """Prints the figures of `measure_worker_memory` as tables."""
    decodes, settled = result["decodes"], result["settled_after"]
    table = Table(title="resident memory of one decoding process that is never renewed")
    renewal = result["requests_per_process"]
    grown = f"growth in {renewal}"
    for column in ("clips", f"MiB after {settled}", f"MiB after {decodes}", "growth", "bytes a clip", grown):
        table.add_column(column, justify="right")
    for name, case in result["cases"].items():
        sizes = (f"{case[key] / 2**20:.1f}" for key in ("settled_bytes", "final_bytes"))
        rest = f"{case['growth_without_renewal']:+.2%}", f"{case['bytes_per_decode']:.0f}"
        table.add_row(name, *sizes, *rest, f"{case['growth_until_renewal']:+.2%}")
    Console().print(table)
    table = Table(title=f"resident memory of a decoding process that is renewed every {renewal} clips, as in training")
    for column in ("clips", "highest MiB of each process", "last process to first"):
        table.add_column(column, justify="right")
    for name, case in result["cases"].items():
        peaks = ", ".join(f"{peak / 2**20:.1f}" for peak in case["peak_bytes_of_processes"])
        table.add_row(name, peaks, f"{case['growth_with_renewal']:+.2%}")
    Console().print(table)


def measure_worker_memory(decodes: int) -> dict[str, Any]:
    """Resident bytes over so many decodes: by decord, by PyAV, and of files of which every second is damaged.

    Each once in a process that is never renewed, whose growth counts from a tenth of the decodes on, when libraries are loaded and
    allocators have settled; and once with the renewal of training, where a process's highest figure is compared with that of the
    first one, over the same stretch of their lives. With fewer decodes than two lives, a life is half of them.
    """
    files = _h264_files()
    cases = {
        "decord": (Decoder.decord, files),
        "pyav": (Decoder.pyav, files),
        "damaged": (Decoder.decord, [part for file in files for part in (file, _cut(file), file, _overwritten(file))]),
    }
    life = max(1, min(REQUESTS_PER_PROCESS, decodes // 2))
    with Progress(console=Console(stderr=True)) as progress:
        return {
            "decodes": decodes,
            "settled_after": decodes // 10,
            "requests_per_process": life,
            "cases": {name: _measure(*case, decodes, life, name, progress) for name, case in cases.items()},
            "versions": {name: version(name) for name in ("av", "decord", "numpy")},
            "python": sys.version.split()[0],
        }


def _measure(
    decoder: Decoder, files: list[bytes], decodes: int, life: int, name: str, progress: Progress
) -> dict[str, Any]:
    began = time.perf_counter()
    sizes, unreadable = _sizes(decoder, files, decodes, decodes + 1, progress, f"{name}, never renewed")
    seconds = time.perf_counter() - began
    renewed, _ = _sizes(decoder, files, decodes, life, progress, f"{name}, renewed")
    peaks = [max(renewed[start : start + life]) for start in range(0, decodes - life + 1, life)]
    every = max(1, decodes // 100)
    settled, final = sizes[decodes // 10 - 1], sizes[-1]
    counts = np.arange(decodes // 10, decodes + 1, every)
    # The slope of a line through all that follows: a single figure goes up and down with what the allocator gives back.
    slope = float(np.polyfit(counts, np.array(sizes)[counts - 1], 1)[0])
    return {
        "settled_bytes": settled,
        "final_bytes": final,
        "growth_without_renewal": final / settled - 1,
        "bytes_per_decode": slope,
        "growth_until_renewal": slope * life / settled,
        "peak_bytes_of_processes": peaks,
        "growth_with_renewal": peaks[-1] / peaks[0] - 1,
        "unreadable": unreadable,
        "decodes_per_second": round(decodes / seconds, 1),
        "resident_bytes_without_renewal": sizes[every - 1 :: every],
        "resident_bytes_with_renewal": renewed[every - 1 :: every],
    }


def _sizes(
    decoder: Decoder, files: list[bytes], decodes: int, requests_per_process: int, progress: Progress, name: str
) -> tuple[list[int], int]:
    # Resident bytes after each decode, and how many files were unreadable.
    spot = Spot(0, 0, (_FRAMES, _HEIGHT, _WIDTH, 3))
    ring = FrameRing(1, spot.size)
    place = ring.acquire()
    assert place == spot.place
    process = WorkerProcess(ring=ring, requests_per_process=requests_per_process)
    request = {
        "times_seconds": frame_times(_FRAMES, fps=_FPS),
        "seekable": True,
        "decoder": decoder.value,
        "height": _HEIGHT,
        "width": _WIDTH,
        "crop_x": 0.5,
        "crop_y": 0.5,
    }
    sizes = []
    unreadable = 0
    task = progress.add_task(name, total=decodes)
    for number in range(1, decodes + 1):
        try:
            process.call("decode_clip", request, timeout_seconds=60.0, data=files[number % len(files)], out=spot)
        except DecodeError:
            unreadable += 1
        sizes.append(psutil.Process(process.pid).memory_info().rss)
        progress.advance(task)
    assert process.crashes == process.timeouts == 0, "a new process would start from a small size"
    assert process.recycled == decodes // requests_per_process
    process.kill()
    ring.close()
    return sizes, unreadable


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
