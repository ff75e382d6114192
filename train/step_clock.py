"""Where the time of a step goes on this rank: frozen models, forward, backward, reduction that is left to wait for, update."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch


class Part(Enum):
    """Parts of a step that are timed; `vae` and `text` lie within `forward`, and `communication` within `backward`."""

    vae = "vae"  # the frozen autoencoder
    text = "text"  # the frozen text encoder, or the tokenizer
    forward = "forward"  # the losses of a micro-batch
    backward = "backward"
    communication = "communication"  # reduction of gradients that the backward did not hide
    optimizer = "optimizer"  # clipping and update, and whole weights from their shards


# What happens elsewhere, too, such as in a validation, and belongs to a step only within another part.
_WITHIN = {Part.vae: Part.forward, Part.text: Part.forward, Part.communication: Part.backward}


class StepClock:
    """Sums up the seconds of each part.

    On a GPU these are the device's seconds, read where it has come to the end anyway. Under ZeRO-3, and where processes share
    clips, a forward pass waits for other ranks, so that all take alike, and a slow one does not show.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(Part, 0.0)
        self._events: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: set[Part] = set()

    @contextmanager
    def running(self, part: Part) -> Iterator[None]:
        """What counts for a part."""
        if _WITHIN.get(part, part) not in {*self._open, part}:
            yield
            return
        self._open.add(part)
        try:
            with self._measured(part):
                yield
        finally:
            self._open.discard(part)

    @contextmanager
    def _measured(self, part: Part) -> Iterator[None]:
        if self._is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - began

    def take(self) -> dict[Part, float]:
        """The seconds of all parts since the last call; waits for the device."""
        if self._events:
            self._events[-1][2].synchronize()
        for part, begin, end in self._events:
            self._seconds[part] += begin.elapsed_time(end) / 1000
        taken, self._seconds = self._seconds, dict.fromkeys(Part, 0.0)
        self._events.clear()
        return taken


def time_row(seconds: dict[Part, float], steps: int) -> dict[str, float]:
    """Columns of a row of metrics over so many steps, of parts that do not overlap; `model` is the forward and backward of what is
    trained."""
    inside = seconds[Part.vae] + seconds[Part.text] + seconds[Part.communication]
    parts = {
        "vae": seconds[Part.vae],
        "text": seconds[Part.text],
        "model": seconds[Part.forward] + seconds[Part.backward] - inside,
        "communication": seconds[Part.communication],
        "optimizer": seconds[Part.optimizer],
    }
    return {f"{name}_seconds_per_step": total / steps for name, total in parts.items()}
