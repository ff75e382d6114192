"""DPM-Solver++ (Lu et al. 2022), second order multistep on a flow: a line through the last two data predictions, integrated.

With l = log((1 - s) / s) and h = l_t - l_s the step from level s to t is x_t = (t / s) x_s + (1 - t) (1 - e^-h) D, where D is
the data predicted at s, carried half a step on along its change since the level before.
"""

import math

from torch import Tensor

from .noise_schedule import log_signal_to_noise


class DPMSolverPP:
    """The steps of one sampling; the first and the last are of order 1, as there is no earlier or no finite next level."""

    def __init__(self, noise_levels: list[float]) -> None:
        """`noise_levels` (steps + 1) fall from 1 to 0."""
        self._levels = noise_levels
        self._log_ratios = [log_signal_to_noise(level) for level in noise_levels]
        self._index = 0
        self._data_before: Tensor | None = None

    def step(self, latents: Tensor, velocity: Tensor) -> Tensor:
        """Latents at the next noise level from latents and velocity at this one, all [B, ...] float32."""
        here = self._index
        level, next_level = self._levels[here : here + 2]
        data = latents - level * velocity
        log_step = self._log_ratios[here + 1] - self._log_ratios[here]
        towards = data
        if self._data_before is not None and next_level > 0:
            # The step from level 1 is infinitely long, so the second step takes nothing of the first one's prediction.
            log_step_before = self._log_ratios[here] - self._log_ratios[here - 1]
            towards = data + 0.5 * log_step / log_step_before * (data - self._data_before)
        self._data_before = data
        self._index += 1
        return (next_level / level) * latents - (1 - next_level) * math.expm1(-log_step) * towards
