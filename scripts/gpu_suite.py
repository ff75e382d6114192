"""`make gpu`: kernel correctness, the quickstart and steps of the 1.3B model on a CUDA GPU, for a machine without a network.

Writes benchmarks/results/<gpu>-<date>.json and a short table; every part's outcome is in it, failures too.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1].resolve()
# Settings of `bench step`, by the name of the row.
STEPS = {
    "1.3B 17x256x256": ["data.frames=17", "data.height=256", "data.width=256", "micro_batch=8", "global_batch=8"],
    "1.3B 81x480x832": ["micro_batch=1", "global_batch=1"],
}


def main(argv: list[str]) -> int:
    """Run all parts; returns 0 if every one succeeded, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument(
        "--only", choices=("kernels", "steps", "quickstart"), action="append", help="run these parts only"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the result (%(default)s)"
    )
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("muybridge: this machine has no CUDA GPU; nothing was measured", file=sys.stderr)
        return 1
    parts = options.only or ["kernels", "steps", "quickstart"]
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", result["gpu"].lower()).strip("-")
    path = options.out / f"{name}-{result['date'][:10]}.json"
    for part in parts:
        result[part] = {"kernels": run_kernel_tests, "steps": run_steps, "quickstart": run_quickstart}[part](
            options.out
        )
        # After every part, so that a run cut short leaves what it measured.
        path.write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)
    print(f"muybridge: wrote {path}")
    return 0 if all(entry["ok"] for part in parts for entry in result[part].values()) else 1


def run_kernel_tests(_: Path) -> dict[str, Any]:
    """The GPU tests, with the project's pytest options left out: the machine's plugins may be others."""
    answer, seconds = _run(
        [sys.executable, "-m", "pytest", "-c", "/dev/null", "--import-mode=importlib", "-q", str(ROOT / "tests/gpu")]
    )
    last = (answer.stdout.strip().splitlines() or [""])[-1]
    return {"tests/gpu": {"ok": answer.returncode == 0, "summary": last, "seconds": seconds, **_failure(answer)}}


def run_steps(out: Path) -> dict[str, Any]:
    """`muybridge bench step` of each size, in a process of its own."""
    found: dict[str, Any] = {}
    for name, overrides in STEPS.items():
        figures = out / "step.tmp.json"
        command = ["bench", "step", "--json", str(figures), "+experiment=wan_1_3b_480p", "deepspeed=zero1", *overrides]
        answer, seconds = _run([sys.executable, "-m", "muybridge.scripts.cli", *command])
        found[name] = {"ok": answer.returncode == 0, "seconds": seconds, **_failure(answer)}
        if answer.returncode == 0:
            found[name] |= json.loads(figures.read_text())
            figures.unlink()
    return found


def run_quickstart(_: Path) -> dict[str, Any]:
    """The CPU quickstart's very commands and settings, on the GPU."""
    run_dir = ROOT / "runs/quickstart_gpu"
    answer, seconds = _run([sys.executable, "-m", "muybridge.scripts.cli", "quickstart", "--run-dir", str(run_dir)])
    entry: dict[str, Any] = {"ok": answer.returncode == 0, "seconds": seconds, **_failure(answer)}
    if answer.returncode == 0:
        entry |= json.loads((run_dir / "report.json").read_text())
    return {"quickstart": entry}


def print_result(result: dict[str, Any]) -> None:
    """The parts and what each found."""
    table = Table(title=f"{result['gpu']}, torch {result['torch']}")
    for column in ("part", "outcome", "s/step", "tokens/s", "TFLOP/s", "MFU", "peak GiB"):
        table.add_column(column)
    for part in ("kernels", "steps", "quickstart"):
        for name, entry in result.get(part, {}).items():
            figures = [
                entry.get(key)
                for key in ("seconds_per_step", "tokens_per_second", "tflops_per_second", "mfu", "peak_memory_gib")
            ]
            shown = ["" if value is None else f"{value:.3g}" for value in figures]
            table.add_row(name, entry.get("summary", "ok") if entry["ok"] else "FAILED", *shown)
    Console().print(table)


def _run(command: list[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    print(f"$ {' '.join(command[1:])}", flush=True)
    began = time.monotonic()
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer, round(time.monotonic() - began, 1)


def _failure(answer: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The end of what a failed command printed."""
    return {} if answer.returncode == 0 else {"output": (answer.stdout + answer.stderr)[-4000:]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
