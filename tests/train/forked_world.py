"""Ranks that are forked from this process, meet as those of a run do (`initialise_distributed`), and tell what they found.

Those of forked.py meet by a file, and may fail, hang or be killed.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muybridge.tests.ports import unused_port
from muybridge.train.engine import initialise_distributed
from muybridge.train.engine_config import EngineConfig, Precision


def run_world(
    find: Callable[[], Any], *, world: int, out: Path, timeout_seconds: int = EngineConfig().timeout_seconds
) -> None:
    """Calls `find` on each rank of a process group of its own, and writes what they return to `out`, as a JSON list.

    Ends this program where a rank fails.
    """
    torch.set_num_threads(1)
    fork, port = multiprocessing.get_context("fork"), unused_port()
    ranks = [
        fork.Process(target=_run_rank, args=(rank, world, port, find, out, timeout_seconds)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit(f"a world of {world} ended with {[process.exitcode for process in ranks]}")


def _run_rank(rank: int, world: int, port: int, find: Callable[[], Any], out: Path, timeout_seconds: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    initialise_distributed(EngineConfig(zero=0, precision=Precision.fp32, timeout_seconds=timeout_seconds))
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, find())
    if rank == 0:
        out.write_text(json.dumps(everyone))
    dist.barrier()
    os._exit(0)  # gloo's worker threads can abort a process that finalises Python after its work is done
