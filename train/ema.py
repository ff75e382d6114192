"""An exponential moving average of the fp32 master weights, kept where the weights are: on this rank's shard only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .engine import Engine


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
        self.averages = [shard.master.clone() for shard in engine.shards]

    def update(self, step: int) -> None:
        """Move towards the weights of the step just applied (1 for the first)."""
        # The ramp keeps the random initial weights from dominating a short run (as in TensorFlow's ExponentialMovingAverage).
        decay = min(self._config.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self._masters(), 1 - decay)

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
