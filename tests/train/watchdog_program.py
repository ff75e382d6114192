"""Runs of two ranks in which something hangs, dies or leaves, all at the same time, for test_watchdog.py to judge."""

import ctypes
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from muybridge.tests.train.forked import start
from muybridge.train import rank_link
from muybridge.train import watchdog as module
from muybridge.train.watchdog import Phase, Watchdog, WatchdogConfig

# A limit that is to be exceeded, and one with room for a machine on which everything takes long.
FOREVER, LIMIT, ROOM = 300.0, 2.0, 10.0
# In which ranks that answer do so on such a machine, too, with all cases at once. Those with one that does not keep the usual time.
LONG_SECONDS = 60.0
USUAL_SECONDS, module._ANSWER_SECONDS = module._ANSWER_SECONDS, LONG_SECONDS
module._WRITE_SECONDS = LONG_SECONDS


def watch(folder: Path, **limits: float) -> Watchdog:
    off = dict.fromkeys(("setup_seconds", "data_seconds", "step_seconds", "save_seconds", "validation_seconds"), 0.0)

    def on_end(text: str, code: int) -> None:
        (folder / f"end-{dist.get_rank()}").write_text(f"{code} {text}")

    dog = Watchdog(WatchdogConfig(**{**off, **limits}), folder / "stacks", on_end=on_end)
    if not limits.get("setup_seconds"):
        dog._begun = set(Phase)  # else a phase has no limit at its first time, as the set-up has none
    return dog


def meet() -> None:
    dist.all_reduce(torch.zeros(1))


def hangs_in_data(rank: int, folder: Path) -> None:
    dog = watch(folder, data_seconds=LIMIT)
    dog.enter(Phase.data, 57)
    if rank == 1:
        time.sleep(FOREVER)
    dog.enter(Phase.agreement, 57)
    meet()


def hangs_in_a_step(rank: int, folder: Path) -> None:
    dog = watch(folder, step_seconds=LIMIT)
    dog.enter(Phase.step, 3)
    if rank == 1:
        time.sleep(FOREVER)
    meet()


def is_killed(rank: int, folder: Path) -> None:
    dog = watch(folder)
    dog.enter(Phase.step, 3)
    meet()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        meet()
    except RuntimeError:
        dog.give_way(LONG_SECONDS)
        raise


def is_killed_while_others_compute(rank: int, folder: Path) -> None:
    watch(folder).enter(Phase.step, 3)
    meet()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOREVER)


def rank_0_is_killed(rank: int, folder: Path) -> None:
    watch(folder).enter(Phase.step, 3)
    meet()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOREVER)


