"""The training data as the loop asks for them: waits that a stop can end, bad clips counted over all ranks, resume, roll-back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..data.batch import VideoBatch
from ..data.ledger import BUDGET_SAMPLES, MAX_IN_A_ROW, DataBudget, DataBudgetError, from_lines, to_lines
from ..data.loader import VideoLoader
from ..data.stream import StreamLoader
from .ahead import BackgroundNext
from .checkpoint import LEDGER_NAME
from .group_batches import share_batches
from .mesh import Axis
from .preemption import Agreement, Requests, StopAgreed
from .ranks import from_all_ranks

# How long a rank looks only at its own data before it hears whether the others were asked to stop.
POLL_SECONDS = 1.0
CLOSE_SECONDS = 5.0


class Feed:
    """The batches of each step on this rank.

    Step t trains on the samples of step t + `skipped_steps` of the plan: what a roll-back leaves out never comes again.
    """

    def __init__(
        self, loader: VideoLoader | StreamLoader, *, max_bad_share: float, axis: Axis, device: torch.device
    ) -> None:
        """Of the ranks along `axis`, which share their clips, the first one reads; the others get them on `device`."""
        self.loader = loader
        self._axis, self._device = axis, device
        self.skipped_steps = 0
        self._max_bad_share = max_bad_share
        self._budget = DataBudget(max_bad_share)
        self._batches: BackgroundNext[list[VideoBatch]] | None = None

    def resume(self, folder: Path, facts: dict[str, Any]) -> bool:
        """Go on where a checkpoint's data were; whether they changed, as far as that is allowed. Raises ValueError."""
        try:
            has_changed = self.loader.resume(facts.get("data"))
        except ValueError as error:
            raise ValueError(f"{folder} cannot be continued: {error}") from error
        self.skipped_steps = facts["skipped_data_steps"]
        # Of changed data a row may be another clip, or that clip mended: what is still bad is found and counted anew.
        if not has_changed:
            self.loader.ledger.share([from_lines(folder / LEDGER_NAME)])
            self._budget = DataBudget(self._max_bad_share, facts["data_budget"])
        return has_changed

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint before a step keeps of the data, besides the ledger."""
        return {
            "data": self.loader.state(step + self.skipped_steps),
            "data_budget": self._budget.state(),
            "skipped_data_steps": self.skipped_steps,
        }

    def shared_ledger(self) -> str:
        """The clips that could not be read on any rank, as lines for a checkpoint. Collective."""
        self.loader.ledger.share(from_all_ranks(self.loader.ledger.clips()))
        return to_lines(self.loader.ledger.clips())

    def samples_before(self, step: int) -> int:
        """Samples of the plan before a step, those of a roll-back's skipped steps among them."""
        return self.loader.samples_before(step + self.skipped_steps)

    def start(self, step: int) -> None:
        """Begin, or begin anew, with a step."""
        if self._batches is not None:
            self._batches.close(CLOSE_SECONDS)
        if self._axis.is_first:
            self._batches = BackgroundNext(self.loader.steps(step + self.skipped_steps))

    def next(self, requests: Requests, *, arrived: Callable[[], None]) -> list[VideoBatch]:
        """This rank's batches of the next step, one per micro-step; `arrived` is called when it has them. Collective.

        Raises StopAgreed, on all ranks, where a rank was asked to stop before all have theirs.
        """
        is_ready = are_all_ready = False
        while not are_all_ready:
            if not is_ready and (is_ready := self._batches is None or self._batches.ready(POLL_SECONDS)):
                arrived()
            try:
                are_all_ready = requests.all_ready(is_ready)
            except StopAgreed:
                # Who goes on reads the step anew: what was found for it must not be in the checkpoint's ledger.
                if self._batches is not None:
                    self._batches.close(POLL_SECONDS)
                self.loader.ledger.forget_unfinished()
                raise
        read = None if self._batches is None else self._batches.take()
        return share_batches(read, self._axis, self._device)

    def agree(self, requests: Requests, step: int, *, is_written: bool, is_lost: bool) -> Agreement:
        """Hear the other ranks after step - 1, and count what could not be read. Collective; raises DataBudgetError on all."""
        ledger = self.loader.ledger
        found = requests.agree(
            replaced_samples=ledger.take_replaced(),
            is_unreadable=ledger.has_long_run,
            is_written=is_written,
            is_lost=is_lost,
        )
        is_over = self._budget.add(self.samples_before(step), found.replaced_samples)
        if is_over or found.is_unreadable:
            cause = (
                f"{self._budget.replaced} of the last {BUDGET_SAMPLES} samples could not be read, more than "
                f"data.max_bad_share={self._max_bad_share:g}"
                if is_over
                else f"a process could not read one of its last {MAX_IN_A_ROW} samples"
            )
            raise DataBudgetError(
                f"{cause}; rank {dist.get_rank()} met {len(ledger)} bad clips: {ledger.summary() or 'none'}. Mend the dataset or "
                "raise the share; the same command goes on from the last checkpoint"
            )
        return found

    def close(self) -> None:
        """End the reading; what a storage keeps waiting ends with the process."""
        if self._batches is None or self._batches.close(CLOSE_SECONDS):
            self.loader.close()
