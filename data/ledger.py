"""The ledger of clips that could not be read: which, why, and what stood in their place; and how many are too many.

It rides in the checkpoints. A row that it knows in a pass is replaced without another attempt, with the same result; the next pass
draws another excerpt of the clip, which may be readable, so that one is tried whoever met the clip before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

BUDGET_SAMPLES = 10_000  # the last ones, of which `data.max_bad_share` may be replaced
MAX_IN_A_ROW = 100  # samples of one rank
_SHOWN = 5


class DataBudgetError(RuntimeError):
    """Too much of the data cannot be read: what goes on is no longer the run that was asked for."""


@dataclass(frozen=True)
class BadClip:
    """A clip that cannot be read, and where that was first found."""

    dataset: str
    row: int
    key: str
    reason: str
    step: int
    position: int  # in the global batch
    substitute: int | None  # the row that stood in for it there; None where nothing did
    passes: tuple[int, ...]  # in which it was tried, ascending
    times: int = 1  # how often it was replaced


class Ledger:
    """The bad clips that one rank has met, and those that a checkpoint told it of."""

    def __init__(self) -> None:
        self._clips: dict[tuple[str, int], BadClip] = {}
        self._shared: dict[tuple[str, int], BadClip] = {}  # what all ranks know
        self._before: dict[
            tuple[str, int], BadClip | None
        ] = {}  # what stood for those that the unfinished step has entered
        self._replaced = 0
        self._in_a_row = 0

    def __len__(self) -> int:
        return len(self._clips)

    def reason(self, dataset: str, row: int, pass_number: int) -> str | None:
        """Why a row cannot be read in a pass; None where nothing is known against it."""
        clip = self._clips.get((dataset, row))
        return clip.reason if clip and pass_number in clip.passes else None

    def add(self, found: list[BadClip]) -> None:
        """Enters the bad clips of one sample, in the order in which they were tried; none where it was read at once."""
        for clip in found:
            known = self._clips.get((clip.dataset, clip.row))
            self._before.setdefault((clip.dataset, clip.row), known)
            self._clips[clip.dataset, clip.row] = _together(known, clip, times=known.times + 1) if known else clip
        self._replaced += bool(found)
        self._in_a_row = self._in_a_row + 1 if found else 0

    def take_replaced(self) -> int:
        """Samples with a replacement since the last call: those of a step, which ends with this."""
        replaced, self._replaced = self._replaced, 0
        self._before.clear()
        return replaced

    def forget_unfinished(self) -> None:
        """Be as at the end of the last step: what was entered since belongs to one that is not done."""
        for key, known in self._before.items():
            if known is None:
                del self._clips[key]
            else:
                self._clips[key] = known
        self._before.clear()
        self._replaced = 0

    @property
    def has_long_run(self) -> bool:
        """Whether the last `MAX_IN_A_ROW` samples of this rank were all replaced."""
        return self._in_a_row >= MAX_IN_A_ROW

    def clips(self) -> list[BadClip]:
        """All bad clips, by dataset and row."""
        return [self._clips[key] for key in sorted(self._clips)]

    def share(self, everyone: Iterable[list[BadClip]]) -> None:
        """Take in the `clips` of all ranks, which knew the same after the last call; the same result on each of them."""
        merged = dict(self._shared)
        for clip in (clip for clips in everyone for clip in clips):
            key = clip.dataset, clip.row
            known, shared = merged.get(key), self._shared.get(key)
            if known is None:
                merged[key] = clip
            elif new_times := clip.times - (shared.times if shared else 0):
                merged[key] = _together(known, clip, times=known.times + new_times)
        self._clips, self._shared = dict(merged), merged
        self._before.clear()

    def summary(self) -> str:
        """The first few, for a message."""
        shown = [f"{clip.key}: {clip.reason}" for clip in self.clips()[:_SHOWN]]
        more = f" and {len(self) - _SHOWN} more" if len(self) > _SHOWN else ""
        return "; ".join(shown) + more


def _together(a: BadClip, b: BadClip, *, times: int) -> BadClip:
    first = min(a, b, key=lambda clip: (clip.step, clip.position))
    return replace(first, passes=tuple(sorted({*a.passes, *b.passes})), times=times)


def to_lines(clips: Iterable[BadClip]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(clip)) + "\n" for clip in clips)


def from_lines(path: Path) -> list[BadClip]:
    """The inverse of `to_lines`."""
    facts = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [BadClip(**{**fact, "passes": tuple(fact["passes"])}) for fact in facts]


class DataBudget:
    """Counts the replaced samples of all ranks; the same on each of them."""

    def __init__(self, max_bad_share: float, events: Iterable[list[int]] = ()) -> None:
        self._most = max_bad_share * BUDGET_SAMPLES
        self._events = [tuple(event) for event in events]  # (samples before the step, replaced in it), oldest first

    def add(self, samples_before: int, replaced: int) -> bool:
        """Counts a step; whether more of the last `BUDGET_SAMPLES` samples than allowed were replaced."""
        if replaced:
            self._events.append((samples_before, replaced))
        oldest = samples_before - BUDGET_SAMPLES
        self._events = [event for event in self._events if event[0] > oldest]
        return self.replaced > self._most

    @property
    def replaced(self) -> int:
        """Replaced samples of those that still count."""
        return sum(replaced for _, replaced in self._events)

    def state(self) -> list[list[int]]:
        """For a checkpoint, and for `events` of the next."""
        return [list(event) for event in self._events]
