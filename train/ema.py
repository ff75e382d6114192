"""An exponential moving average of the fp32 master weights, kept where the weights are: on this rank's shard only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .engine import Engine
from .optimizer import PENDING_AVERAGE


@dataclass
class EMAConfig:
    """Exponential moving average of the weights; samples and exports use it."""

    # Share of the average kept at each step, in (0, 1); the average then reaches back about 1 / (1 - decay) steps.
    decay: float = 0.9999

    def faults(self, field: str) -> list[str]:
        return [] if 0 < self.decay < 1 else [f"{field}.decay={self.decay} must lie between 0 and 1"]


class EMA:
    """One fp32 tensor a flat shard; 4 bytes a parameter over all ranks together, and no communication."""

    def __init__(self, engine: Engine, config: EMAConfig) -> None:
        self._engine = engine
        self._config = config
        self._averages = [shard.master.clone() for shard in engine.shards]

    @property
    def averages(self) -> list[Tensor]:
        """The averages as of the last update, to read or to fill."""
        self._settle()
        return self._averages

    def update(self, step: int) -> None:
        """Move towards the weights of the step just applied (1 for the first).

        Where the optimizer can, its next step does so while it has those weights in hand, which saves reading them once more;
        whoever looks at the averages before that has it done at once.
        """
        self._settle()
        # The ramp keeps the random initial weights from dominating a short run (as in TensorFlow's ExponentialMovingAverage).
        decay = min(self._config.decay, (1 + step) / (10 + step))
        if not self._engine.moves_averages:
            torch._foreach_lerp_(self._averages, self._masters(), 1 - decay)
            return
        for shard, average in zip(self._engine.shards, self._averages, strict=True):
            shard.optimizer_state[PENDING_AVERAGE] = (average, 1 - decay)

    def _settle(self) -> None:
        """Do what the optimizer has not come to yet."""
        for shard in self._engine.shards:
            if pending := shard.optimizer_state.pop(PENDING_AVERAGE, None):
                average, weight = pending
                average.lerp_(shard.master, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the body with the average as the model's weights, then put the trained weights back unchanged. Collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, master in zip(self.averages, self._masters(), strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self._engine.refresh_weights()

    def _masters(self) -> list[Tensor]:
        return [shard.master for shard in self._engine.shards]
