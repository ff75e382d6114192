"""Mean and standard deviation of each latent channel over a dataset, by which a diffusion model's latents are scaled."""

import torch
from torch import Tensor


class LatentStatistics:
    """Streaming mean and std per channel of latent means; in double precision, with any number of updates."""

    def __init__(self) -> None:
        self.count = 0  # positions seen: clips x frames x height x width
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._squares = torch.zeros(0, dtype=torch.float64)  # sum of squared distances from the mean

    @torch.no_grad()
    def update(self, mean: Tensor) -> None:
        """Take in the distribution means [B, z, T', H', W'] of some clips."""
        values = mean.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)  # [z, positions]
        positions = values.shape[1]
        new_mean = values.mean(1)
        new_squares = (values - new_mean[:, None]).square().sum(1)
        if self.count == 0:
            self.count, self._mean, self._squares = positions, new_mean, new_squares
            return
        # Merging two groups (Chan et al.): sums of raw squares would cancel for means far from zero.
        step = new_mean - self._mean
        total = self.count + positions
        self._squares += new_squares + step.square() * (self.count * positions / total)
        self._mean += step * (positions / total)
        self.count = total

    @property
    def mean(self) -> list[float]:
        """Per channel, for `VAEConfig.latents_mean`."""
        return self._mean.tolist()

    @property
    def std(self) -> list[float]:
        """Per channel, for `VAEConfig.latents_std`. Raises ValueError where a channel is constant."""
        if self.count < 2:
            raise ValueError(f"latent statistics saw {self.count} positions and need at least 2")
        std = (self._squares / (self.count - 1)).sqrt()
        if dead := (std <= 1e-6).nonzero().flatten().tolist():
            raise ValueError(f"latent channels {dead} are constant over {self.count} positions: they cannot be scaled")
        return std.tolist()
