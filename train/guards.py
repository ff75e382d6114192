"""What a run does about steps that are not finite, or whose loss or gradient stands far out of what is usual.

Steps are judged by numbers that are reduced over the ranks, so every rank comes to the same verdict.
"""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch import Tensor

from ..data.batch import VideoBatch
from .level_losses import LevelLosses, LevelSums, StepLosses
from .ranks import from_all_ranks
from .spike_history import MIN_HISTORY, SpikeHistory, Standing

# A spike is also at least that many times as large as usual: with large batches the spread is a few percent, and a step may stand
# ten of them out and be harmless. Gradient norms double without consequence; the loss at given noise levels does not move that far.
MIN_LOSS_RATIO, MIN_NORM_RATIO = 1.25, 2.0
# Spikes in a row, of one shape of clips or of all, after which this is how the run is from now on: neither a batch nor a passing
# disturbance spoils so many. Below half of max_skipped_in_a_row's default, so that a new level does not end a run that skips.
LASTING_SPIKES = 10
# Steps over which guards.max_skipped_share is taken.
SHARE_STEPS = 1000
_NAMED_SAMPLES = 8
CURE = "lower optimizer.lr or optimizer.gradient_clipping and run again to go on from the last checkpoint"


class SpikePolicy(Enum):
    off = "off"  # nothing is judged; steps that are not finite are left out all the same
    warn = "warn"  # say so
    skip = "skip"  # leave the step out
    roll_back = "roll_back"  # go back to the last checkpoint, and around the samples since then


@dataclass
class GuardConfig:
    """Steps that are not finite are left out; this is about those that stand far out, and when to give up."""

    spike_policy: SpikePolicy = SpikePolicy.warn
    # Robust standard deviations of the logarithm above the median at which a loss or a gradient norm is a spike. At 7 and with
    # samples that vary by 40 %, none of 300,000 simulated steps fired; 3 times the usual is found in 95 of 100 steps of 16 samples
    # and in all of 32 and more, 10 times in all of 8 and more. With samples that vary 1.3-fold (sigma 1), 2 of 10,000 fired.
    spike_threshold: float = 7.0
    # Steps with clips of a shape that say what is usual for the next one; nothing is judged before 48 of them.
    spike_history: int = 128
    # Where an attempt would go back more often than that, it ends the run (exit 77).
    max_roll_backs: int = 3
    # More steps left out than that one after another, or than that share of the last 1000, end the run (exit 77). Each attempt
    # begins to count anew.
    max_skipped_in_a_row: int = 20
    max_skipped_share: float = 0.05
    # Steps between two checks that all processes hold the same weights; 0 is off.
    hash_every_steps: int = 1000

    def faults(self, field: str) -> list[str]:
        """All breaches of the rules, as complete messages."""
        found = []
        if not self.spike_threshold > 0:
            found.append(f"{field}.spike_threshold={self.spike_threshold} must be positive")
        if self.spike_history < MIN_HISTORY:
            found.append(f"{field}.spike_history={self.spike_history} must be at least {MIN_HISTORY}")
        for name in ("max_roll_backs", "hash_every_steps"):
            if getattr(self, name) < 0:
                found.append(f"{field}.{name}={getattr(self, name)} must not be negative")
        if self.max_skipped_in_a_row < 1:
            found.append(f"{field}.max_skipped_in_a_row={self.max_skipped_in_a_row} must be at least 1")
        if not 0 < self.max_skipped_share <= 1:
            found.append(f"{field}.max_skipped_share={self.max_skipped_share} must be above 0 and at most 1")
        return found


class Diverged(RuntimeError):
    """Too many steps could not be applied: the run has no future with these settings."""


class Finding(Enum):
    fine = "fine"
    not_finite = "not_finite"
    spike = "spike"


@dataclass(frozen=True)
class Verdict:
    """What there is to say of a step."""

    finding: Finding
    text: str = ""  # which step, what of it, how large against what, and what comes of it; empty where it is fine
    rolls_back: bool = False


