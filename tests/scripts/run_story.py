"""Writes the diary and the metrics of a made-up run, through the classes of a real one but with a clock of its own."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from muybridge.train import attempts, tracking
from muybridge.train.attempts import Attempts
from muybridge.train.tracking import VALIDATION_SECONDS, Tracker, TrackingConfig, WandbMode


class RunStory:
    """A run of 1 s a step, of which 0.2 s are waiting for data, with a row every 10 steps; it begins at second 1000."""

    step_seconds, data_seconds, row_steps = 1.0, 0.2, 10

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir, self.now, self.step = run_dir, 1000.0, 0
        self._draw = random.Random(0)
        self.tracker: Tracker | None = None
        clock = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now)
        monkeypatch.setattr(attempts, "time", clock)
        monkeypatch.setattr(tracking, "time", clock)
        monkeypatch.setattr(tracking, "PLAIN_LINE_SECONDS", math.inf)
        run_dir.mkdir(parents=True, exist_ok=True)

    def start(self, step: int = 0, *, set_up: float = 50.0, life: str = "") -> None:
        self.leave()  # killed, if it was still there
        self.diary, self.step = Attempts(self.run_dir), step
        checkpoint = Path(f"step-{step:08d}") if step else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MUYBRIDGE_LIFE_DIR", life)
            self.diary.start(world_size=8, code="c0de")
        self.diary.begin(step, checkpoint)
        self.now += set_up
        self.tracker = Tracker(
            self.run_dir,
            TrackingConfig(wandb=WandbMode.off),
            run_config={},
            total_steps=10**9,
            start_step=step,
            attempt=self.diary.number,
        )

    def train(self, until: int, *, loss_factor: float = 1.0) -> None:
        while self.step < until:
            self.step += 1
            self.now += self.step_seconds
            if self.step % self.row_steps == 0:
                loss = (0.3 + 2 / (1 + self.step / 200)) * self._draw.uniform(0.9, 1.1) * loss_factor
                row = {
                    "loss": loss,
                    "grad_norm": loss * self._draw.uniform(0.8, 1.6),
                    "lr": 1e-4,
                    "seconds_per_step": self.step_seconds,
                    "samples_per_second": 8.0,
                    "data_seconds_per_step": self.data_seconds,
                    "model_seconds_per_step": 0.6 * self.step_seconds,
                    "optimizer_seconds_per_step": 0.1 * self.step_seconds,
                    "skipped_steps": float(self.step % 500 == 0),
                }
                self._log(row)

    def save(self, *, blocking: float = 2.0) -> None:
        self.now += blocking
        self.diary.commit(self.step, blocking_seconds=blocking, total_seconds=blocking, nbytes=10**9)

    def validate(self, seconds: float = 20.0) -> None:
        self.now += seconds
        loss = 0.4 + 2 / (1 + self.step / 200)
        self._log({"validation_loss": loss, VALIDATION_SECONDS: seconds})

    def roll_back(self, to_step: int, cause: str) -> None:
        self.diary.roll_back(from_step=self.step, to_step=to_step, cause=cause)
        self.step = to_step
        assert self.tracker is not None
        self.tracker.drop_rows_after(to_step)

    def end(self, exit_code: int, cause: str, *, on_request: bool = False) -> None:
        self.leave()
        self.diary.end(step=self.step, exit_code=exit_code, cause=cause, on_request=on_request)

    def leave(self) -> None:
        """End without a word."""
        if self.tracker is not None:
            self.tracker.close()
        self.tracker = None

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def _log(self, row: dict[str, float]) -> None:
        assert self.tracker is not None
        self.tracker.log(self.step, row)
