"""When checkpoints are due: every so many steps, samples or minutes, or as often as their cost and failures of machines suggest."""

import math

from .checkpoint import CheckpointConfig, Saved

# One interruption in so many hours of a GPU. Six times as pessimistic as what Llama 3 met (arXiv:2407.21783, table 5): 419 that
# nobody expected in 54 days on 16,384 GPUs, one in 50,700 hours.
GPU_HOURS_PER_FAILURE = 8100
# Without a GPU, what ends a run is mostly a person or a machine's restart.
CPU_HOURS_PER_FAILURE = 7 * 24
# Before the first checkpoint has told what it costs.
ASSUMED_COST_SECONDS = 1.0
# When that comes at the latest: it measures the cost, shows early that saving works, and makes a short attempt worth something.
FIRST_SECONDS = 300.0
MIN_SECONDS = 60.0


def young_daly_seconds(cost_seconds: float, failures_per_second: float) -> float:
    """Time between checkpoints that loses the least to writing them, and to steps that failures undo: sqrt(2 cost / failure rate).

    J. W. Young, A first order approximation to the optimum checkpoint interval (1974); J. T. Daly, A higher order estimate of the
    optimum checkpoint interval for restart dumps (2006), whose other terms do not matter where failures are rare.
    """
    return math.sqrt(2 * cost_seconds / failures_per_second)


class SaveSchedule:
    """Says after which steps a checkpoint is due. The same on all ranks, as long as they are told the same."""

    def __init__(self, config: CheckpointConfig, *, processes: int, on_gpu: bool) -> None:
        self._config = config
        hours = GPU_HOURS_PER_FAILURE / processes if on_gpu else CPU_HOURS_PER_FAILURE
        self._failure = f"a failure every {hours:,.3g} hours"
        self._failures_per_second = 1 / (3600 * hours)
        self._cost_seconds: float | None = None
        self._total_seconds = 0.0
        self._samples = 0
        self._seconds = 0.0

    def start(self, *, samples: int, seconds: float) -> None:
        """The run begins or goes on here: with the samples trained on so far, at a time of the clock that `is_due` is asked by."""
        self._samples, self._seconds = samples, seconds

    def is_due(self, *, step: int, samples: int, seconds: float) -> bool:
        """Whether a save begins after `step` steps, when so many samples were trained on; to be asked after every step.

        `seconds` is rank 0's clock. After a yes, the time to the next one runs.
        """
        config = self._config
        if config.every_steps is not None:
            is_due = config.every_steps > 0 and step % config.every_steps == 0
        elif config.every_samples is not None:
            is_due = samples // config.every_samples > self._samples // config.every_samples
        else:
            is_due = seconds - self._seconds >= self.interval_seconds()
        if is_due:
            self._samples, self._seconds = samples, seconds
        return is_due

    def saved(self, saved: Saved) -> None:
        """What a save cost; one that failed tells nothing."""
        if not saved.failure:
            self._cost_seconds, self._total_seconds = saved.blocking_seconds, saved.total_seconds

    def interval_seconds(self) -> float:
        """Seconds to the next checkpoint where they go by time."""
        if self._config.every_minutes is not None:
            return 60 * self._config.every_minutes
        cost = ASSUMED_COST_SECONDS if self._cost_seconds is None else self._cost_seconds
        # The disk must come to rest: half of the time at most goes to writing.
        seconds = max(young_daly_seconds(cost, self._failures_per_second), MIN_SECONDS, 2 * self._total_seconds)
        return min(seconds, FIRST_SECONDS) if self._cost_seconds is None else seconds

    def explanation(self) -> str:
        """How far checkpoints lie apart, and why, for the log."""
        config = self._config
        if config.every_steps is not None:
            return (
                f"a checkpoint every {config.every_steps} steps"
                if config.every_steps
                else "a checkpoint at the end only"
            )
        if config.every_samples is not None:
            return f"a checkpoint every {config.every_samples} samples"
        minutes = f"{self.interval_seconds() / 60:.3g} minutes"
        if config.every_minutes is not None:
            return f"a checkpoint every {minutes}"
        if self._cost_seconds is None:
            every = f"a checkpoint after {minutes}, and then as often as what it costs suggests"
        else:
            every = f"a checkpoint every {minutes}: training stands still for {self._cost_seconds:.2g} s at each"
        return (
            f"{every}; {self._failure} is expected (Young and Daly; checkpoint.every_minutes, every_steps or every_samples sets "
            "another interval)"
        )
