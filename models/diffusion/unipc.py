"""UniPC (Zhao et al. 2023) of order 2 on a flow: each step corrects the latents it was given and predicts the next ones.

In l = log((1 - s) / s), the log of signal over noise, the flow from level s to t is, with h = l_t - l_s,
    x_t = (t / s) x_s + (1 - t) (1 - e^-h) (x0 + weighted differences of data predictions),
where x0 is the data predicted at s. The predictor differs x0 with the prediction before it; the corrector repeats the step
that led here with the prediction made at its end, at no further call of the model. B(h) = e^-h - 1 ("bh2").
"""

import math

from torch import Tensor

from .noise_schedule import log_signal_to_noise


class UniPC:
    """The steps of one sampling; the first and the last are of order 1, as there is no earlier or no finite next level."""

    def __init__(self, noise_levels: list[float]) -> None:
        """`noise_levels` (steps + 1) fall from below 1 to 0."""
        self._levels = noise_levels
        self._log_ratios = [log_signal_to_noise(level) for level in noise_levels]
        self._index = 0
        self._data: list[Tensor] = []  # the predictions at the levels before this one, last two, newest last
        self._start: Tensor | None = None  # corrected latents of the level before this one
        self._order = 0  # of the step that led here

    def step(self, latents: Tensor, velocity: Tensor) -> Tensor:
        """Latents at the next noise level from latents and velocity at this one, all [B, ...] float32."""
        data = latents - self._levels[self._index] * velocity
        if self._start is not None:
            latents = self._correct(self._start, data)
        self._data = [*self._data[-1:], data]
        steps_left = len(self._levels) - 1 - self._index
        self._order = min(2, steps_left, len(self._data))
        self._start = latents
        self._index += 1
        return self._predict(latents)

    def _predict(self, latents: Tensor) -> Tensor:
        """From the level before `_index` to `_index`."""
        newest = self._data[-1]
        differences = 0.5 * (self._data[-2] - newest) / self._ratio() if self._order == 2 else None
        return self._advance(latents, newest, differences)

    def _correct(self, start: Tensor, data: Tensor) -> Tensor:
        """The latents at `_index` again, now that `data` is predicted there; with the order of their prediction."""
        newest = self._data[-1]
        if self._order == 1:
            return self._advance(start, newest, 0.5 * (data - newest))
        # The weights that integrate data predictions linear and quadratic in l exactly.
        step = -self._log_step()
        growth = math.expm1(step)
        first = growth / step - 1
        linear = first / growth
        quadratic = 2 * (first / step - 0.5) / growth
        ratio = self._ratio()
        before = (linear - quadratic) / (1 - ratio)
        differences = before / ratio * (self._data[-2] - newest) + (linear - before) * (data - newest)
        return self._advance(start, newest, differences)

    def _advance(self, latents: Tensor, data: Tensor, differences: Tensor | None) -> Tensor:
        """The first-order step from the level before `_index` to `_index`, plus weighted differences of data predictions."""
        level, next_level = self._levels[self._index - 1], self._levels[self._index]
        weight = -(1 - next_level) * math.expm1(-self._log_step())
        towards = data if differences is None else data + differences
        return (next_level / level) * latents + weight * towards

    def _log_step(self) -> float:
        return self._log_ratios[self._index] - self._log_ratios[self._index - 1]

    def _ratio(self) -> float:
        """The step before, backwards, over the step to `_index`: negative."""
        return (self._log_ratios[self._index - 2] - self._log_ratios[self._index - 1]) / self._log_step()
