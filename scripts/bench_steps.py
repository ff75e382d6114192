"""`muybridge bench steps`: training steps of the 1.3 B model on one CUDA GPU, ours and diffusers', and what they say of the goals.

Every case is a process of its own with a limit of time, so that one that hangs or finds no memory costs nothing but itself. What
has been measured on the same day stays: where time on a GPU is short, the rest follows in further commands.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .bench_steps_goals import PRACTICAL_FLOPS, goals
from .bench_steps_plan import GROUPS, SECONDS, Case, cases

ROOT = Path(__file__).parents[1].resolve()
# A process and its model take so long before the first step: with less time left, none is begun.
SHORTEST_SECONDS = 60.0
LEFT_OUT = "left out for want of time"
Results = dict[str, dict[str, Any]]


def main(argv: list[str]) -> int:
    """Measure what is not measured yet, print the tables; returns 1 if something failed that had its time."""
    parser = argparse.ArgumentParser(prog="muybridge bench steps", description=__doc__)
    parser.add_argument("--only", choices=GROUPS, action="append", help="these groups only; may be given again")
    parser.add_argument("--match", default="", help="cases with this in their name only, such as '480p B=1, ours'")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--list", action="store_true", help="say what the cases are, and measure nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all cases together (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the result (benchmarks/results)"
    )
    options = parser.parse_args(argv)
    chosen = [case for case in cases() if case.group in (options.only or GROUPS) and options.match in case.name]
    if options.list:
        print(*(case.name for case in chosen), sep="\n")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("muybridge: this machine has no CUDA GPU; nothing was measured", file=sys.stderr)
        return 1
    environment = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    path, results = read_results(options.out, environment)
    measure(chosen, path, environment, results, seconds=60 * options.minutes, again=options.again)
    print_results(results, Console(width=None if sys.stdout.isatty() else 150))
    failed = [case.name for case in chosen if results.get(case.name, {}).get("state") == "failed"]
    left = [case.name for case in chosen if results.get(case.name, {}).get("summary", LEFT_OUT) == LEFT_OUT]
    for name in left:
        print(f"left out for want of time: {name}")
    print(f"muybridge: {len(chosen) - len(left)} of {len(chosen)} cases, {len(failed)} failed; wrote {path}")
    if left:
        print("the same command goes on with those that were left out")
    return 1 if failed else 0


def read_results(out: Path, environment: dict[str, Any]) -> tuple[Path, Results]:
    """The file of this day, and what an earlier command put there with the same software."""
    name = re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower()).strip("-")
    path = out / f"steps-{name}-{datetime.now(UTC):%Y-%m-%d}.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["environment"] == environment:
            return path, earlier["results"]
    return path, {}


def measure(
    chosen: Sequence[Case],
    path: Path,
    environment: dict[str, Any],
    results: Results,
    *,
    seconds: float,
    again: bool = False,
    run: Callable[[list[str], float], dict[str, Any]] | None = None,
) -> None:
    """Fill `results` case by case until the time is up, and write the file after each one."""
    run = run or run_case
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    for number, case in enumerate(chosen, start=1):
        if case.name in results and results[case.name]["state"] == "measured" and not again:
            continue
        left = deadline - time.monotonic()
        if left >= SHORTEST_SECONDS:
            print(f"[{number}/{len(chosen)}, {left / 60:.1f} min left] {case.name}", flush=True)
            limit = min(left, SECONDS.get(case.size, 240.0))
            found = run(case.arguments(), limit)
            if found["state"] == "stopped" and limit == left:
                found = {"state": LEFT_OUT, "summary": LEFT_OUT}
        else:
            found = {"state": LEFT_OUT, "summary": LEFT_OUT}
        asked = {name: getattr(case, name) for name in ("group", "size", "transformer", "policy", "compiled")}
        results[case.name] = {**found, **asked, "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"}
        verdicts = [vars(goal) for goal in goals(results)]
        whole = {"environment": environment, "results": results, "goals": verdicts}
        path.write_text(json.dumps(whole, indent=1) + "\n")


def run_case(arguments: list[str], seconds: float) -> dict[str, Any]:
    """`muybridge bench` in a process of its own; `state` is measured (out of memory, too), stopped or failed."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        kind, *rest = arguments
        return run_command(
            [sys.executable, "-m", "muybridge.scripts.cli", "bench", kind, "--json", str(figures), *rest],
            figures,
            seconds,
        )


def run_command(command: list[str], figures: Path, seconds: float) -> dict[str, Any]:
    """What a command wrote to `figures`, or how it ended; at its time it is killed with its children."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return {"state": "stopped", "summary": f"stopped after {seconds:.0f} s", "output": _tail(said)}
    if figures.exists():
        return {"state": "measured", **json.loads(figures.read_text())}
    return {"state": "failed", "summary": f"exit code {process.returncode}", "output": _tail(said)}


def _tail(said: str) -> str:
    return "\n".join(deque(said.splitlines(), maxlen=40))[-4000:]


def print_results(results: Results, console: Console) -> None:
    """Everything side by side, a table a size, and the goals."""
    columns = (
        "s/step",
        "update s",
        "host s",
        "tokens/s",
        "MFU",
        "of 790",
        "vs default",
        "peak GiB",
        "reserved",
        "launches",
    )
    for size in dict.fromkeys(entry["size"] for entry in results.values() if entry["size"]):
        table = Table(title=f"1.3 B, {size}")
        for column in ("case", *columns):
            table.add_column(column, justify="left" if column == "case" else "right")
        here = {name: entry for name, entry in results.items() if entry["size"] == size}
        default = next((e for e in here.values() if e["transformer"] == "default" and "seconds_per_step" in e), None)
        for name, entry in here.items():
            what = name.removeprefix(f"{size}, ")
            if "seconds_per_step" not in entry:
                table.add_row(f"{what}: {entry.get('summary', entry['state'])}", *[""] * len(columns))
                continue
            rates = entry["tflops_per_second"] * 1e12 / PRACTICAL_FLOPS if entry.get("mfu") else None
            ratio = default and default["seconds_per_step"] / entry["seconds_per_step"]
            figures = [
                entry["seconds_per_step"],
                entry["seconds_of_update"],
                entry["host_seconds_of_forward_and_backward"],
                entry["tokens_per_second"],
                entry.get("mfu"),
                rates,
                ratio,
                entry.get("peak_memory_gib"),
                entry.get("peak_reserved_gib"),
                entry.get("launches_per_step"),
            ]
            table.add_row(what, *("" if value is None else f"{value:.4g}" for value in figures))
        console.print(table)
    for entry in results.values():
        for name, value in entry.get("clips_per_second", {}).items():
            console.print(f"{name}: {value:.4g} clips/s", markup=False)
    table = Table(title="goals")
    for column in ("goal", "", "found", "the limit, and how far it is"):
        table.add_column(column)
    for goal in goals(results):
        table.add_row(goal.text, goal.state, goal.found, goal.limit)
    console.print(table)
