"""Batches that are asked for in another thread: of generators, of the loader's read-ahead, and of streams that ask other ranks."""

import os
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muybridge.data.read_ahead import ReadAhead, ReadThreads
from muybridge.tests.patience import PATIENCE
from muybridge.train.ahead import BackgroundNext

LONG = 30.0 * PATIENCE


def test_items_come_in_order_and_each_only_when_it_is_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    ahead = BackgroundNext(items())
    for number in range(3):
        assert made == list(range(number))
        assert ahead.ready(LONG)
        assert ahead.ready(LONG), "asking again must not make another item"
        assert ahead.take() == number
    assert ahead.ready(LONG)
    with pytest.raises(StopIteration):
        ahead.take()
    assert ahead.close(LONG)


def test_a_slow_item_is_not_ready_and_is_not_made_twice() -> None:
    go_on = threading.Event()

    def items() -> Iterator[str]:
        assert go_on.wait(LONG)
        yield "first"
        yield "second"

    ahead = BackgroundNext(items())
    assert not ahead.ready(0.01)
    assert not ahead.ready(0.01)
    go_on.set()
    assert ahead.ready(LONG)
    assert ahead.take() == "first"
    assert ahead.close(LONG)


def test_what_next_raised_reaches_the_one_who_takes_the_item() -> None:
    def items() -> Iterator[int]:
        raise ValueError("data.path has no clips")
        yield 0

    ahead = BackgroundNext(items())
    assert ahead.ready(LONG)
    with pytest.raises(ValueError, match=r"data\.path has no clips"):
        ahead.take()
    assert ahead.close(LONG)


def test_a_batch_that_was_taken_is_not_kept() -> None:
    class Batch:
        def __init__(self) -> None:
            self.gone = threading.Event()

        def __del__(self) -> None:
            self.gone.set()

    ahead = BackgroundNext(iter(Batch, None))
    assert ahead.ready(LONG)
    batch = ahead.take()
    gone = batch.gone
    del batch
    assert gone.wait(LONG)
    ahead.close(LONG)


def test_closing_ends_a_generator_behind_the_item_in_flight() -> None:
    begun, go_on = threading.Event(), threading.Event()
    log: list[str] = []

    def items() -> Iterator[int]:
        try:
            begun.set()
            assert go_on.wait(LONG)
            log.append("made")
            yield 0
        finally:
            log.append("closed")

    ahead = BackgroundNext(items())
    assert not ahead.ready(0.0)
    assert begun.wait(LONG)
    assert not ahead.close(0.01), "the item is still being made"
    go_on.set()
    assert ahead.close(LONG)
    assert log == ["made", "closed"]


@pytest.mark.parametrize("closes_pool_first", [True, False])
def test_a_read_ahead_can_be_closed_with_a_step_in_flight(closes_pool_first: bool) -> None:
    pool, go_on = ReadThreads(), threading.Event()

    def read(item: int, _: object) -> int:
        if item > 3:
            assert go_on.wait(LONG)
        return item

    steps = ReadAhead[int](lambda _: (1, 1, 1, 3), pool=pool, ring=None, prefetch=1)
    ahead = BackgroundNext(steps(([[2 * step, 2 * step + 1]] for step in range(9)), read, lambda groups: groups))
    for step in range(2):
        assert ahead.ready(LONG)
        assert ahead.take() == [[2 * step, 2 * step + 1]]
    assert not ahead.ready(0.01)
    threading.Timer(0.2, go_on.set).start()
    if closes_pool_first:
        pool.close()
    assert ahead.close(LONG)
    pool.close()


def _stream_rank(rank: int, folder: Path) -> None:
    """A rank whose `next` asks the other ranks over a group of its own, as a stream's does, while its main thread asks them too."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=LONG))
    of_stream, of_loop = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")

    def total(value: int, group: dist.ProcessGroup) -> int:
        number = torch.tensor(int(value))
        dist.all_reduce(number, group=group)
        return int(number)

    def batches() -> Iterator[int]:
        for step in range(3):
            # From step 2 on rank 1 has nothing, so both ask on without an end.
            while total(step < 2 or rank == 0, of_stream) < 2:
                time.sleep(0.01)
            yield step

    ahead = BackgroundNext(batches())
    taken: list[int] = []
    for asked in range(1000):
        # A stop is asked for on one rank only while both wait for step 2.
        is_asked = rank == 1 and len(taken) == 2 and asked > 20
        ready_ranks = total(ahead.ready(0.02), of_loop)
        if total(is_asked, of_loop):
            break
        if ready_ranks == 2:
            taken.append(ahead.take())
    assert not ahead.close(0.0)
    total(0, of_loop)
    (folder / f"rank-{rank}").write_text(str(taken))
    dist.barrier()


def test_a_stream_that_waits_for_clips_can_be_left_by_an_agreed_stop(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_leave, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LONG)
        assert process.exitcode == 0
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["[0, 1]"] * 2


def _leave(rank: int, folder: Path) -> None:
    # Without finalising Python, as a run ends too.
    try:
        _stream_rank(rank, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
