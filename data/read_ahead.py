"""Reading the clips of some steps ahead, in decoding processes that write their frames into shared memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import repeat
from typing import Any, Generic, Protocol, TypeVar

from .frame_ring import FrameRing, Spot

_REMOTE_READS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")
Output = TypeVar("Output")
Groups = list[list[Item]]


class Pool(Protocol):
    """What runs reads beside each other."""

    def run(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]: ...


class ReadThreads:
    """Reads some clips of a remote latent cache at a time, which wait for the network and not for a processor."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_REMOTE_READS)

    def run(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Starts a read."""
        return self._threads.submit(function, *arguments)

    def counts(self) -> dict[str, int]:
        """As a `WorkerPool` counts crashes, of which threads have none."""
        return {}

    def close(self) -> None:
        """Forgets what has not begun, and waits for what has."""
        self._threads.shutdown(cancel_futures=True)


class ReadAhead(Generic[Item]):
    """Reads nested groups of items, a step each, in the order of the steps.

    With a pool, `prefetch` steps are read ahead of the one that is asked for; the frames of a step share one place of the ring.
    """

    def __init__(
        self,
        frames_shape: Callable[[Item], tuple[int, int, int, int]],
        *,
        pool: Pool | None,
        ring: FrameRing | None,
        prefetch: int,
    ) -> None:
        """`frames_shape` is that of an item's frames, [T, H, W, 3], the same for all items of a step."""
        self._frames_shape = frames_shape
        self._pool, self._ring = pool, ring
        self._prefetch = prefetch

    def __call__(
        self,
        steps: Iterable[Groups[Item]],
        read: Callable[[Item, Spot | None], Result],
        finish: Callable[[Groups[Result]], Output],
    ) -> Generator[Output, None, None]:
        """What `finish` makes of the results of each step; frames that lie in the ring are only there until it returns."""
        if self._pool is None:
            for groups in steps:
                yield finish([[read(item, None) for item in group] for group in groups])
            return
        waiting: deque[tuple[Groups[Future[Result]], int | None]] = deque()

        def first() -> Output:
            futures, place = waiting[0]
            output = finish([[future.result() for future in group] for group in futures])
            waiting.popleft()  # not before: after an error the others of the step are waited for below
            self._release(place)
            return output

        try:
            for groups in steps:
                place, spots = self._spots(groups)
                waiting.append(
                    ([[self._pool.run(read, item, next(spots)) for item in group] for group in groups], place)
                )
                if len(waiting) > self._prefetch:
                    yield first()
            while waiting:
                yield first()
        finally:
            for futures, place in waiting:
                # One that was cancelled never tells so after its pool was closed, so it must not be waited for.
                wait([future for group in futures for future in group if not future.cancel()])
                self._release(place)

    def _spots(self, groups: Groups[Item]) -> tuple[int | None, Iterator[Spot | None]]:
        # Where in the ring the frames of a step go, item by item; nowhere if it has no room, and they come through the pipes.
        shape = self._frames_shape(groups[0][0])
        items, size = sum(map(len, groups)), Spot(0, 0, shape).size
        if self._ring is None or items * size > self._ring.place_bytes or (place := self._ring.acquire()) is None:
            return None, repeat(None)
        return place, (Spot(place, item * size, shape) for item in range(items))

    def _release(self, place: int | None) -> None:
        if self._ring is not None and place is not None:
            self._ring.release(place)
