"""Reading ahead ends whenever its user does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from muybridge.data.frame_ring import Spot
from muybridge.data.read_ahead import ReadAhead, ReadThreads


@pytest.mark.parametrize("closes_pool_first", [True, False])
def test_steps_can_be_dropped_before_and_after_their_pool_is_closed(closes_pool_first: bool) -> None:
    pool = ReadThreads()
    pool._threads.shutdown()
    pool._threads = ThreadPoolExecutor(1)  # so that most reads have not begun
    go_on = threading.Event()

    def read(item: int, _: Spot | None) -> int:
        if item > 1:  # beyond the first step
            assert go_on.wait(20)
        return item

    ahead = ReadAhead[int](lambda _: (1, 1, 1, 3), pool=pool, ring=None, prefetch=3)
    steps = ahead(([[2 * step, 2 * step + 1]] for step in range(9)), read, lambda groups: groups)
    assert next(steps) == [[0, 1]]
    closing = [steps.close] if not closes_pool_first else [pool.close, steps.close]

    def close() -> None:
        for part in closing:
            part()

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(0.3)  # until the reads that have not begun are cancelled
    go_on.set()
    thread.join(20)
    assert not thread.is_alive(), "waits for reads that were cancelled"
    pool.close()
