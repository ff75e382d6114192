"""`make gpu`: what must hold and be measured on a CUDA GPU, correctness first, for a machine without a network.

Writes benchmarks/results/<gpu>-<date>.json and a short table; every part's outcome is in it, failures too. `--only` runs some
parts and adds them to the file of the same day: where time on a GPU is short, the suite takes several commands.
"""

import argparse
import glob
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1].resolve()
# Where another ptxas than Triton's own may lie.
PTXAS_PLACES = ["/usr/local/cuda*/bin/ptxas", *(f"{place}/nvidia/*/bin/ptxas" for place in sys.path if place)]
Part = Callable[[Path, float], dict[str, Any]]


def main(argv: list[str]) -> int:
    """Run all parts; returns 0 if every one succeeded, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="run these parts only; may be given again")
    parser.add_argument("--minutes", type=float, default=60.0, help="of all parts together (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the result (benchmarks/results)"
    )
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("muybridge: this machine has no CUDA GPU; nothing was measured", file=sys.stderr)
        return 1
    environment = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    result, path = run_parts(options.only or list(PARTS), environment, options.out, seconds=60 * options.minutes)
    print_result(result)
    print(f"muybridge: wrote {path}")
    return 0 if all(entry["ok"] for part in options.only or PARTS for entry in result[part].values()) else 1


def run_parts(
    parts: Iterable[str], environment: dict[str, Any], out: Path, *, seconds: float
) -> tuple[dict[str, Any], Path]:
    """Run parts in the suite's order until the time is up; returns what the file holds, and the file."""
    began = time.monotonic()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    name = re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{date[:10]}.json"
    result: dict[str, Any] = {}
    if path.exists() and all(json.loads(path.read_text()).get(field) == value for field, value in environment.items()):
        result = json.loads(path.read_text())
    result |= {**environment, "date": date}
    for part in (part for part in PARTS if part in parts):
        left = seconds - (time.monotonic() - began)
        if left > 0:
            result[part] = PARTS[part](out, left)
        else:
            result[part] = {part: {"ok": False, "summary": "left out for want of time"}}
        # After every part, so that a run cut short leaves what it measured.
        path.write_text(json.dumps(result, indent=1) + "\n")
    return result, path


def run_kernel_tests(_: Path, seconds: float) -> dict[str, Any]:
    """The GPU tests, with the project's pytest options left out: the machine's plugins may be others."""
    return {"tests/gpu": _run_tests(seconds, {})}


def run_kernel_tests_again(_: Path, seconds: float) -> dict[str, Any]:
    """The same with the newest assembler on the machine: Triton's wheel has CUDA 12's, which has miscompiled Hopper kernels."""
    found = find_ptxas()
    if found is None:
        return {"tests/gpu, CUDA 13's ptxas": {"ok": True, "summary": "no ptxas of CUDA 13 or later here"}}
    version, path = found
    return {f"tests/gpu, ptxas {version}": _run_tests(seconds, {"TRITON_PTXAS_PATH": path})}


def run_kernel_benchmark(out: Path, seconds: float) -> dict[str, Any]:
    """`muybridge bench kernels`, which keeps results of its own beside this suite's."""
    minutes = max(0.5, seconds / 60 - 1)  # the last case and the tables come after its limit
    entry, _ = _run(_muybridge("bench", "kernels", "--out", str(out), "--minutes", f"{minutes:.1f}"), seconds)
    return {"bench kernels": entry}


def run_steps(out: Path, seconds: float) -> dict[str, Any]:
    """`muybridge bench steps`, which keeps results of its own beside this suite's and leaves out what it has of this day."""
    minutes = max(1.0, seconds / 60 - 0.5)  # the tables come after its limit
    entry, last = _run(_muybridge("bench", "steps", "--out", str(out), "--minutes", f"{minutes:.1f}"), seconds)
    return {"bench steps": {"summary": last, **entry}}


def run_quickstart(_: Path, seconds: float) -> dict[str, Any]:
    """The CPU quickstart's very commands and settings, on the GPU."""
    run_dir = ROOT / "runs/quickstart_gpu"
    entry = _run(_muybridge("quickstart", "--run-dir", str(run_dir)), seconds)[0]
    if entry["ok"]:
        entry |= json.loads((run_dir / "report.json").read_text())
    return {"quickstart": entry}


# In this order: what is not correct need not be fast.
PARTS: dict[str, Part] = {
    "kernels": run_kernel_tests,
    "kernels_again": run_kernel_tests_again,
    "bench": run_kernel_benchmark,
    "steps": run_steps,
    "quickstart": run_quickstart,
}


def find_ptxas(places: Iterable[str] = PTXAS_PLACES) -> tuple[str, str] | None:
    """Version and path of the newest ptxas from CUDA 13 on."""
    on_path = shutil.which("ptxas")
    paths = [path for place in places for path in glob.glob(place)] + ([on_path] if on_path else [])
    found = []
    for path in paths:
        words = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        if version := re.search(r"V(\d+)\.(\d+)\.(\d+)", words):
            found.append((tuple(int(part) for part in version.groups()), path))
    newest = max(found, default=((0,), ""))
    return (".".join(map(str, newest[0])), newest[1]) if newest[0] >= (13,) else None


def print_result(result: dict[str, Any]) -> None:
    """The parts and what each found."""
    table = Table(title=f"{result['gpu']}, torch {result['torch']}")
    for column in ("part", "outcome"):
        table.add_column(column)
    for part in PARTS:
        for name, entry in result.get(part, {}).items():
            outcome = entry.get("summary", "ok")
            table.add_row(name, outcome if entry["ok"] else f"FAILED {entry.get('summary', '')}")
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def _muybridge(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "muybridge.scripts.cli", *arguments]


def _run_tests(seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    options = ["-c", "/dev/null", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):  # a kernel that hangs cannot be interrupted, but named
        options += ["--timeout=240", "--timeout-method=thread"]
    entry, last = _run([sys.executable, "-m", "pytest", *options, str(ROOT / "tests/gpu")], seconds, environment)
    return {"summary": last, **entry}


def _run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[dict[str, Any], str]:
    """Run a command, show what it prints, and stop it and its children at its time; returns its outcome and last line."""
    print(f"$ {' '.join([*(f'{k}={v}' for k, v in (environment or {}).items()), *command[1:]])}", flush=True)
    began = time.monotonic()
    if seconds <= 0:
        return {"ok": False, "seconds": 0.0, "summary": "left out for want of time"}, ""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=60)
    for line in process.stdout:
        print(line, end="", flush=True)
        tail.append(line)
    code = process.wait()
    timer.cancel()
    entry: dict[str, Any] = {"ok": code == 0, "seconds": round(time.monotonic() - began, 1)}
    if stopped.is_set():
        entry["summary"] = f"stopped after {seconds:.0f} s"
    if code != 0:
        entry["output"] = "".join(tail)[-4000:]
    return entry, (tail[-1].strip() if tail else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
