"""Starts of runs of two ranks on machines with faults, all at the same time, for test_probe.py to judge."""

import json
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from muybridge.tests.train.forked import start
from muybridge.train import probe as module
from muybridge.train import run_lock, slow_ranks
from muybridge.train.probe import probe, refuse_different_settings
from muybridge.train.slow_ranks import SlowRanks

CPU = torch.device("cpu")
WORLD = 3


def is_sound(rank: int, folder: Path) -> None:
    if rank == 0:
        left_behind = folder / "run" / ".probe-1-01234567"
        left_behind.mkdir(parents=True)
        (left_behind / "0").touch()
    probe(CPU, folder / "run")
    began = time.monotonic()
    probe(CPU, folder / "run")
    print(time.monotonic() - began)
    refuse_different_settings({"seed": "3"})


def computes_wrongly(rank: int, folder: Path) -> None:
    if rank == 1:
        module._multiply = spoiled_product
    probe(CPU, folder / "run")


def spoiled_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    product = a @ b
    if product.dtype is torch.bfloat16:
        product[17, 5] += 1
    return product


def fails_to_compute(rank: int, folder: Path) -> None:
    if rank == 1:
        module._multiply = lambda a, b: a @ b.T
    probe(CPU, folder / "run")


def adds_up_wrongly(rank: int, folder: Path) -> None:
    all_reduce = dist.all_reduce

    def spoiled(numbers: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        all_reduce(numbers, group=group)
        numbers[2] += 1

    if rank == 2:
        module.dist.all_reduce = spoiled  # type: ignore[assignment]
    probe(CPU, folder / "run")


def cannot_write(rank: int, folder: Path) -> None:
    (folder / "run").mkdir(exist_ok=True)
    if rank == 1:  # as a full disk answers
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    probe(CPU, folder / "run")


def shares_no_folder(rank: int, folder: Path) -> None:
    write = module._write
    if rank == 1:
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        module._write = lambda path, content: write(elsewhere / path.name, content)
    probe(CPU, folder / "run")


def reads_something_else(rank: int, folder: Path) -> None:
    write = module._write
    if rank == 1:
        module._write = lambda path, content: write(path, bytes(len(content)))
    probe(CPU, folder / "run")


def has_no_run_dir(rank: int, folder: Path) -> None:
    if rank == 0:
        (folder / "run").touch()
    dist.barrier()
    probe(CPU, folder / "run")


def has_other_settings(rank: int, folder: Path) -> None:
    own = {"seed": "4", "data": "ab"} if rank == 1 else {"seed": "3", "steps": "5", "data": "ab"}
    refuse_different_settings(own)


def is_locked(rank: int, folder: Path) -> None:
    first, second = run_lock.RunLock(folder), run_lock.RunLock(folder)
    first.acquire()
    assert second.still_ours() == (rank > 0)
    second.acquire()


def has_a_slow_rank(rank: int, folder: Path) -> None:
    slow_ranks._WINDOW_SECONDS = 0.125
    ranks = SlowRanks(group_size=1)
    for _ in range(8):
        for said in ranks.add(0.5 if rank == 2 else 0.125):
            print(said)


CASES = [is_sound, computes_wrongly, fails_to_compute, adds_up_wrongly, cannot_write, shares_no_folder]
CASES += [reads_something_else, has_no_run_dir, has_other_settings, is_locked, has_a_slow_rank]


def main(root: Path) -> None:
    groups = {case.__name__: start(case, root / case.__name__, world=WORLD) for case in CASES}
    while not all(group.has_ended() for group in groups.values()):
        time.sleep(0.02)
    (root / "found.json").write_text(json.dumps({name: group.facts() for name, group in groups.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