@dataclass
class _BucketRecord:
    """What is known of the steps with clips of one shape."""

    levels: LevelLosses
    loss: SpikeHistory  # of the loss relative to what its noise levels usually cost
    norm: SpikeHistory
    spikes_in_a_row: int = 0

    @classmethod
    def of(cls, history: int, state: dict[str, Any] | None = None) -> "_BucketRecord":
        if state is None:
            return cls(LevelLosses(history), SpikeHistory(history), SpikeHistory(history))
        return cls(
            LevelLosses(history, state["levels"]),
            SpikeHistory(history, state["loss"]),
            SpikeHistory(history, state["norm"]),
            state["spikes_in_a_row"],
        )

    def state(self) -> dict[str, Any]:
        return {
            "levels": self.levels.state(),
            "loss": self.loss.state(),
            "norm": self.norm.state(),
            "spikes_in_a_row": self.spikes_in_a_row,
        }


class StepGuard:
    """Judges every step: `begin_step`, `add` for its micro-batches, `accept` within the engine's step, `end_step`."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.roll_backs = 0  # counted by whoever goes back
        self._records: dict[str, _BucketRecord] = {}
        self._spikes_in_a_row = 0
        self._skipped: list[int] = []  # the steps left out among the last SHARE_STEPS
        self._skipped_in_a_row = 0

    def begin_step(self, step: int, bucket: str) -> None:
        """A step (0 for the first) begins, with clips of the shape of this name."""
        self._step, self._bucket = step, bucket
        self._sums = LevelSums()
        self._micro_batches: list[tuple[Tensor, VideoBatch]] = []
        self._verdict: Verdict | None = None

    def add(self, losses: Tensor, noise_levels: Tensor | None, batch: VideoBatch) -> None:
        """A micro-batch with its samples' losses and noise levels [B]; no levels where the task has none."""
        self._sums.add(losses, noise_levels, batch.weights)
        # Without the clips themselves, which are large.
        self._micro_batches.append((losses.detach(), replace(batch, frames=None, latents=None, text=None)))

    def accept(self, grad_norm: float) -> bool:
        """Whether to apply the step, for `Engine.step`. Collective."""
        self._verdict = self.judge(self._step, self._bucket, *self._sums.reduce(grad_norm))
        is_tolerated = self.config.spike_policy is SpikePolicy.warn and self._verdict.finding is Finding.spike
        return is_tolerated or self._verdict.finding is Finding.fine

    def end_step(self, *, applied: bool) -> Verdict:
        """The verdict on the step; `applied` as the engine says. Collective. Raises Diverged where it was one too many."""
        verdict = self._verdict
        if verdict is None or verdict.finding is Finding.not_finite:
            what = "gradient" if verdict is None else "loss"
            verdict = Verdict(
                Finding.not_finite,
                f"step {self._step} ({self._bucket}) is left out: its {what} is not finite; {self._name_samples()}",
            )
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        self._skipped = [step for step in self._skipped if step > self._step - SHARE_STEPS]
        if not applied:
            self._skipped.append(self._step)
        if fault := self._fault(verdict):
            raise Diverged(f"{fault}; {CURE}. The last: {verdict.text}")
        return verdict

    def judge(self, step: int, bucket: str, losses: StepLosses, grad_norm: float) -> Verdict:
        """The verdict on a step with a finite gradient; what is fine counts from now on among what is usual."""
        if not math.isfinite(losses.mean):
            return Verdict(Finding.not_finite)
        if self.config.spike_policy is SpikePolicy.off:
            return Verdict(Finding.fine)
        record = self._records.setdefault(bucket, _BucketRecord.of(self.config.spike_history))
        relative_loss = record.levels.ratio(losses)
        causes = []
        norm_standing = record.norm.standing(grad_norm)
        if norm_standing is not None and self._is_spike(norm_standing, MIN_NORM_RATIO):
            usual = f"the usual {norm_standing.usual:.3g}"
            causes.append(f"gradient norm of {grad_norm:.3g} is {_against(norm_standing, usual)}")
        if relative_loss is not None:
            standing = record.loss.standing(relative_loss)
            if standing is not None and self._is_spike(standing, MIN_LOSS_RATIO):
                usual = f"the {losses.mean / standing.ratio:.3g} that is usual at its noise levels"
                causes.append(f"loss of {losses.mean:.3g} is {_against(standing, usual)}")
        if causes:
            return self._spike(step, bucket, record, causes)
        record.levels.update(losses)
        record.norm.add(grad_norm)
        if relative_loss is not None:
            record.loss.add(relative_loss)
        self._spikes_in_a_row = record.spikes_in_a_row = 0
        return Verdict(Finding.fine)

    def state(self) -> dict[str, Any]:
        """What is known of the steps so far, as JSON; the same on every rank. How often a run was in trouble is not in it: who runs
        it again after that has decided to go on."""
        return {
            "buckets": {bucket: record.state() for bucket, record in self._records.items()},
            "spikes_in_a_row": self._spikes_in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Judge as the guard with this state would."""
        history = self.config.spike_history
        self._records = {bucket: _BucketRecord.of(history, kept) for bucket, kept in state["buckets"].items()}
        self._spikes_in_a_row = state["spikes_in_a_row"]

    def _is_spike(self, standing: Standing, min_ratio: float) -> bool:
        return standing.ratio >= min_ratio and standing.deviations >= self.config.spike_threshold

    def _spike(self, step: int, bucket: str, record: _BucketRecord, causes: list[str]) -> Verdict:
        policy = self.config.spike_policy
        outcome = {
            SpikePolicy.warn: "it is applied",
            SpikePolicy.skip: "it is left out",
            SpikePolicy.roll_back: "the run goes back to the last checkpoint",
        }[policy]
        text = f"step {step} ({bucket}) stands out: its {' and its '.join(causes)}; {outcome}"
        self._spikes_in_a_row += 1
        record.spikes_in_a_row += 1
        # What lasts is a new level, of this shape or of all: what was usual is forgotten, or every later step would be a spike.
        if self._spikes_in_a_row == LASTING_SPIKES:
            self._records, self._spikes_in_a_row = {}, 0
            text += f". {LASTING_SPIKES} steps in a row did: from here on it counts as usual"
        elif record.spikes_in_a_row == LASTING_SPIKES:
            del self._records[bucket]
            text += f". {LASTING_SPIKES} such steps in a row did: from here on it counts as usual"
        return Verdict(Finding.spike, text, rolls_back=policy is SpikePolicy.roll_back)

    def _fault(self, verdict: Verdict) -> str:
        limits = self.config
        if verdict.rolls_back and self.roll_backs >= limits.max_roll_backs:
            return f"the run went back to a checkpoint {self.roll_backs} times, guards.max_roll_backs, and would have to again"
        if self._skipped_in_a_row > limits.max_skipped_in_a_row:
            return f"{self._skipped_in_a_row} steps in a row were left out, more than guards.max_skipped_in_a_row"
        if len(self._skipped) > limits.max_skipped_share * SHARE_STEPS:
            return (
                f"{len(self._skipped)} of the last {SHARE_STEPS} steps were left out, more than "
                f"guards.max_skipped_share={limits.max_skipped_share:g}"
            )
        return ""

    def _name_samples(self) -> str:
        """The samples whose losses are not finite, over all ranks. Collective."""
        own = [text for losses, batch in self._micro_batches for text in not_finite_samples(losses, batch)]
        named = [text for texts in from_all_ranks(own) for text in texts]
        if not named:
            return "the losses of all samples are"
        more = f" and {len(named) - _NAMED_SAMPLES} more" if len(named) > _NAMED_SAMPLES else ""
        return f"samples whose loss is not: {', '.join(named[:_NAMED_SAMPLES])}{more}"


def not_finite_samples(losses: Tensor, batch: VideoBatch) -> list[str]:
    """Names the samples of a micro-batch whose losses [B] are not finite; places of weight 0 hold ghosts, or samples that another
    process speaks for. Waits for the device."""
    places = (~losses.isfinite() & (batch.weights > 0)).nonzero().flatten().tolist()
    slots, datasets, rows = batch.slots.tolist(), batch.datasets.tolist(), batch.rows.tolist()
    return [
        f"slot {slots[place]} (row {rows[place]} of dataset {datasets[place]}, {batch.keys[place]!r})"
        for place in places
    ]


def _against(standing: Standing, usual: str) -> str:
    return f"{standing.ratio:.3g} times {usual} ({standing.deviations:.1f} robust standard deviations above it)"
