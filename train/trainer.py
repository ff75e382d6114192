"""The training loop: set-up in its one right order, steps, and what happens every so many of them.

Progress is counted in optimizer steps. Data, noise and learning rate are functions of the step, so a resumed run needs the
weights, the optimizer and one number.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..data.batch import VideoBatch
from ..data.config import Access
from ..data.stream import NOT_EXACT
from .checkpoint import (
    committed_checkpoints,
    find_checkpoint,
    load_checkpoint,
    read_weights,
    remove_old_checkpoints,
    save_checkpoint,
)
from .compose import plain
from .config import TaskKind, TrainConfig
from .ema import EMA
from .engine import Engine, StepResult
from .exit_codes import ExitCode
from .feed import Feed
from .fixed_settings import changed_settings, fixed_settings
from .loaders import build_loaders
from .optimizer import build_optimizer, learning_rate
from .preemption import Requests, StopAgreed
from .provenance import write_provenance
from .tasks import build_task, next_command
from .throughput import MetricsWindow
from .tokenizer import prepare_tokenizer
from .tracking import Tracker
from .trained_weights import prepare_weights
from .validate import sample_videos, validation_losses

MAX_SKIPPED_IN_A_ROW = 20
GHOST_SHARE_WORTH_A_NOTE = 0.03
CURE_FOR_DIVERGENCE = (
    "nothing newer than the last checkpoint was kept: lower optimizer.lr or optimizer.gradient_clipping and run again to "
    "resume from there"
)


class Diverged(RuntimeError):
    """The loss or the gradient stopped being finite."""


class Trainer:
    """One run: its parts, and the loop over them."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.world = world
        self.buckets = config.buckets(world)
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        if config.threads:
            torch.set_num_threads(config.threads)

        # Data first: its mistakes are the commonest, and it needs no model to find them.
        self.loader, self.validation_loader = build_loaders(config, self.buckets)
        prepare_tokenizer(config, self.loader)
        self.task = build_task(config, device)
        torch.manual_seed(config.seed)  # the same weights on every rank, whatever was drawn before
        model = self.task.build_model()
        resume_from = find_checkpoint(self.checkpoints)
        self.lora_facts = prepare_weights(model, config, resume_from)
        # DeepSpeed casts and shards the model, so weights must be final; the EMA copies what DeepSpeed made.
        self.engine = Engine(
            model,
            build_optimizer(model, config.optimizer),
            config=config.deepspeed,
            micro_batch=config.micro_batch,
            gradient_clipping=config.optimizer.gradient_clipping,
        )
        self.ema = EMA(self.engine, config.ema)
        self.start_step = 0
        self.window = MetricsWindow()
        self.feed = Feed(self.loader, max_bad_share=config.data.max_bad_share)
        data_changed = False
        if resume_from is not None:
            facts = load_checkpoint(resume_from, engine=self.engine, ema=self.ema)
            data_changed = self._resume_data(resume_from, facts)
            self.start_step = facts["step"]
            self.window.restore(facts["metrics_window"])

        self.tracker: Tracker | None = None
        if self.rank == 0:
            write_provenance(config, data_fingerprint=self.loader.fingerprint)
            self.tracker = Tracker(
                self.run_dir,
                config.tracking,
                run_config=plain(config),
                total_steps=config.steps,
                start_step=self.start_step,
            )
            if resume_from is not None:
                self.tracker.note(f"resumed from {resume_from}")
            if config.data.access is Access.stream:
                self.tracker.note(f"muybridge: {NOT_EXACT}")
            if data_changed:
                self.tracker.note(
                    f"muybridge: the data changed: a new order of samples begins at step {self.start_step}"
                )
            if (share := self.loader.ghost_share()) > GHOST_SHARE_WORTH_A_NOTE:
                self.tracker.note(
                    f"muybridge: {share:.0%} of the computation is for nothing: global batches that are no multiples of "
                    f"micro_batch x processes: {self._uneven_buckets()}"
                )
        # Last, so that Ctrl-C during set-up still ends at once.
        self.requests = Requests(self.run_dir)

    def run(self) -> int:
        """Train to the last step, or to an agreed stop; returns the exit code."""
        try:
            step = self._train_steps()
            done = step >= self.config.steps
            if done:
                self._export()
            self.feed.close()
            self._say_goodbye(step, done=done)
        finally:  # the terminal gets its cursor back and W&B its last rows however a run ends
            if self.tracker is not None:
                self.tracker.close()
        return ExitCode.done if done else ExitCode.requeue

    def _train_steps(self) -> int:
        """The loop; returns the step that is reached and saved."""
        step, saved_step, stopped, skipped_in_a_row = self.start_step, self.start_step, False, 0
        window = self.window
        window.begin()
        self.feed.start(step)
        while step < self.config.steps and not stopped:
            lr = learning_rate(self.config.optimizer, step, self.config.steps)
            window.wait_for_data()
            try:
                micro_batches = self.feed.next(self.requests)
            except StopAgreed:
                break
            window.data_arrived()
            result = self._optimizer_step(micro_batches, lr)
            if result.applied:
                self.ema.update(step + 1)
            step += 1
            window.end_step(samples=micro_batches[0].step_samples, applied=result.applied)
            skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise Diverged(
                    f"{skipped_in_a_row} steps in a row up to step {step} had gradients that are not finite; "
                    f"{CURE_FOR_DIVERGENCE}"
                )
            if step % self.config.tracking.log_every_steps == 0 or step == self.config.steps:
                row = window.close(result, lr)
                if self.tracker is not None:
                    self.tracker.log(step, {**row, "samples_seen": self.feed.samples_before(step)})
                self._check_convergence(step, row)
            # Before the checkpoint: it must count this step's bad clips, and none may be of a step that was one too many.
            agreed = self.feed.agree(self.requests, step, is_written=True)
            stopped = agreed.stop
            if self._is_due(step, self.config.checkpoint.every_steps or 0) and step < self.config.steps:
                saved_step = self._save(step, saved_step)
            if self._is_due(step, self.config.validation.every_steps) or (
                step == self.config.steps and self.config.validation.every_steps
            ):
                began = time.perf_counter()
                try:
                    self._validate(step)
                except StopAgreed:  # what is missing is looked at when the run goes on
                    stopped = True
                window.leave_out(time.perf_counter() - began)
        if step > saved_step or not committed_checkpoints(self.checkpoints):
            self._save(step, saved_step, must_succeed=True)
        return step

    def _optimizer_step(self, micro_batches: list[VideoBatch], lr: float) -> StepResult:
        for number, batch in enumerate(micro_batches, start=1):
            batch = batch.to(self.task.device)
            losses = self.task.losses(self.engine, batch)
            # The step's loss is the mean over its samples; the engine averages over the ranks.
            loss = (losses.total * batch.weights).sum() * (self.world / batch.step_samples)
            self.engine.backward(loss, is_last=number == len(micro_batches))
            self.window.add(losses.total, losses.terms, batch.weights)
        return self.engine.step(lr)

    def _check_convergence(self, step: int, row: dict[str, float]) -> None:
        # Every rank holds the same reduced row, so all of them stop together.
        if not math.isfinite(row["loss"]):
            raise Diverged(f"the loss is {row['loss']} at step {step}; {CURE_FOR_DIVERGENCE}")

    def _save(self, step: int, saved_step: int, *, must_succeed: bool = False) -> int:
        """Save and return the step now safe on disk; a failed save is reported, and training goes on."""
        state = {
            **fixed_settings(self.config),
            **self.feed.state(step),
            "metrics_window": self.window.state(),
            "versions": {"torch": torch.__version__},
            **({"lora": self.lora_facts} if self.lora_facts else {}),
        }
        bad_clips = self.feed.shared_ledger()
        try:
            save_checkpoint(
                self.checkpoints,
                step=step,
                engine=self.engine,
                ema=self.ema,
                run_state=state,
                bad_clips=bad_clips,
            )
        except OSError as error:
            if must_succeed:
                raise
            if self.tracker is not None:
                self.tracker.note(f"muybridge: {error}; training goes on")
            return saved_step
        if self.rank == 0:
            remove_old_checkpoints(self.checkpoints, self.config.checkpoint.keep_last)
        return step

    def _validate(self, step: int) -> None:
        with self.ema.swapped_in():
            row: dict[str, float] = {}
            if self.validation_loader is not None:
                row = validation_losses(
                    self.engine,
                    self.task,
                    self.validation_loader,
                    clips=self.config.validation.clips,
                    may_stop=self.requests.check,
                )
            videos = []
            if self.config.task is TaskKind.text_to_video and self.config.validation.prompts:
                folder = self.run_dir / "validation" / f"step-{step:08d}"
                videos = sample_videos(self.engine, self.task, self.config, folder, may_stop=self.requests.check)
        if self.tracker is not None:
            if row:
                self.tracker.log(step, row)
            self.tracker.log_videos(step, videos)

    def _export(self) -> None:
        """Write the EMA weights for use elsewhere, from the checkpoint: no rank has to hold what the others own."""
        if self.rank == 0:
            newest = committed_checkpoints(self.checkpoints)[-1]
            clips = self.loader.every_row(self.config.micro_batch)
            self.exported = self.task.export(self.run_dir / "model", read_weights(newest), clips)
        dist.barrier()

    def _say_goodbye(self, step: int, *, done: bool) -> None:
        if self.tracker is None:
            return
        if done:
            self.tracker.note(
                f"muybridge: {step} steps done; wrote {self.run_dir}/metrics.jsonl, checkpoints/ and {self.exported}"
            )
            if self.config.task is TaskKind.text_to_video:
                self.tracker.note(f"next: {next_command(self.config)}")
        else:
            self.requests.clear()
            self.tracker.note(f"muybridge: stopped on request at step {step}; the same command goes on from there")

    def _uneven_buckets(self) -> str:
        return ", ".join(
            f"{bucket.name}: {bucket.global_batch} of {bucket.micro_batch} x {self.world}"
            for bucket in self.buckets
            if bucket.global_batch % (bucket.micro_batch * self.world)
        )

    def _resume_data(self, folder: Path, facts: dict[str, Any]) -> bool:
        """Go on where the loader was; whether the data changed, as far as that is allowed. Raises ValueError."""
        if changed := changed_settings(self.config, facts):
            raise ValueError(
                f"{folder} cannot be continued, these changed: {'; '.join(changed)} (undo it, or choose another run_dir)"
            )
        return self.feed.resume(folder, facts)

    @staticmethod
    def _is_due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0
