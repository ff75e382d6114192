"""What is summed between two rows of metrics: losses over all samples, and time."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .engine import StepResult
from .ranks import from_all_ranks


class MetricsWindow:
    """Sums since the last row of metrics, read from the device only when a row is due or a checkpoint is written.

    The sums travel with the checkpoints: the row after a resume is the same as without the interruption.
    """

    def __init__(self, device: torch.device) -> None:
        """`device` is where the ranks add their sums."""
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._skipped = self.steps = 0
        self._samples: Tensor | float = 0.0
        self._forget_step()
        self.begin()

    def _forget_step(self) -> None:
        # Of the step that goes on: one that is left out must not count, least of all where its loss is not finite.
        self._step_sums: dict[str, Tensor] = {}
        self._step_samples: Tensor | float = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._data_seconds = 0.0
        self._timed_samples = 0
        self._began = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count what just happened (a validation) in the seconds per step."""
        self._began += seconds

    def wait_for_data(self) -> None:
        self._asked = time.perf_counter()

    def data_arrived(self) -> None:
        self._data_seconds += time.perf_counter() - self._asked

    def add(self, losses: Tensor, terms: dict[str, Tensor], weights: Tensor) -> None:
        """The losses of a micro-batch, their terms and weights, each [B]."""
        self._step_samples = weights.sum() + self._step_samples
        for name, values in {"loss": losses.detach(), **terms}.items():
            _add_to(self._step_sums, name, (values.float() * weights).sum())

    def end_step(self, *, samples: int, applied: bool) -> None:
        """Count a step of this many samples over all ranks; the losses of one that is not `applied` are left out."""
        self.steps += 1
        self._timed_samples += samples
        self._skipped += not applied
        if applied:
            self._samples = self._step_samples + self._samples
            for name, total in self._step_sums.items():
                _add_to(self._sums, name, total)
        self._forget_step()

    def close(self, result: StepResult, lr: float) -> dict[str, float]:
        """Means over the window and over all ranks, and the speed since the run or the last row began. Collective."""
        names = list(self._sums)
        row = {}
        if names:  # on all ranks or, where every step was left out, on none
            # What a checkpoint held is on the CPU, where no step has moved it since.
            totals = torch.stack(
                [total.to(self._device) for total in (*self._sums.values(), torch.as_tensor(self._samples))]
            )
            dist.all_reduce(totals)
            *sums, samples = totals.tolist()
            row = {name: total / (samples or 1.0) for name, total in zip(names, sums, strict=True)}
        seconds = (time.perf_counter() - self._began) / self.steps
        row |= {
            "grad_norm": float(result.grad_norm),
            "lr": lr,
            "seconds_per_step": seconds,
            "samples_per_second": self._timed_samples / (seconds * self.steps),
            "data_seconds_per_step": self._data_seconds / self.steps,
            "skipped_steps": float(self._skipped),
        }
        self._reset()
        return row

    def state(self) -> list[dict[str, Any]]:
        """The sums of every rank, for a checkpoint. Collective."""
        own = {
            "sums": {name: total.item() for name, total in self._sums.items()},
            "samples": float(self._samples),
            "skipped": self._skipped,
        }
        return from_all_ranks(own)

    def restore(self, everyone: list[dict[str, Any]]) -> None:
        """Take up the sums of a checkpoint: one's own, or those of all ranks on rank 0 if there were more or fewer."""
        rank, world = dist.get_rank(), dist.get_world_size()
        parts = [everyone[rank]] if len(everyone) == world else everyone if rank == 0 else []
        # The same names on all ranks, also on those without a part: all must take part in the next sum, or none.
        self._sums = {name: torch.zeros(()) for part in everyone for name in part["sums"]}
        for part in parts:
            for name, total in part["sums"].items():
                self._sums[name] = self._sums[name] + total
            self._samples += part["samples"]
            self._skipped = part["skipped"]


def _add_to(sums: dict[str, Tensor], name: str, total: Tensor) -> None:
    sums[name] = sums[name].to(total.device) + total if name in sums else total
