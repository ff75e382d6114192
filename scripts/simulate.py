"""`muybridge simulate`: a run's real groups, slots, shapes and checkpoint pieces for thousands of processes, on one machine.

Some of the processes are acted out, one after another, over a process group that sends nothing (PyTorch's fake one). Each builds
the mesh, rewires the whole model without memory for its weights (meta tensors), takes it forward and backward, and lets DeepSpeed
shard a small model of the same structure. The plan of the data is asked for all processes. Nothing is computed, and no file of
the run has to exist.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..data.plan import DatasetRows, Plan
from ..train.config import TaskKind, TrainConfig, load_train_config
from ..train.exit_codes import ExitCode
from .dataset_commands import console, say

STEPS = 8  # whose slots are looked at
_HEAD_WIDTH, _LAYERS = 16, 2  # of the small model


@dataclass(frozen=True)
class Check:
    """Something that must hold for so many processes."""

    name: str
    finding: str
    ok: bool
    seconds: float  # of the slowest process here, which waits for no message; of the slots, for all groups


def main(argv: list[str]) -> int:
    """Simulate and print; 0 where all holds, 1 where something does not. Raises ValueError for settings that cannot be."""
    parser = argparse.ArgumentParser(
        prog="muybridge simulate",
        description="Act out the start of a run on thousands of processes: groups, slots, shapes, pieces of a checkpoint.",
        epilog="example: muybridge simulate --processes 4096 +experiment=wan_14b_480p parallel.sequence=8",
    )
    parser.add_argument("--processes", type=int, default=1024, help="of the whole run (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings as of `muybridge train`")
    if not argv:
        parser.print_help()
        return 0
    options = parser.parse_intermixed_args(argv)
    if options.processes < 2:
        raise ValueError(f"--processes {options.processes} must be at least 2")
    config = load_train_config([*options.overrides, "dry_run=true"], world_size=options.processes)
    if config.task is not TaskKind.text_to_video:
        raise ValueError(f"task={config.task.name} must be text_to_video: other models are not split over processes")
    checks = simulate(config, options.processes)
    _print(checks, options.processes)
    if not all(check.ok for check in checks):
        return ExitCode.failed
    say(
        f"Next: muybridge plan {shlex.join(options.overrides)} {cluster_words(options.processes)} (does it fit, how fast is it)"
    )
    return 0


def cluster_words(processes: int) -> str:
    """So many processes as settings of a plan: in nodes of 8, or of the next number below that divides them."""
    node = max(size for size in range(1, 9) if processes % size == 0)
    return f"nodes={processes // node} gpus_per_node={node}"


def simulate(config: TrainConfig, processes: int) -> list[Check]:
    """All checks of a run in so many processes, all but that of the slots with the ranks of `chosen_ranks` only."""
    found = [_checked("slots", lambda: check_slots(config, processes))]
    ranks = chosen_ranks(processes, config.parallel.sequence)
    told: dict[int, dict[str, Any]] = {}
    whole = {ranks[0], ranks[-1]}
    for rank in track(ranks, "starting processes", console=console, transient=True):
        # The whole model takes longest, and tells the same of every rank but the last, which has the padding.
        told[rank] = act_out(rank, processes, partial(_start_rank, config, whole=rank in whole))
    for part, check in (("mesh", _check_groups), ("model", _check_shapes), ("engine", _check_pieces)):
        seconds = max(facts["seconds"].get(part, 0.0) for facts in told.values())
        found.append(replace(_checked(part, partial(check, config, processes, told)), seconds=seconds))
    return found


def chosen_ranks(processes: int, sequence: int) -> list[int]:
    """Two neighbours at either end and in the middle, on both sides of a border between groups."""
    middle = processes // 2 // sequence * sequence
    wanted = {0, 1, middle - 1, middle, processes - 2, processes - 1}
    return sorted(rank for rank in wanted if 0 <= rank < processes)


def check_slots(config: TrainConfig, processes: int) -> str:
    """Every place of a step belongs to one group, and all groups take as many micro-steps. Raises AssertionError."""
    buckets, groups = config.buckets(processes), config.data_groups(processes)
    rows = [np.arange(4 * bucket.global_batch, dtype=np.int32) for bucket in buckets]
    plan = Plan(buckets, [DatasetRows("made up", rows)], seed=config.seed)
    ghosts = places = 0
    for step in range(STEPS):
        taken: Counter[int] = Counter()
        lengths = set()
        for rank in range(groups):
            own = plan.local_slots(step, rank=rank, world_size=groups)
            lengths.add(len(own))
            taken.update(slot.position for slots in own for slot in slots)
            ghosts += sum(slot.is_ghost for slots in own for slot in slots)
        batch = buckets[plan.bucket(step)].global_batch
        assert len(lengths) == 1, f"step {step}: groups take {sorted(lengths)} micro-steps"
        assert set(taken.values()) == {1}, f"step {step}: a place belongs to two groups"
        assert set(range(batch)) <= taken.keys(), f"step {step}: a sample has no place"
        places += len(taken)
    return f"{groups} groups x {STEPS} steps: each sample in one place, {ghosts / places:.1%} of the places empty"


def _check_groups(config: TrainConfig, processes: int, told: dict[int, dict[str, Any]]) -> str:
    width = config.parallel.sequence
    for rank, facts in told.items():
        first = rank // width * width
        sequence = list(range(first, first + width)) if width > 1 else None
        assert facts["sequence"] == sequence, f"rank {rank} shares clips with {facts['sequence']}"
        place = [rank // width, processes // width]
        assert facts["data"] == place, f"rank {rank} has the clips of place {facts['data']} and not {place}"
    return f"{processes // width} data groups x {width} along the sequence"


def _check_shapes(config: TrainConfig, processes: int, told: dict[int, dict[str, Any]]) -> str:
    whole = {rank: facts for rank, facts in told.items() if "velocity" in facts}
    for rank, facts in whole.items():
        assert facts["velocity"] == facts["latents"], f"rank {rank}: velocity {facts['velocity']} of {facts['latents']}"
        assert facts["without gradient"] == [], f"rank {rank}: no gradient for {facts['without gradient'][:3]}"
    facts = next(iter(whole.values()))
    tokens = facts["tokens"]
    return f"{facts['parameters'] / 1e9:.2f} B parameters; {tokens} of {facts['all tokens']} tokens in a process"


def _check_pieces(config: TrainConfig, processes: int, told: dict[int, dict[str, Any]]) -> str:
    """Neighbours' pieces of a parameter meet, and the first and the last process have its ends."""
    for rank, facts in told.items():
        behind = told.get(rank + 1, {}).get("pieces", {})
        for name, (start, numel) in facts["pieces"].items():
            if rank == 0:
                assert start == 0, f"{name} begins at element {start}"
            if name in behind and config.deepspeed.zero > 0:
                assert behind[name][0] == start + numel, (
                    f"{name}: a gap or an overlap between ranks {rank} and {rank + 1}"
                )
    names = {facts["file"] for facts in told.values()}
    assert len(names) == len(told), "two processes would write the same file"
    if config.deepspeed.zero == 0:
        return "ZeRO 0: one process writes all"
    return f"ZeRO {config.deepspeed.zero}: {2 * processes + 2:,} files a checkpoint, {min(names)} to {max(names)}"


