"""The checkpoints of a run as its loop sees them: when one is due, when it is there, and what comes of one that fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import Checkpointer, Saved
from .checkpoint_folder import delete_leftovers, space_fault
from .ranks import on_rank_0
from .save_schedule import SaveSchedule

# A disk that is full for a moment costs a checkpoint; one that stays full would cost all further work.
MAX_FAILURES_IN_A_ROW = 3


class CheckpointsFail(RuntimeError):
    """Nothing that the run does is kept any more."""


class Saver:
    """Begins saves and takes up what became of them; the same on every rank."""

    def __init__(
        self, checkpointer: Checkpointer, schedule: SaveSchedule, *, step: int | None, taken_up: Callable[[Saved], None]
    ) -> None:
        """`step` is that of the checkpoint which the run goes on from; `taken_up` hears of each save, also of failed ones."""
        self.schedule = schedule
        self.saved_step = step
        self._checkpointer = checkpointer
        self._taken_up = taken_up
        self._failures_in_a_row = 0

    def begin(self, step: int, state: dict[str, Any], *, bad_clips: str, validation_losses: dict[int, float]) -> None:
        """Save the state of the run after `step` steps, beside training where that is on. Collective. Raises CheckpointsFail."""
        self._begin(step, state, bad_clips, validation_losses)
        if not self._checkpointer.in_background:
            self.finish()  # it is complete, and a crash in the next step would lose it

    def is_written(self) -> bool:
        """Whether this rank has written its part of what is in flight; also where nothing is."""
        return not self._checkpointer.in_flight or self._checkpointer.is_written()

    def commit_if(self, is_written: bool) -> None:
        """To be called after every step, with whether all ranks have written their parts. Collective. Raises CheckpointsFail."""
        if is_written and self._checkpointer.in_flight:
            self._take_up(self._checkpointer.commit())

    def finish(self) -> None:
        """Wait for what is in flight. Collective. Raises CheckpointsFail."""
        if saved := self._checkpointer.finish():
            self._take_up(saved)

    def save_now(
        self, step: int, state: dict[str, Any], *, bad_clips: str, validation_losses: dict[int, float]
    ) -> None:
        """Save and wait for it. Collective. Raises CheckpointsFail where that fails."""
        self._begin(step, state, bad_clips, validation_losses)
        saved = self._checkpointer.commit()
        self._take_up(saved)
        if saved.failure:
            raise CheckpointsFail(saved.failure)

    def close(self) -> None:
        """End the writer process; what is in flight is lost."""
        self._checkpointer.close()

    def _begin(self, step: int, state: dict[str, Any], bad_clips: str, validation_losses: dict[int, float]) -> None:
        if before := self._checkpointer.begin(step, state, bad_clips, validation_losses):
            self._take_up(before)

    def _take_up(self, saved: Saved) -> None:
        self.schedule.saved(saved)
        self._taken_up(saved)
        if not saved.failure:
            self.saved_step, self._failures_in_a_row = saved.step, 0
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row == MAX_FAILURES_IN_A_ROW:
            raise CheckpointsFail(
                f"{self._failures_in_a_row} checkpoints in a row were not written. The last: {saved.failure}"
            )


def build_saver(
    folder: Path,
    checkpointer: Checkpointer,
    schedule: SaveSchedule,
    *,
    steps_left: int,
    resumed_step: int | None,
    taken_up: Callable[[Saved], None],
) -> Saver:
    """A saver of checkpoints into a folder, which it frees of leftovers. Collective.

    Raises ValueError where the disk has no room for the checkpoints of a fresh run, CheckpointsFail for one that goes on: it had it
    before, and may have it again.
    """
    delete_leftovers(folder)
    nbytes = checkpointer.expected_bytes()
    if fault := on_rank_0(lambda: space_fault(folder, nbytes) if steps_left > 0 else ""):
        checkpointer.close()
        raise CheckpointsFail(fault) if resumed_step is not None else ValueError(fault)
    return Saver(checkpointer, schedule, step=resumed_step, taken_up=taken_up)
