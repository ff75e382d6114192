"""`muybridge bench checkpoint`: how long training stands still for a checkpoint, and how fast it gets to the disk.

Of one process with a model of big matrices, against a copy of the same state in memory, a bare writer (large writes and one fsync)
and torch.save. All take turns in one run, in another order each time, and ratios are of one turn: a shared disk is never the same.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from ..train.checkpoint import Checkpointer, Saved
    from ..train.ema import EMA
    from ..train.engine import Engine

WIDTH = 2048  # of the square matrices
BYTES_PER_WEIGHT = 16  # the fp32 weight, its average and two moments
WRITE_BYTES = 2**20  # of one write of the bare writer; larger ones are slower on Linux's page cache
LIMITS = {"blocking_over_memory_copy": ("at most", 1.2), "background_over_bare_writer": ("at least", 0.85)}


def main(argv: list[str]) -> int:
    """Measure, print and write the figures; returns 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="muybridge bench checkpoint", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=800, help="size of a checkpoint (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each contestant (%(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where to write, on the disk in question (the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(argv)
    if options.megabytes < 1 or options.repeats < 1:
        parser.error(f"--megabytes={options.megabytes} and --repeats={options.repeats} must be at least 1")
    with tempfile.TemporaryDirectory(prefix="muybridge-bench-", dir=options.folder) as scratch:
        result = measure(Path(scratch), options.megabytes * 10**6, options.repeats)
    missed = [name for name in LIMITS if _is_missed(name, result[name])]
    table = Table(title=f"a checkpoint of {result['bytes'] / 1e9:.2f} GB, medians of {options.repeats} turns")
    for column in ("what", "figure", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, value in result.items():
        if isinstance(value, list):
            continue
        words, limit = LIMITS.get(name, ("", None))
        goal = "" if limit is None else f"{words} {limit:g}{', missed' if name in missed else ''}"
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value), goal)
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**result, "goals": LIMITS}, indent=1) + "\n")
        print(f"muybridge: wrote {options.json}")
    print(f"muybridge: {'missed: ' + ', '.join(missed) if missed else 'all goals are met'}")
    from ..train.exit_codes import exit_process

    exit_process(int(bool(missed)), alone=True)  # a process group is up, and gloo can abort an ordinary exit


def measure(folder: Path, nbytes: int, repeats: int) -> dict[str, Any]:
    """The figures of a training state of about so many bytes."""
    import torch

    from ..train.checkpoint import CheckpointConfig, Checkpointer

    engine, ema = _build(max(1, round(nbytes / BYTES_PER_WEIGHT / WIDTH**2)))
    state = _state(engine, ema)
    on_host = [torch.zeros_like(tensor, device="cpu") for tensor in state]
    if torch.cuda.is_available():
        on_host = [tensor.pin_memory() for tensor in on_host]

    def copy() -> None:
        for target, tensor in zip(on_host, state, strict=True):
            target.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write_bare() -> None:
        with open(folder / "bare", "wb", buffering=0) as file:
            for tensor in on_host:
                content = tensor.numpy().data.cast("B")
                for start in range(0, len(content), WRITE_BYTES):
                    file.write(content[start : start + WRITE_BYTES])
            os.fsync(file.fileno())

    def save_by_torch() -> None:
        with open(folder / "torch", "wb") as file:
            torch.save(dict(enumerate(state)), file)
            file.flush()
            os.fsync(file.fileno())

    copy()
    background = Checkpointer(folder / "background", CheckpointConfig(), engine, ema)
    foreground = Checkpointer(folder / "foreground", CheckpointConfig(in_background=False), engine, ema)
    time.sleep(2)  # as training would do something before its first checkpoint
    first = _save(background, 1)
    contestants: dict[str, Callable[[int], float]] = {
        "memory_copy": lambda turn: _seconds(copy),
        "bare_writer": lambda turn: _seconds(write_bare),
        "torch_save": lambda turn: _seconds(save_by_torch),
        "foreground": lambda turn: _save(foreground, turn).total_seconds,
    }
    found: dict[str, list[float]] = {name: [] for name in (*contestants, "background", "blocking")}
    order = [*contestants, "background"]
    for turn in track(range(repeats), description="turns", console=Console(stderr=True)):
        Random(turn).shuffle(order)
        for name in order:
            if name == "background":
                saved = _save(background, 2 + turn)
                found["background"].append(saved.total_seconds)
                found["blocking"].append(saved.blocking_seconds)
            else:
                found[name].append(contestants[name](1 + turn))
            for path in folder.iterdir():  # of no turn may files be in the way of the next one
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    background.close()
    engine.destroy()
    return _figures(first, found)


def _figures(first: "Saved", found: dict[str, list[float]]) -> dict[str, Any]:
    import torch

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(found[above], found[below], strict=True))

    return {
        "bytes": first.nbytes,
        "first_blocking_seconds": first.blocking_seconds,
        **{f"{name}_seconds": statistics.median(values) for name, values in found.items()},
        "background_gb_per_second": first.nbytes / statistics.median(found["background"]) / 1e9,
        "bare_writer_gb_per_second": first.nbytes / statistics.median(found["bare_writer"]) / 1e9,
        "blocking_over_memory_copy": ratio("blocking", "memory_copy"),
        # Of throughputs, so of times the other way round.
        "background_over_bare_writer": ratio("bare_writer", "background"),
        "foreground_over_bare_writer": ratio("bare_writer", "foreground"),
        "background_over_torch_save": ratio("torch_save", "background"),
        **{f"{name}_of_each_turn": [round(value, 4) for value in values] for name, values in found.items()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cpus": os.cpu_count() or 0,
        "load_average": os.getloadavg()[0],  # with more than one waiting for each CPU, figures say little
        "torch": torch.__version__,
    }


def _build(matrices: int) -> "tuple[Engine, EMA]":
    """A model of square matrices after its first step, in which the optimizer makes its states."""
    import torch
    from torch import nn

    from ..train.ema import EMA, EMAConfig
    from ..train.engine import Engine, initialise_distributed
    from ..train.engine_config import EngineConfig, Precision
    from ..train.optimizer import OptimizerConfig, build_optimizer

    config = EngineConfig(zero=1, precision=Precision.fp32)
    device = initialise_distributed(config)
    with device:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(matrices)))
        optimizer = build_optimizer(model, OptimizerConfig())
        engine = Engine(model, optimizer, config=config, micro_batch=1, gradient_clipping=1.0)
        ema = EMA(engine, EMAConfig())
        engine.backward(engine(torch.randn(1, WIDTH)).square().mean(), is_last=True)
    assert engine.step(1e-4).applied, "random numbers have finite gradients"
    ema.update(1)
    return engine, ema


def _state(engine: "Engine", ema: "EMA") -> "list[torch.Tensor]":
    averages = [tensor for tensors in ema.averages.values() for tensor in tensors]
    moments = [shard.optimizer_state[kind] for shard in engine.shards for kind in shard.state_names]
    return [tensor.detach() for tensor in (*(shard.master for shard in engine.shards), *averages, *moments)]


def _save(checkpointer: "Checkpointer", step: int) -> "Saved":
    checkpointer.begin(step, {}, "", {})
    while not checkpointer.is_written():
        time.sleep(0.002)  # the steps of a training that goes on
    saved = checkpointer.commit()
    if saved.failure:
        raise OSError(saved.failure)
    return saved


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _is_missed(name: str, value: float) -> bool:
    words, limit = LIMITS[name]
    return value > limit if words == "at most" else value < limit


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
