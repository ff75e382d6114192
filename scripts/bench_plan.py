"""`muybridge bench plan`: CPU time and memory of the plan of a large dataset: buckets for all rows, any step, a resume."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..data.buckets import BucketConfig, assign_buckets
from ..data.config import DataConfig, build_buckets
from ..data.plan import DatasetRows, Plan, Segment

ROWS = 10_500_000
SEED = 0
DATASETS = 6
WORLD_SIZE = 8
LAST_STEP = 10**6
LARGEST_AMONG = 50_000  # first steps that are looked through for those of the largest batch
FRAMES = (1, 17, 33, 49, 81)
# Five aspect ratios of about 480p and three of about 256p, height and width in pixels.
SIZES = ((480, 832), (832, 480), (544, 736), (736, 544), (640, 640), (256, 448), (448, 256), (336, 336))
# What a figure must not pass. The state also has the settings, for which there is room in 4096 bytes: `loader.MAX_STATE_BYTES`.
GOALS = {
    "step_ms": 10.0,
    "step_ms_99th_percentile": 10.0,
    "largest_step_ms": 10.0,
    "plan_mb": 100.0,
    "plan_state_bytes": 3000,
    "resume_ms": 1000.0,
}
_COLUMNS = {
    "duration_seconds": np.float64,
    "fps_numerator": np.int32,
    "fps_denominator": np.int32,
    "width": np.int32,
    "height": np.int32,
    "is_image": np.bool_,
    "checksum": np.uint32,
}


class SyntheticIndex:
    """Columns as an index has them, in files that are mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return len(self.column("width"))

    def column(self, name: str) -> np.ndarray:
        """One column, one number a row."""
        return np.load(self._folder / f"{name}.npy", mmap_mode="r")


