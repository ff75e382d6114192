"""`muybridge bench kernels`: our kernels and their peers on the same inputs, in one process, on a CUDA GPU.

Measuring is bench_kernels_worker.py's; this process decides what is still worth the time, keeps the results on disk after each
one, and starts another worker where one hangs or dies.
"""

import argparse
import contextlib
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from .bench_kernels_plan import GROUPS, Problem, plan
from .bench_kernels_report import disagreements, goal_lines, key, measured_in, print_tables, suspicions

ROOT = Path(__file__).parents[1].resolve()
# Silence after which a worker is given up: longer than any compilation, shorter than what a hanging kernel may cost.
PATIENCE_SECONDS = 90.0


def main(argv: list[str]) -> int:
    """Measure, print tables, and compare with the goals and the dispatch table; returns 1 if something failed."""
    parser = argparse.ArgumentParser(prog="muybridge bench kernels", description=__doc__)
    parser.add_argument("--only", choices=GROUPS, action="append", help="these groups only; may be given again")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="leave out the largest cases after this (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the result (benchmarks/results)"
    )
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: plain PyTorch only, for the tests
    options = parser.parse_args(argv)
    if options.device == "cuda" and not _has_cuda():
        print("muybridge: this machine has no CUDA GPU; nothing was measured", file=sys.stderr)
        return 1
    problems = plan(tuple(options.only or GROUPS), quick=options.quick)
    command = [sys.executable, "-m", "muybridge.scripts.bench_kernels_worker", "--device", options.device]
    worker = Worker([*command, "--quick"] if options.quick else command)
    try:
        record, path = measure_all(problems, worker, options.out, seconds=60 * options.minutes, quick=options.quick)
    finally:
        worker.stop()
    console = Console(width=None if sys.stdout.isatty() else 130)
    results = record["results"]
    print_tables(results, console)
    for line in (*goal_lines(results), *disagreements(results), *suspicions(results)):
        console.print(line, markup=False)
    for name in record["left_out"]:
        console.print(f"left out for want of time: {name}", markup=False)
    failed = [result for result in results if "error" in result]
    print(f"muybridge: {len(results)} measurements, {len(failed)} failed; wrote {path}")
    return 1 if failed or suspicions(results) else 0


def measure_all(
    problems: Sequence[Problem], worker: "Worker", out: Path, *, seconds: float, quick: bool
) -> tuple[dict[str, Any], Path]:
    """Measure problems until the time is up; returns what the file holds, and the file."""
    began = time.monotonic()
    environment = worker.start()
    name = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    now = datetime.now(UTC)
    path = out / f"kernels-{'quick-' if quick else ''}{name}-{now:%Y-%m-%d}.json"
    # A command may be split by --only: what an earlier one of the same day and software found is kept.
    record: dict[str, Any] = {"environment": environment, "results": [], "left_out": []}
    if path.exists() and (earlier := json.loads(path.read_text()))["environment"] == environment:
        record["results"] = earlier["results"]
    for number, problem in enumerate(problems):
        if time.monotonic() - began + problem.seconds() > seconds:
            record["left_out"] = [left.name for left in problems[number:]]
            break
        for result in ask(problem, worker):
            result |= {"group": problem.group, "problem": problem.name, "mask": problem.mask, **problem.sizes}
            result |= {"at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"}
            record["results"] = [old for old in record["results"] if key(old) != key(result)] + [result]
            _save(record, path)
            print(f"[{time.monotonic() - began:4.0f} s] {describe(result)}", flush=True)
    _save(record, path)
    return record, path


def ask(problem: Problem, worker: "Worker") -> Iterator[dict[str, Any]]:
    """The results of one problem, also where the worker is lost on the way: then that measurement has failed."""
    finished: list[tuple[str, str]] = []
    finished_at_loss = -1
    while True:
        running: tuple[str, str] | None = None
        for message in worker.ask({"problem": problem.name, "skip": finished}):
            if "start" in message:
                running = (message["start"][0], message["start"][1])
            elif "result" in message:
                finished.append((message["result"]["contestant"], message["result"]["direction"]))
                running = None
                yield message["result"]
            elif "done" in message:
                return
            else:
                break
        if running is not None:
            finished.append(running)
            yield {"contestant": running[0], "direction": running[1], "error": message["lost"]}
        elif len(finished) == finished_at_loss or not finished:  # building the inputs is what fails
            yield {"contestant": "all", "direction": "all", "error": message["lost"]}
            return
        finished_at_loss = len(finished)


class Worker:
    """A process of bench_kernels_worker.py, started again by the next question after it is lost."""

    def __init__(self, command: Sequence[str], *, patience: float = PATIENCE_SECONDS) -> None:
        self._command = command
        self._patience = patience
        self._process: subprocess.Popen[str] | None = None
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def start(self) -> dict[str, Any]:
        """Start the process and return what it says of its machine.

        Raises:
            RuntimeError: it did not come up; its own words are on stderr.
        """
        self._messages = queue.Queue()
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=_forward, args=(self._process, self._messages), daemon=True).start()
        first = self._next()
        if "environment" not in first:
            raise RuntimeError(f"the measuring process did not start: {first['lost']}")
        return dict(first["environment"])

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Messages up to "done", or up to {"lost": why}."""
        if self._process is None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then the queue says why
            print(json.dumps(request), file=self._process.stdin, flush=True)
        while True:
            message = self._next()
            yield message
            if "done" in message or "lost" in message:
                return

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _next(self) -> dict[str, Any]:
        try:
            message = self._messages.get(timeout=self._patience)
        except queue.Empty:
            message = {"lost": f"nothing came for {self._patience:.0f} s: it hangs, or compiles too long"}
        if "lost" in message:
            self.stop()
        return message


def _forward(process: subprocess.Popen[str], messages: "queue.Queue[dict[str, Any]]") -> None:
    """Puts the process's messages into the queue, and its end."""
    assert process.stdout is not None
    for line in process.stdout:
        messages.put(json.loads(line))
    messages.put({"lost": f"the measuring process ended with exit code {process.wait()}"})


def describe(result: dict[str, Any]) -> str:
    """One line for a log."""
    what = f"{result['problem']}: {result['contestant']} {result['direction']}"
    if "error" in result:
        return f"{what}: FAILED: {result['error'].splitlines()[0][:200]}"
    speed = measured_in(result)
    difference = result.get("difference", 0.0)
    apart = f", differs by {difference:.1e}" if difference > 0 else ""
    return f"{what}: {result['milliseconds']:.4g} ms{speed and ', ' + speed}{apart}"


def _save(record: dict[str, Any], path: Path) -> None:
    """Written after each result, so that a run cut short leaves what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(result) for result in record["results"])
    head = json.dumps({name: value for name, value in record.items() if name != "results"})
    path.write_text(f'{head[:-1]}, "results": [\n{lines}\n]}}\n')


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
