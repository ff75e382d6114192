"""`muybridge bench`: what the trainer and the loader cost beyond bare loops, the plan, steps, checkpoints, and the kernels."""

import argparse
import contextlib
import importlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

# Kinds that are programs of their own: module and line of help.
PROGRAMS = {
    "code": (".machine_code", "registers, spills and tensor-core instructions of every kernel launch, without a GPU"),
    "plan": (".bench_plan", "time and memory of planning steps over 10.5 million clips in 6 datasets and 40 buckets"),
    "step": (".bench_step", "seconds, tokens/s, FLOP/s and memory of training steps, also of diffusers' transformer"),
    "steps": (
        ".bench_steps",
        "such steps of 1.3 B parameters with every activation policy, and what they say of the goals",
    ),
    "encode": (".bench_encode", "clips a second of Wan's autoencoder and of umT5-XXL"),
    "kernels": (".bench_kernels", "the kernels against cuDNN, flash, FlexAttention and torch.compile on a CUDA GPU"),
    "checkpoint": (
        ".bench_checkpoint",
        "time that training stands still for a checkpoint, and until it is on the disk",
    ),
    "loader": (".bench_loader", "CPU time of reading clips and latents against bare decoding loops and webdataset"),
}


def main(argv: list[str]) -> int:
    """Run a benchmark; returns the exit code."""
    if argv and argv[0] in PROGRAMS:
        return int(importlib.import_module(PROGRAMS[argv[0]][0], package=__package__).main(argv[1:]))
    parser = argparse.ArgumentParser(prog="muybridge bench", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    overhead = kinds.add_parser(
        "overhead", help="CPU seconds a step of the trainer against a bare torch loop, in paired runs"
    )
    overhead.add_argument("--pairs", type=int, default=3, help="pairs of runs (%(default)s)")
    overhead.add_argument("--steps", type=int, default=60, help="steps that are measured (%(default)s)")
    for name, (_, summary) in PROGRAMS.items():
        kinds.add_parser(name, help=summary)
    bare = kinds.add_parser("bare")  # the other side of `overhead`, in a process of its own
    bare.add_argument("overrides", nargs="*")
    overhead.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(argv)
    if options.kind == "bare":
        run_bare_loop(options.overrides)
        return 0
    result = measure_overhead(options.pairs, options.steps)
    table = Table(title=f"muybridge bench {options.kind}")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"muybridge: wrote {options.json}")
    return 0


def measure_overhead(pairs: int, steps: int) -> dict[str, Any]:
    """CPU seconds a step of the same model, data, loss and optimizer in the trainer and in a bare torch loop.

    Each figure is the difference between a long and a short run of whole processes, so that start-up cancels out.
    """
    from .toy_inputs import make_toy_inputs

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with contextlib.redirect_stdout(io.StringIO()):
            inputs = make_toy_inputs(folder)
        common = ["+experiment=quickstart", "text=bytes", *inputs, "deepspeed=zero0", "threads=1", "tracking.wandb=off"]
        common += ["global_batch=16", "micro_batch=16", "validation.every_steps=0", "checkpoint.every_steps=0"]

        def cpu_seconds(kind: list[str], number: int, count: int) -> float:
            run = [f"run_dir={folder}/run-{kind[0]}-{number}-{count}", f"steps={count}"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-m", "muybridge.scripts.cli", *kind, *common, *run],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        short = 10  # steps of the runs that are subtracted
        bare: list[float] = []
        ours: list[float] = []
        for number in track(range(pairs), description="paired runs", console=Console(stderr=True)):
            for kind, found in ((["bench", "bare"], bare), (["train"], ours)):
                long_run = cpu_seconds(kind, number, short + steps)
                found.append((long_run - cpu_seconds(kind, number, short)) / steps)
    ratios = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
    return {
        "bare_loop_cpu_seconds_per_step": statistics.median(bare),
        "trainer_cpu_seconds_per_step": statistics.median(ours),
        "overhead_percent": 100 * (statistics.median(ratios) - 1),
        "overhead_percent_of_each_pair": [round(100 * (ratio - 1), 1) for ratio in ratios],
        "pairs": pairs,
        "steps": steps,
    }


def run_bare_loop(overrides: list[str]) -> None:
    """The least code that trains the same model on the same batches: no engine, EMA, metrics, checkpoint or plan at run time."""
    import torch

    from ..data.loader import VideoLoader
    from ..train.config import load_train_config
    from ..train.optimizer import build_optimizer
    from ..train.tasks import build_task

    config = load_train_config(overrides)
    torch.set_num_threads(config.threads or 1)
    loader = VideoLoader(
        config.training_data(),
        buckets=config.buckets(1),
        rank=0,
        world_size=1,
        seed=config.seed,
    )
    batches = loader.steps(0)
    in_memory = [next(batches)[0] for _ in range(4)]
    task = build_task(config, torch.device("cpu"))
    torch.manual_seed(config.seed)
    model = task.build_model()
    optimizer = build_optimizer(model, config.optimizer)
    for step in range(config.steps):
        batch = replace(in_memory[step % len(in_memory)], step=step)
        task.losses(model, batch).total.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
