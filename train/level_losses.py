"""What samples usually cost at their noise levels, so that a step's loss is judged apart from the levels that it drew.

The loss of rectified flow differs severalfold between noise levels: the mean over a small batch says more about the levels that
were drawn than about the model.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Within a tenth of the noise levels the loss hardly changes, and a batch of 4 has seen every tenth 50 times in 128 steps.
LEVEL_BINS = 10
# Samples in a bin before their mean says what is usual there; the samples of other bins are left out of the comparison.
_MIN_SAMPLES = 8
# Share of a step's samples that must lie in bins with a mean for the step to be judged by them.
_MIN_KNOWN_SHARE = 0.5


@dataclass(frozen=True)
class StepLosses:
    """The losses of a step over all ranks, in sums over the samples of each noise-level bin."""

    losses: list[float]
    weights: list[float]

    @property
    def mean(self) -> float:
        """Over all samples; 0 for none."""
        return sum(self.losses) / (sum(self.weights) or 1.0)


class LevelSums:
    """Sums a step's losses by noise level on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, losses: Tensor, noise_levels: Tensor | None, weights: Tensor) -> None:
        """The losses of a micro-batch, their noise levels in [0, 1] (None puts all in one bin) and their weights, each [B]."""
        weights = weights.double()
        values = torch.stack([losses * weights, weights])  # [2, B]
        levels = torch.zeros_like(losses) if noise_levels is None else noise_levels
        bins = (levels * LEVEL_BINS).long().clamp(0, LEVEL_BINS - 1)
        is_in_bin = bins[:, None] == torch.arange(LEVEL_BINS, device=bins.device)  # [B, LEVEL_BINS]
        # Not by index_add, whose order of summation on a GPU is not always the same.
        sums = torch.where(is_in_bin, values[..., None], 0.0).sum(1)  # [2, LEVEL_BINS]
        self._sums = sums if self._sums is None else self._sums + sums

    def reduce(self, grad_norm: float) -> tuple[StepLosses, float]:
        """The sums over all ranks, each of which has added a micro-batch, and the gradient norm as rank 0 has it. Collective."""
        assert self._sums is not None, "no losses were added"
        own_norm = self._sums.new_tensor([grad_norm if dist.get_rank() == 0 else 0.0])
        numbers = torch.cat([self._sums.flatten(), own_norm])
        dist.all_reduce(numbers)
        *sums, norm = numbers.tolist()
        return StepLosses(sums[:LEVEL_BINS], sums[LEVEL_BINS:]), norm


class LevelLosses:
    """Running means of the loss by noise level, for clips of one shape."""

    def __init__(self, history: int, state: list[list[float]] | None = None) -> None:
        """Means over about the last `history` steps."""
        self._decay = 1 - 1 / history
        self._losses, self._weights = state or [[0.0] * LEVEL_BINS, [0.0] * LEVEL_BINS]

    def ratio(self, step: StepLosses) -> float | None:
        """The step's loss relative to what its noise levels usually cost; None where too little is known of them."""
        known = [index for index, weight in enumerate(self._weights) if weight >= _MIN_SAMPLES]
        expected = sum(step.weights[index] * self._losses[index] / self._weights[index] for index in known)
        known_share = sum(step.weights[index] for index in known) / (sum(step.weights) or 1.0)
        if known_share < _MIN_KNOWN_SHARE or not expected > 0:
            return None
        return sum(step.losses[index] for index in known) / expected

    def update(self, step: StepLosses) -> None:
        """Count the step among what is usual."""
        self._losses = [self._decay * old + new for old, new in zip(self._losses, step.losses, strict=True)]
        self._weights = [self._decay * old + new for old, new in zip(self._weights, step.weights, strict=True)]

    def state(self) -> list[list[float]]:
        """What new means take to go on as these."""
        return [self._losses, self._weights]