def _checked(name: str, check: Callable[[], str]) -> Check:
    began, ok = time.perf_counter(), True
    try:
        finding = check()
    except AssertionError as error:
        finding, ok = str(error), False
    return Check(name, finding, ok, time.perf_counter() - began)


def act_out(rank: int, processes: int, play: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `play` says in a process of its own that takes itself for one of many.

    Raises RuntimeError with its traceback where it fails.
    """
    # Imported once here, and not in every process: the engine with DeepSpeed, and what the first optimizer imports.
    import torch._dynamo  # noqa: F401
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ..train import engine  # noqa: F401

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in place.items()})
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
            answer: dict[str, Any] = {"facts": play()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)  # nothing of the parent's must be flushed or closed twice
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    told: dict[str, Any] = json.loads(text) if text else {"error": "it died without a word"}
    if "error" in told:
        raise RuntimeError(f"rank {rank} of {processes}: {told['error']}")
    facts: dict[str, Any] = told["facts"]
    return facts


def _start_rank(config: TrainConfig, *, whole: bool) -> dict[str, Any]:
    """What a process of the run does before its first step, and what came of it; `whole`: with the model in full."""
    import torch.distributed as dist

    from ..train.mesh import build_mesh

    seconds, began = {}, time.perf_counter()
    mesh = build_mesh(config.parallel, timeout_seconds=config.deepspeed.timeout_seconds)
    seconds["mesh"] = time.perf_counter() - began
    group = mesh.sequence.group
    shapes = {}
    if whole:
        began = time.perf_counter()
        shapes = _whole_model(config, mesh)
        seconds["model"] = time.perf_counter() - began
    began = time.perf_counter()
    pieces = _small_engine(config)
    seconds["engine"] = time.perf_counter() - began
    return {
        "sequence": None if group is None else dist.get_process_group_ranks(group),
        "data": [mesh.data.rank, mesh.data.size],
        **shapes,
        "pieces": pieces,
        "file": f"shard-{dist.get_rank():05d}-of-{dist.get_world_size():05d}",
        "seconds": seconds,
    }


def _whole_model(config: TrainConfig, mesh: Any) -> dict[str, Any]:
    """The model as it is trained, without memory for its weights, forward and backward on the largest clips."""
    import torch

    from ..models.dit import DiT
    from ..models.text_to_video import TextToVideoModel
    from ..train.activations import ActivationsConfig
    from ..train.compile_blocks import CompileConfig
    from ..train.parallelize import parallelize

    with torch.device("meta"):
        model = TextToVideoModel(DiT(config.model), None)
    # Nothing depends on these, and the memory that `auto` asks for is that of the cluster.
    parallelize(model, mesh, replace(config, activations=ActivationsConfig(), compile=CompileConfig()))
    tokens: list[int] = []
    model.transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    vae = config.vae.resolved()
    largest = max(config.buckets(1), key=lambda bucket: bucket.frames * bucket.height * bucket.width)
    _, frames, height, width = vae.latent_shape(largest.frames, largest.height, largest.width)
    latents = torch.empty(1, config.model.in_channels, frames, height, width, device="meta")
    text = torch.empty(1, config.text.max_tokens, config.model.text_dim, device="meta")
    image = None
    if config.model.image_dim is not None:
        image = torch.empty(1, config.model.image_tokens, config.model.image_dim, device="meta")
    velocity = model(latents, torch.empty(1, device="meta"), text, image)
    velocity.sum().backward()
    patch = config.model.patch_size
    return {
        "velocity": list(velocity.shape),
        "latents": [1, config.model.out_channels, frames, height, width],
        "tokens": tokens[0],
        "all tokens": math.prod(n // step for n, step in zip((frames, height, width), patch, strict=True)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "without gradient": [name for name, parameter in model.named_parameters() if parameter.grad is None],
    }


def _small_engine(config: TrainConfig) -> dict[str, tuple[int, int]]:
    """Where this process's pieces of each parameter begin and how long they are, for a small model of the same structure."""
    import torch

    from ..models.dit import DiT
    from ..train.engine import Engine
    from ..train.optimizer import build_optimizer

    heads = config.model.num_attention_heads
    dim, ffn_dim = _HEAD_WIDTH * heads, 4 * _HEAD_WIDTH
    model = DiT(replace(config.model, num_layers=_LAYERS, dim=dim, ffn_dim=ffn_dim, text_dim=32))
    engine = Engine(
        model,
        build_optimizer(model, config.optimizer),
        config=config.deepspeed,
        micro_batch=config.micro_batch,
        gradient_clipping=config.optimizer.gradient_clipping,
    )
    assert not torch.cuda.is_initialized()
    pieces = [fragment for shard in engine.shards for fragment in shard.fragments]
    return {piece.name: (piece.start, piece.numel) for piece in pieces}


def _print(checks: list[Check], processes: int) -> None:
    table = Table(title=f"{processes:,} processes", title_justify="left")
    for column in ("", "what", "holds", "seconds a process"):
        table.add_column(column)
    for check in checks:
        mark = "[green]yes[/]" if check.ok else "[red]NO[/]"
        table.add_row(check.name, check.finding, mark, f"{check.seconds:.1f}")
    Console(file=sys.stdout).print(table)
