"""Exponential moving averages of the fp32 master weights, kept where the weights are: on this rank's shard only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .engine import Engine
from .optimizer import PENDING_AVERAGE


@dataclass
class EMAConfig:
    """Exponential moving averages of the weights; samples and exports use the first one unless asked for another."""

    # Share of an average kept at each step, in (0, 1); it then reaches back about 1 / (1 - decay) steps. Several make as many
    # averages (4 bytes a parameter each, over all processes together), to choose from when the run is over.
    decays: list[float] = field(default_factory=lambda: [0.9999])

    def faults(self, field: str) -> list[str]:
        if not self.decays:
            return [f"{field}.decays=[] must name at least one decay"]
        found = [f"{field}.decays={decay} must lie between 0 and 1" for decay in self.decays if not 0 < decay < 1]
        found += [
            f"{field}.decays={decay!r} must have at most 6 digits: its average is named {average_name(decay)}"
            for decay in self.decays
            if 0 < decay < 1 and float(f"{decay:g}") != decay
        ]
        if len(set(self.decays)) < len(self.decays):
            found.append(f"{field}.decays={self.decays} must differ from each other")
        return found


def average_name(decay: float) -> str:
    """What checkpoints and commands call the average of this decay."""
    return f"ema-{decay:g}"


class EMA:
    """One fp32 tensor an average and flat shard; 4 bytes a parameter over all ranks together, and no communication."""

    def __init__(self, engine: Engine, config: EMAConfig) -> None:
        self._engine = engine
        self._decays = config.decays
        self._averages = {
            average_name(decay): [shard.master.clone() for shard in engine.shards] for decay in config.decays
        }

    @property
    def averages(self) -> dict[str, list[Tensor]]:
        """By name, that of the first decay first: one tensor a shard, as of the last update, to read or to fill."""
        self._settle()
        return self._averages

    def update(self, step: int) -> None:
        """Move towards the weights of the step just applied (1 for the first).

        Where the optimizer can, its next step moves the first average while it has those weights in hand, which saves reading
        them once more; whoever looks at the averages before that has it done at once.
        """
        self._settle()
        masters = [shard.master for shard in self._engine.shards]
        for index, (decay, tensors) in enumerate(zip(self._decays, self._averages.values(), strict=True)):
            # The ramp keeps the random initial weights from dominating a short run (as in TensorFlow's
            # ExponentialMovingAverage).
            weight = 1 - min(decay, (1 + step) / (10 + step))
            if index > 0 or not self._engine.moves_averages:
                torch._foreach_lerp_(tensors, masters, weight)
                continue
            for shard, average in zip(self._engine.shards, tensors, strict=True):
                shard.optimizer_state[PENDING_AVERAGE] = (average, weight)

    def _settle(self) -> None:
        """Do what the optimizer has not come to yet."""
        for shard in self._engine.shards:
            if pending := shard.optimizer_state.pop(PENDING_AVERAGE, None):
                average, weight = pending
                average.lerp_(shard.master, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the body with the first average as the model's weights, then put the trained weights back unchanged. Collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        first = next(iter(self.averages.values()))
        for shard, average in zip(self._engine.shards, first, strict=True):
            kept = shard.master.clone()
            shard.master.copy_(average)
            average.copy_(kept)
        self._engine.refresh_weights()
