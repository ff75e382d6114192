"""Health checks of jobs with faults, each a group of forked processes that take themselves for nodes, for test_health.py to judge.

A node is told by SLURMD_NODENAME; all of them share this machine's folders, clock and devices unless a case changes what one sees.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from muybridge.slurm import health, health_checks, health_devices, health_talk
from muybridge.tests.patience import PATIENCE
from muybridge.tests.train.forked import Group

Spoil = Callable[[int, Path], None]
# Of cases in which somebody is waited for in vain; those that are sound need a second or two of it.
WAITED = str(18 * PATIENCE)
_GPU = "{0}, GPU-{0}, NVIDIA H200, 570.1, 143771, {1}, 30, {2}, No, {3}, Not Active, Not Active, Not Active"


def is_sound(rank: int, folder: Path) -> None:
    """Two nodes of two processes."""


def has_faults(rank: int, folder: Path) -> None:
    """Of six nodes, n2 runs other code, n3 has broken GPUs, n4 another folder, n5 computes wrongly and a clock of its own."""
    os.environ["MUYBRIDGE_HEALTH_SECONDS"] = WAITED
    if rank == 1:
        replace(health_checks, code_hash=lambda: "0123456789ab")
    if rank == 2:
        os.environ.pop("DS_ACCELERATOR")
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        put_smi(
            folder / "bin",
            gpus=[_GPU.format(0, 143000, 3, "Not Active"), _GPU.format(1, 100000, 0, "Active")],
            remap="Yes",
        )
    if rank == 3:
        (folder / "elsewhere" / "run").mkdir(parents=True)
        sys.argv[-1] = str(folder / "elsewhere" / "run")
        os.environ["MUYBRIDGE_LIFE_DIR"] = str(folder / "elsewhere" / "life")
    if rank == 4:
        replace(health_devices, wrong_products=lambda device: "3 of 128 rows of a product are wrong")
        put_clock_ahead(100.0)


def loses_a_node(rank: int, folder: Path) -> None:
    """Of four nodes, n2 is not there at all, and n3 hangs in its driver."""
    os.environ["MUYBRIDGE_HEALTH_SECONDS"] = WAITED
    if rank == 1:
        os._exit(0)
    if rank == 2:
        replace(health_devices, try_device=lambda place: time.sleep(1000))


def loses_a_rank(rank: int, folder: Path) -> None:
    """Of two nodes of two processes, rank 3 dies when it is to add up, and rank 2 waits as NCCL lets it: for ever."""
    os.environ["MUYBRIDGE_HEALTH_SECONDS"] = WAITED
    if rank == 2:
        replace(health_devices, add_up=lambda *_: time.sleep(1000))
    if rank == 3:
        replace(health_devices, add_up=lambda *_: os._exit(9))


def loses_rank_0(rank: int, folder: Path) -> None:
    """Of three nodes, that of rank 0 stops before it has opened its store."""
    os.environ["MUYBRIDGE_HEALTH_SECONDS"] = WAITED
    if rank == 0:
        replace(health_talk.Talk, _open_server=lambda self: os.kill(os.getpid(), signal.SIGSTOP))


def has_small_shm(rank: int, folder: Path) -> None:
    """Of two nodes of two processes, both have what a container has by default."""
    free_bytes = health_checks._free_bytes
    replace(health_checks, _free_bytes=lambda path: 64 << 20 if path == Path("/dev/shm") else free_bytes(path))


def has_no_port(rank: int, folder: Path) -> None:
    """Of two nodes, n1's port is taken."""
    os.environ["MUYBRIDGE_HEALTH_SECONDS"] = WAITED
    if rank == 0:
        taken = socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])), reuse_port=False)
        os.environ["KEPT_OPEN"] = str(taken.detach())


def replace(owner: object, **parts: object) -> None:
    """Put other functions into a module or a class, for this process."""
    for name, part in parts.items():
        assert hasattr(owner, name), name
        setattr(owner, name, part)


def put_smi(folder: Path, *, gpus: list[str], remap: str) -> None:
    """An nvidia-smi on PATH that lists these GPUs, which wait for a replacement of memory rows or not."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvidia-smi"
    rows = "\n".join(f"GPU-{number}, {remap}, No" for number in range(len(gpus)))
    listed = "\n".join(gpus)
    path.write_text(f"#!/bin/sh\ncase $1 in\n--query-gpu*) echo '{listed}';;\n*) echo '{rows}';;\nesac\n")
    path.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def put_clock_ahead(seconds: float) -> None:
    """For this process."""
    now = time.time
    replace(time, time=lambda: now() + seconds)


CASES: dict[Spoil, tuple[int, int]] = {  # nodes, processes on each
    is_sound: (2, 2),
    has_faults: (6, 1),
    loses_a_node: (4, 1),
    loses_a_rank: (2, 2),
    loses_rank_0: (3, 1),
    has_small_shm: (2, 2),
    has_no_port: (2, 1),
}


def start(spoil: Spoil, folder: Path, port: int) -> Group:
    """One case in a folder of its own."""
    nodes, processes = CASES[spoil]
    (folder / "run").mkdir(parents=True)
    world, pids = nodes * processes, []
    for rank in range(world):
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % processes, "LOCAL_WORLD_SIZE": processes}
        pid = os.fork()
        if not pid:
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(SLURMD_NODENAME=f"n{rank // processes + 1}", SLURM_STEP_NODELIST=f"n[1-{nodes}]")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SLURM_JOB_ID="7")
            os.environ.update(MUYBRIDGE_LIFE_DIR=str(folder / "run" / "slurm" / "lives" / "7.0"))
            _be(rank, spoil, folder)
        pids.append(pid)
    return Group(folder, pids, time.monotonic())


def _be(rank: int, spoil: Spoil, folder: Path) -> None:
    try:
        said = os.open(folder / f"said-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(1)
        sys.argv = ["health", str(folder / "run")]
        spoil(rank, folder)
        health.main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def main(root: Path) -> None:
    """Run all cases at the same time, and write down how they ended."""
    ports = []
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in CASES]
    for opened in sockets:
        ports.append(opened.getsockname()[1])
        opened.close()
    groups = {
        spoil.__name__: start(spoil, root / spoil.__name__, port) for spoil, port in zip(CASES, ports, strict=True)
    }
    while {group.has_ended() for group in groups.values()} != {True}:
        others = [code for rank, code in groups["loses_rank_0"].codes.items() if rank]
        if len(others) == 2 and 0 not in groups["loses_rank_0"].codes:
            groups["loses_rank_0"].kill(0)
        time.sleep(0.02)
    (root / "found.json").write_text(json.dumps({name: group.facts() for name, group in groups.items()}))


if __name__ == "__main__":
    replace(health_checks, code_hash=lambda: "ba9876543210")  # somebody may be at work on the code
    main(Path(sys.argv[1]))