def is_stopped(rank: int, folder: Path) -> None:
    module._ANSWER_SECONDS = USUAL_SECONDS
    dog = watch(folder, step_seconds=LIMIT)
    dog.enter(Phase.step, 3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    meet()


def rank_0_is_stopped(rank: int, folder: Path) -> None:
    module._ANSWER_SECONDS = USUAL_SECONDS
    dog = watch(folder, step_seconds=LIMIT)
    dog.enter(Phase.step, 3)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    meet()


def leaves(rank: int, folder: Path) -> None:
    dog = watch(folder)
    meet()
    if rank == 1:
        dog.stop("out of memory", 78)
        os._exit(78)
    try:
        meet()
    except RuntimeError:
        dog.give_way(LONG_SECONDS)
        raise


def leaves_for_the_same_reason(rank: int, folder: Path) -> None:
    dog = watch(folder)
    meet()
    time.sleep(rank)  # both end by themselves, if not at the same time
    dog.stop("the settings differ", 64)
    os._exit(64)


def fails_on_its_own(rank: int, folder: Path) -> None:
    module._GRACE_SECONDS = LIMIT
    dog = watch(folder)
    meet()
    if rank == 1:
        dog.give_way(0.2)  # nobody else is the cause
        dog.stop("a mistake", 1)
        raise RuntimeError("a mistake")
    time.sleep(FOREVER)


def ends_well(rank: int, folder: Path) -> None:
    dog = watch(folder, step_seconds=ROOM)
    for step in range(8):
        dog.enter(Phase.step, step)
        with dog.phase(Phase.save, step):
            time.sleep(0.1)
        meet()
    dog.enter(Phase.step, 8)
    dog.stop()
    dog._thread.join(LONG_SECONDS)
    assert not dog._thread.is_alive()
    if rank == 0:
        time.sleep(2 * LIMIT)  # nobody watches any more, neither the time nor the other


def compiles_in_the_first_step(rank: int, folder: Path) -> None:
    dog = watch(folder, setup_seconds=10 * LIMIT, step_seconds=LIMIT)
    dog.enter(Phase.step, 0)
    time.sleep(2 * LIMIT)
    meet()
    print("first step done", flush=True)
    dog.enter(Phase.step, 1)
    time.sleep(FOREVER)


def goes_another_way(rank: int, folder: Path) -> None:
    watch(folder, step_seconds=LIMIT).enter(Phase.step, 3)
    if rank == 0:
        dist.all_reduce(torch.zeros(8))
    else:
        dist.all_gather([torch.zeros(1) for _ in range(2)], torch.zeros(1))
    time.sleep(FOREVER)


def is_suspended(rank: int, folder: Path) -> None:
    module._HELD_SECONDS, module._REARM_SECONDS = LIMIT, LIMIT / 10
    dog = watch(folder, step_seconds=ROOM)
    dog.enter(Phase.step, 3)
    (folder / f"asleep-{rank}").touch()
    os.kill(os.getpid(), signal.SIGSTOP)  # as a scheduler does with all of them
    meet()
    time.sleep(LIMIT / 2)
    dog.stop()


def loses_its_watch(rank: int, folder: Path) -> None:
    dog = watch(folder, step_seconds=ROOM)

    def fail(now: float) -> None:
        raise KeyError("kind")

    if rank == 1:
        dog._look = fail  # type: ignore[method-assign]
        dog._thread.join()
    meet()
    time.sleep(LIMIT / 2)
    meet()
    dog.stop()


def is_alone(rank: int, folder: Path) -> None:
    watch(folder, validation_seconds=LIMIT).enter(Phase.validation, 9)
    time.sleep(FOREVER)


def hangs_behind_a_block(rank: int, folder: Path) -> None:
    dog = watch(folder, step_seconds=LIMIT)
    dog.enter(Phase.step, 4)
    with dog.phase(Phase.save, 4):
        time.sleep(2 * LIMIT)
    print("saved", flush=True)
    time.sleep(FOREVER)


def cannot_reach_rank_0(rank: int, folder: Path) -> None:
    def no_route(addresses: list[str], port: int) -> socket.socket:
        raise OSError("no route")

    if rank == 1:
        rank_link._join = no_route
    watch(folder, step_seconds=LIMIT).enter(Phase.step, 3)
    meet()
    time.sleep(FOREVER)


def is_visited_by_strangers(rank: int, folder: Path) -> None:
    join = rank_link._join
    strangers = []

    def come_behind_others(addresses: list[str], port: int) -> socket.socket:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"token": "guessed", "rank": 1}\n'):
            stranger = join(addresses, port)
            stranger.sendall(said)
            strangers.append(stranger)
        return join(addresses, port)

    rank_link._join = come_behind_others
    dog = watch(folder, step_seconds=ROOM)
    assert dog._link is not None
    assert dog._link.ranks == [1 - rank]
    meet()
    dog.stop()


def holds_the_interpreter(rank: int, folder: Path) -> None:
    module._HELD_SECONDS = LIMIT
    dog = watch(folder)
    while dog._armed < 0:
        time.sleep(0.01)
    ctypes.PyDLL(None).sleep(int(3 * LIMIT))
    dog.stop()


CASES: dict[Callable[[int, Path], None], int] = {
    **dict.fromkeys([hangs_in_data, hangs_in_a_step, is_killed, is_killed_while_others_compute, rank_0_is_killed], 2),
    **dict.fromkeys(
        [is_stopped, rank_0_is_stopped, leaves, leaves_for_the_same_reason, fails_on_its_own, ends_well], 2
    ),
    **dict.fromkeys([compiles_in_the_first_step, goes_another_way, is_suspended, loses_its_watch], 2),
    **dict.fromkeys([cannot_reach_rank_0, is_visited_by_strangers], 2),
    **dict.fromkeys([is_alone, hangs_behind_a_block, holds_the_interpreter], 1),
}


def main(root: Path) -> None:
    groups = {case: start(case, root / case.__name__, world=world) for case, world in CASES.items()}
    asleep = [groups[is_suspended].folder / f"asleep-{rank}" for rank in range(2)]
    wake_at: float | None = None
    while any(not group.has_ended() for group in groups.values()):
        time.sleep(0.02)
        if wake_at is None and all(path.exists() for path in asleep):
            wake_at = time.monotonic() + ROOM + LIMIT
        if wake_at is not None and time.monotonic() > wake_at:
            wake_at = math.inf
            for rank in range(2):
                groups[is_suspended].kill(rank, signal.SIGCONT)
        for case, stopped in ((is_stopped, 1), (rank_0_is_stopped, 0)):
            if list(groups[case].codes) == [1 - stopped]:
                groups[case].kill(stopped)
    (root / "found.json").write_text(json.dumps({case.__name__: group.facts() for case, group in groups.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
