"""What becomes of the data that were read for a step which is not taken any more."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from muybridge.data.ledger import BadClip, Ledger
from muybridge.train.feed import Feed
from muybridge.train.mesh import Axis
from muybridge.train.preemption import Agreement, StopAgreed


class Loader:
    """A bad clip in every step, and nothing else."""

    def __init__(self) -> None:
        self.ledger = Ledger()

    def steps(self, start: int) -> Iterator[list[Any]]:
        while True:
            self.ledger.add([BadClip("", 3, "clip 3", "it is cut", start, 0, None, (start,))])
            yield []
            start += 1

    def samples_before(self, step: int) -> int:
        return step

    def close(self) -> None:
        pass


class Requests:
    """A stop is asked for in the second step, when this rank has its data and another one has not."""

    def __init__(self) -> None:
        self.steps = 0

    def all_ready(self, is_ready: bool) -> bool:
        if is_ready and self.steps:
            raise StopAgreed
        return is_ready

    def agree(self, *, replaced_samples: int, **others: bool) -> Agreement:
        self.steps += 1
        return Agreement(False, False, replaced_samples, False, True, False, 0.0)


def test_bad_clips_of_a_step_that_a_stop_cuts_short_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muybridge.train.feed.from_all_ranks", lambda value: [value])
    loader: Any = Loader()
    feed, requests = Feed(loader, max_bad_share=0.5, axis=Axis(0, 1, None), device=torch.device("cpu")), Requests()
    of_trainer: Any = requests
    feed.start(0)
    feed.next(of_trainer, arrived=lambda: None)
    feed.agree(of_trainer, 1, is_written=True, is_lost=False)
    with pytest.raises(StopAgreed):
        feed.next(of_trainer, arrived=lambda: None)
    assert [(clip.times, clip.passes) for clip in loader.ledger.clips()] == [(1, (0,))]
    assert '"times": 1' in feed.shared_ledger()
    feed.close()