def main(argv: list[str]) -> int:
    """Measure, print and write the figures; returns 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="muybridge bench plan", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"clips in {DATASETS} datasets together (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="random steps that are planned (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a fresh process: columns in this folder
    options = parser.parse_args(argv)
    if options.rows < DATASETS or options.steps < 1:
        parser.error(f"--rows={options.rows} must be at least {DATASETS}, and --steps={options.steps} at least 1")
    if options.measure:
        print(json.dumps(measure(options.measure, options.steps)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        write_columns(Path(scratch), options.rows)
        command = [
            sys.executable,
            "-m",
            "muybridge.scripts.bench_plan",
            "--measure",
            scratch,
            "--steps",
            str(options.steps),
        ]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result = json.loads(answer.stdout)
    table = Table(title=f"the plan of {options.rows:,} clips: {DATASETS} datasets, {len(FRAMES) * len(SIZES)} buckets")
    for column in ("what", "figure", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    missed = [name for name, goal in GOALS.items() if result[name] > goal]
    for name, value in result.items():
        goal = f"at most {GOALS[name]:g}{', missed' if name in missed else ''}" if name in GOALS else ""
        table.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else f"{value:,}", goal)
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({**result, "goals": GOALS, "python": sys.version.split()[0]}, indent=1) + "\n"
        )
        print(f"muybridge: wrote {options.json}")
    print(f"muybridge: {'missed: ' + ', '.join(missed) if missed else 'all goals are met'}")
    return int(bool(missed))


def write_columns(folder: Path, rows: int) -> None:
    """Columns of clips of 1 to 20 seconds and a tenth stills, in all sizes and aspect ratios; datasets of unequal size."""
    sizes = np.array([1 + d for d in range(DATASETS)], dtype=float)
    ends = np.round(np.cumsum(sizes) / sizes.sum() * rows).astype(int)
    for d in track(range(DATASETS), description="clips", console=Console(stderr=True)):
        number = int(ends[d] - (ends[d - 1] if d else 0))
        generator = np.random.default_rng(d)
        is_image = generator.random(number) < 0.1
        short_side = generator.choice([240, 360, 480, 720, 1080], number)
        aspect = generator.choice([1.0, 4 / 3, 16 / 9, 2.4], number)
        is_upright = generator.random(number) < 0.3
        long_side = short_side * aspect
        columns = {
            "duration_seconds": np.where(is_image, 0.04, generator.uniform(1, 20, number)),
            "fps_numerator": generator.choice([24, 25, 30, 60], number),
            "fps_denominator": np.ones(number),
            "width": np.where(is_upright, short_side, long_side),
            "height": np.where(is_upright, long_side, short_side),
            "is_image": is_image,
            "checksum": generator.integers(0, 2**32, number),
        }
        (folder / str(d)).mkdir()
        for name, dtype in _COLUMNS.items():
            np.save(folder / str(d) / f"{name}.npy", columns[name].astype(dtype))


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """The figures, in megabytes (10^6) and CPU time, of a process that did nothing else before."""
    config = DataConfig(frames=81, height=480, width=832, fps=16.0, buckets=_bucket_configs())
    buckets = build_buckets(config, global_batch=64, micro_batch=1, world_size=WORLD_SIZE)
    indexes = [SyntheticIndex(folder / str(d)) for d in range(DATASETS)]
    before = _own_bytes()
    began = time.process_time()
    datasets = []
    for d, index in enumerate(track(indexes, description="buckets", console=Console(stderr=True))):
        assignment = assign_buckets(index, buckets, config.fit_rules(), np.ones(len(index), dtype=bool))
        rows = [np.flatnonzero(assignment.buckets == b).astype(np.int32) for b in range(len(buckets))]
        datasets.append(DatasetRows(f"dataset{d}", rows, content=str(d), weight=1.0 + d % 3))
    assigned = time.process_time()
    plan = Plan(buckets, datasets, seed=SEED, image_share=0.2)
    built = time.process_time()
    generator = np.random.default_rng(1)
    of_rank, of_all = [], []
    samples = 0
    for step in track(
        generator.integers(0, LAST_STEP, steps).tolist(), description="steps", console=Console(stderr=True)
    ):
        start = time.process_time()
        plan.local_slots(step, rank=step % WORLD_SIZE, world_size=WORLD_SIZE)
        middle = time.process_time()
        samples += len(plan.slots(step))
        of_rank.append(1000 * (middle - start))
        of_all.append(1000 * (time.process_time() - middle))
    grown = _own_bytes() - before
    batches = np.array([buckets[plan.bucket(step)].global_batch for step in range(LARGEST_AMONG)])
    of_largest = []
    for step in np.flatnonzero(batches == batches.max()).tolist():
        start = time.process_time()
        plan.local_slots(step, rank=step % WORLD_SIZE, world_size=WORLD_SIZE)
        of_largest.append(1000 * (time.process_time() - start))
    state = json.dumps(plan.state(LAST_STEP))
    start = time.process_time()
    resumed = Plan(buckets, datasets, seed=SEED, image_share=0.2, segment=Segment.of(json.loads(state)))
    resumed.local_slots(LAST_STEP, rank=0, world_size=WORLD_SIZE)
    resume_ms = 1000 * (time.process_time() - start)
    # A change of the data is the larger state: of then on counts from before are in it, too.
    other = Plan(buckets, datasets, seed=SEED, image_share=0.3, segment=Segment.after(json.loads(state)))
    return {
        "rows": sum(map(len, indexes)),
        "rows_in_buckets": sum(map(len, datasets)),
        "streams": sum(len(rows) > 0 for data in datasets for rows in data.rows),
        "samples_of_a_step": samples / steps,
        "largest_global_batch": max(bucket.global_batch for bucket in buckets),
        "assign_seconds": assigned - began,
        "plan_seconds": built - assigned,
        "plan_mb": grown / 1e6,
        "step_ms": float(np.mean(of_rank)),
        "step_ms_99th_percentile": float(np.percentile(of_rank, 99)),
        "step_ms_slowest": max(of_rank),
        "largest_step_ms": float(np.median(of_largest)),  # as above of one rank
        "step_of_all_ranks_ms": float(np.mean(of_all)),
        "plan_state_bytes": max(len(state), len(json.dumps(other.state(2 * LAST_STEP)))),
        "resume_ms": resume_ms,
    }


def _bucket_configs() -> list[BucketConfig]:
    return [BucketConfig(frames, height, width) for frames in FRAMES for height, width in SIZES]


def _own_bytes() -> int:
    # Pages of mapped files are not the process's own: they are there as long as nobody needs the room.
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
