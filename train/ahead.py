"""Asking an iterator for its next item in a thread of its own, so that whoever waits for it can look at other things meanwhile."""

import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class BackgroundNext(Generic[Item]):
    """Runs `next` of an iterator, each time in the same thread and never before it is asked for: an item is made for the step that
    takes it, and what it changes (a ledger, the counters of a stream) belongs to no later one."""

    def __init__(self, iterator: Iterator[Item]) -> None:
        self._iterator = iterator
        self._changed = threading.Condition()
        self._is_asked = self._is_closed = False
        self._answer: tuple[Item | None, BaseException | None] | None = None
        # A daemon: a storage that never answers must not keep the process.
        self._thread = threading.Thread(target=self._run, name="next batch", daemon=True)
        self._thread.start()

    def ready(self, timeout_seconds: float) -> bool:
        """Asks for the next item unless that was done, waits for at most so long, and says whether `take` has something to give."""
        with self._changed:
            assert not self._is_closed, "a closed iterator has no next item"
            self._is_asked = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._answer is not None, timeout_seconds)

    def take(self) -> Item:
        """The item for which `ready` gave True. Raises what `next` raised."""
        with self._changed:
            assert self._answer is not None, "ready() must say so first"
            (item, error), self._answer, self._is_asked = self._answer, None, False
        if error is not None:
            raise error
        return item  # type: ignore[return-value]

    def close(self, timeout_seconds: float) -> bool:
        """Closes the iterator, behind the item that is being made, which nobody gets; whether that ended within so long."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._is_wanted():
            answer = self._next()
            with self._changed:
                self._answer = answer
                self._changed.notify_all()
            del answer  # or the batch would live on until the next one
        if isinstance(self._iterator, Generator):
            # Only this thread can: a generator that runs refuses to be closed by another.
            self._iterator.close()

    def _next(self) -> tuple[Item | None, BaseException | None]:
        try:
            return next(self._iterator), None
        except BaseException as error:  # it belongs to the one who takes the item
            return None, error

    def _is_wanted(self) -> bool:
        # Waits for a question that has no answer yet; False after close.
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or (self._is_asked and self._answer is None))
            return not self._is_closed
