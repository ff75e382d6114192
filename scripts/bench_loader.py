"""`muybridge bench loader`: CPU time of reading training clips, against bare decoding loops and against webdataset.

Every contestant runs in fresh processes. Live, a clip's cost is the difference of a long and a short run, without start-up and with
all processes; the bare loop is the limit: it decodes and crops the same frames of bytes in memory, and does nothing else.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..data.decode import Decoder, has_decoder
from .bench_loader_contestants import BATCH, DISTINCT_CLIPS, FIRST_BATCHES, Material, write_material, write_work
from .dataset_commands import console, positive, say

GOAL_LIVE = 0.9  # of the bare loop's clips per CPU second
GOAL_CACHED = 0.4  # of webdataset's CPU time
CACHES = {
    "latents of 17x256x384": [16, 5, 32, 48],
    "latents of 81x480x832": [16, 21, 60, 104],
}


def main(argv: list[str]) -> int:
    """Measure, print and write the figures; returns the exit code."""
    options = _parser().parse_args(argv)
    if absent := [name for name in options.decoders if not has_decoder(Decoder(name))]:
        raise ValueError(f"--decoders: {', '.join(absent)} is not installed")
    decoders = [Decoder(name) for name in options.decoders]
    material = Material(
        clips=options.clips,
        frames=options.frames,
        height=options.height,
        width=options.width,
        fps=24.0,
        clip_frames=1 + (options.frames // 3) // 4 * 4,
        clip_height=options.height * 4 // 5,
        clip_width=options.width * 3 // 4,
        clip_fps=16.0,
        latents=CACHES,
        cache_bytes=options.cache_megabytes * 2**20,
    )
    result = measure(material, decoders, pairs=options.pairs, batches=options.batches)
    _print(result)
    if options.memory:
        from .bench_loader_memory import measure_worker_memory, print_worker_memory

        result["memory"] = measure_worker_memory(options.memory)
        print_worker_memory(result["memory"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"muybridge: wrote {options.json}")
    return 0


def measure(material: Material, decoders: list[Decoder], *, pairs: int, batches: int) -> dict[str, Any]:
    """CPU seconds a clip of each contestant in each round, and how ours compare; the order of a round is turned each time."""
    live = [(name, decoder.value) for decoder in decoders for name in ("bare", "webdataset", "ours")]
    cached = [(name, cache) for cache in material.latents for name in ("webdataset_cached", "ours_cached")]
    found: dict[tuple[str, str], list[float]] = {contestant: [] for contestant in [*live, *cached]}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as scratch, Progress(*columns, console=Console(stderr=True)) as progress:
        folder = Path(scratch)
        task = progress.add_task("writing clips", total=min(DISTINCT_CLIPS, material.clips) + len(material.latents))
        write_material(folder, material, lambda: progress.advance(task))
        write_work(folder, material, FIRST_BATCHES + batches)
        task = progress.add_task("paired runs", total=pairs * len(found))
        for number in range(pairs):
            for name, what in list(found)[:: -1 if number % 2 else 1]:
                if (name, what) in cached:
                    count = material.cached_batches(what) - FIRST_BATCHES
                    seconds = float(_run(folder, name, what))
                else:
                    count = batches
                    long_run = _cpu_seconds(folder, name, what, FIRST_BATCHES + batches)
                    seconds = long_run - _cpu_seconds(folder, name, what, FIRST_BATCHES)
                found[name, what].append(seconds / (count * BATCH))
                progress.advance(task)
    return {
        "videos": f"{material.clips} of {material.frames}x{material.height}x{material.width} at {material.fps:g} frames/s",
        "training_clips": f"{material.clip_frames}x{material.clip_height}x{material.clip_width} at {material.clip_fps:g} frames/s",
        "pairs": pairs,
        "batches": batches,
        "batch": BATCH,
        "live": {
            decoder.value: _live_figures({name: found[name, decoder.value] for name in ("bare", "webdataset", "ours")})
            for decoder in decoders
        },
        "cached": {
            cache: _cached_figures(found["webdataset_cached", cache], found["ours_cached", cache])
            for cache in material.latents
        },
        "processors": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in ("numpy", "torch", "pillow", "webdataset", "safetensors")}
        | {decoder.value: version("av" if decoder is Decoder.pyav else "decord") for decoder in decoders},
    }


def _live_figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    # Ratios are of clips per CPU second, so the others' time over ours.
    to_bare = [theirs / mine for theirs, mine in zip(seconds["bare"], seconds["ours"], strict=True)]
    to_webdataset = [theirs / mine for theirs, mine in zip(seconds["webdataset"], seconds["ours"], strict=True)]
    return {
        "cpu_seconds_per_clip": {name: statistics.median(values) for name, values in seconds.items()},
        "ours_to_bare": statistics.median(to_bare),
        "ours_to_bare_of_each_pair": [round(ratio, 3) for ratio in to_bare],
        "ours_to_webdataset": statistics.median(to_webdataset),
        "goal_to_bare": GOAL_LIVE,
    }


def _cached_figures(webdataset: list[float], ours: list[float]) -> dict[str, Any]:
    ratios = [mine / theirs for theirs, mine in zip(webdataset, ours, strict=True)]
    return {
        "cpu_seconds_per_clip": {"webdataset": statistics.median(webdataset), "ours": statistics.median(ours)},
        "ours_to_webdataset_time": statistics.median(ratios),
        "ours_to_webdataset_time_of_each_pair": [round(ratio, 3) for ratio in ratios],
        "goal": GOAL_CACHED,
    }


def _cpu_seconds(folder: Path, name: str, what: str, batches: int) -> float:
    # Of the process and of the decoding processes that it waited for.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(folder, name, what, batches)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run(folder: Path, *arguments: object) -> str:
    command = [sys.executable, "-m", "muybridge.scripts.bench_loader_contestants", str(folder), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout


def _print(result: dict[str, Any]) -> None:
    title = f"{result['training_clips']} out of {result['videos']}"
    table = Table("clips", "reader", title=title, caption="the bare loop is the limit")
    for name in ("ms of CPU a clip", "clips/CPU s", "of the limit"):
        table.add_column(name, justify="right")
    for what, case in [*result["live"].items(), *result["cached"].items()]:
        seconds = case["cpu_seconds_per_clip"]
        for name, value in seconds.items():
            of_limit = f"{seconds['bare'] / value:.1%}" if "bare" in seconds else "-"
            table.add_row(what, name, f"{1000 * value:.2f}", f"{1 / value:.1f}", of_limit, end_section=name == "ours")
    console.print(table)
    for decoder, case in result["live"].items():
        is_met = case["ours_to_bare"] >= GOAL_LIVE
        say(
            f"{decoder}: ours reads {case['ours_to_bare']:.3f} of the bare loop's clips {case['ours_to_bare_of_each_pair']}; "
            f"the goal, at least {GOAL_LIVE:g}, is {'met' if is_met else 'missed'}"
        )
    for cache, case in result["cached"].items():
        share = case["ours_to_webdataset_time"]
        say(
            f"{cache}: ours takes {share:.3f} of webdataset's time {case['ours_to_webdataset_time_of_each_pair']}; "
            f"the goal, at most {GOAL_CACHED:g}, is {'met' if share <= GOAL_CACHED else 'missed'}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="muybridge bench loader", description=__doc__)
    parser.add_argument("--clips", type=positive, default=64, help="videos (%(default)s)")
    parser.add_argument("--frames", type=positive, default=49, help="of a video (%(default)s)")
    parser.add_argument("--height", type=positive, default=320, help="pixels of a video (%(default)s)")
    parser.add_argument("--width", type=positive, default=512, help="pixels of a video (%(default)s)")
    parser.add_argument("--pairs", type=positive, default=5, help="rounds of runs (%(default)s)")
    parser.add_argument(
        "--batches", type=positive, default=12, help=f"of {BATCH} clips that are measured (%(default)s)"
    )
    known = [Decoder.decord.value, Decoder.pyav.value]
    parser.add_argument(
        "--decoders", nargs="+", choices=known, default=known, help="that read the videos (default: both)"
    )
    parser.add_argument(
        "--memory", type=positive, metavar="N", help="also measure whether decoding processes grow over N clips"
    )
    parser.add_argument(
        "--cache-megabytes", type=positive, default=1000, help="of each latent cache, which is read once (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
