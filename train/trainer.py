"""The training loop: set-up in its one right order, steps, and what happens every so many of them.

Progress is counted in optimizer steps. Data, noise and learning rate are functions of the step, so a resumed run needs the
weights, the optimizer and one number.
"""

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..data.batch import VideoBatch
from ..data.ledger import DataBudgetError
from .attempts import resume_in_force
from .build import build_engine
from .checkpoint import Checkpointer, Saved
from .checkpoint_folder import choose_checkpoint, committed_checkpoints, set_aside_newer
from .compile_blocks import CompilationCount
from .compose import plain
from .config import TrainConfig
from .ema import EMA
from .engine import StepResult
from .exit_codes import ExitCode
from .feed import Feed
from .fixed_settings import fixed_settings, refuse_changed_settings
from .fragments import load_checkpoint, read_run_state, read_weights
from .guards import Diverged, Finding, StepGuard, Verdict
from .loaders import build_loaders
from .mesh import build_mesh
from .model_hash import check_same_weights
from .notes import first_notes, last_notes, tell_of_save
from .one_attempt import OneAttempt
from .optimizer import learning_rate
from .preemption import Requests, StopAgreed
from .probe import refuse_different_settings
from .provenance import setting_texts, versions, write_provenance
from .ranks import on_rank_0
from .run_lock import RunIsLocked
from .save_schedule import SaveSchedule
from .saving import CheckpointsFail, build_saver
from .slow_ranks import SlowRanks
from .step_clock import Part, StepClock, time_row
from .tasks import TextToVideoTask, build_task
from .throughput import MetricsWindow
from .tokenizer import prepare_tokenizer
from .tracking import VALIDATION_SECONDS, Tracker
from .utilisation import Utilisation
from .validate import Validation
from .warm_up import warm_up
from .watchdog import Phase


class Trainer:
    """One run: its parts, and the loop over them."""

    def __init__(self, config: TrainConfig, device: torch.device, attempt: OneAttempt) -> None:
        self.config = config
        self.attempt, self.watchdog = attempt, attempt.watchdog
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mesh = build_mesh(config.parallel, timeout_seconds=config.deepspeed.timeout_seconds)
        self.buckets = config.buckets(self.world)
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.clock, self.utilisation = StepClock(device), Utilisation(config, self.world, device)
        if config.threads:
            torch.set_num_threads(config.threads)

        # Data first: its mistakes are the commonest, and it needs no model to find them.
        self.loader, validation_loader = build_loaders(config, self.buckets, self.mesh)
        refuse_different_settings({**setting_texts(config), "data": self.loader.fingerprint})
        self.feed = Feed(self.loader, max_bad_share=config.data.max_bad_share, axis=self.mesh.sequence, device=device)
        resume = on_rank_0(lambda: resume_in_force(self.run_dir, config.resume))
        resume_from = choose_checkpoint(self.checkpoints, resume)
        attempt.start(read_run_state(resume_from)["step"] if resume_from is not None else 0, resume_from)
        if resume_from is not None:
            refuse_changed_settings(config, resume_from)
        prepare_tokenizer(config, self.loader)
        self.task = build_task(config, device, mesh=self.mesh, clock=self.clock)
        built = build_engine(self.task, config, self.mesh, resume_from)
        self.engine, self.lora_facts = built.engine, built.lora_facts
        self.ema = EMA(self.engine, config.ema)
        self.validation = Validation(config, self.engine, self.task, validation_loader, self.mesh)
        self.guard = StepGuard(config.guards)
        self.window = MetricsWindow(device)
        self.slow_ranks = SlowRanks(self.mesh.sequence.size)
        self.compilations: CompilationCount | None = None
        self.step = 0
        self.exported: Path | None = None  # at the end
        data_changed = resume_from is not None and self._restore(resume_from)
        self.saver = build_saver(
            self.checkpoints,
            Checkpointer(
                self.checkpoints, config.checkpoint, self.engine, self.ema, still_ours=attempt.lock.still_ours
            ),
            SaveSchedule(config.checkpoint, processes=self.world, on_gpu=device.type == "cuda"),
            steps_left=config.steps - self.step,
            resumed_step=self.step if resume_from is not None else None,
            taken_up=self._take_up,
        )
        if resume_from is not None:  # nothing can refuse this attempt any more
            set_aside_newer(self.checkpoints, resume_from)

        self.tracker: Tracker | None = None
        try:
            if self.rank == 0:
                self.tracker = Tracker(
                    self.run_dir,
                    config.tracking,
                    run_config=plain(config),
                    total_steps=config.steps,
                    start_step=self.step,
                    attempt=attempt.number,
                )
                notes = first_notes(config, self.loader, self.saver.schedule, resume_from, data_changed=data_changed)
                self.tracker.note("\n".join([*notes, *built.notes]))
                write_provenance(config, data_fingerprint=self.loader.fingerprint)
            # Last: up to here, a signal ends the process at once.
            self.requests = Requests(self.run_dir, timeout_seconds=config.deepspeed.timeout_seconds)
        except BaseException:
            self._close()
            raise

    def run(self) -> ExitCode:
        """Train to the last step, or to an agreed stop; returns the exit code."""
        try:
            self._train_steps()
            self.watchdog.enter(Phase.export, self.step)
            done = self.step >= self.config.steps
            if done:
                self.exported = on_rank_0(self._export)
            self.feed.close()
            self.requests.clear()
            for note in last_notes(self.config, step=self.step, exported=self.exported):
                self._note(note)
        except (Diverged, DataBudgetError):  # on all ranks: what they have begun to save is not lost
            with self.watchdog.phase(Phase.save, self.step), suppress(CheckpointsFail):
                self.saver.finish()
            raise
        finally:
            self.watchdog.enter(Phase.end, self.step)
            self._close()
        return ExitCode.done if done else ExitCode.requeue

    def _close(self) -> None:
        """Give the terminal its cursor back and W&B its last rows, however a run ends; what is being saved is lost."""
        self.saver.close()
        if self.tracker is not None:
            self.tracker.close()

    def _train_steps(self) -> None:
        """The loop, up to the last step or an agreed stop, and the checkpoint of where it ends."""
        self.feed.start(self.step)
        self.saver.schedule.start(samples=self.feed.samples_before(self.step), seconds=0.0)
        goes_on = self._warm_up() and (not self.validation.is_owed(self.step, self.tracker) or self._validate())
        self.window.begin()
        if self.tracker is not None:
            self.tracker.begin(self.step)
        while goes_on and self.step < self.config.steps:
            goes_on = self._train_step()
        with self.watchdog.phase(Phase.save, self.step):
            self.saver.finish()
            if self.saver.saved_step != self.step:
                self.saver.save_now(self.step, **self._to_save())

    def _warm_up(self) -> bool:
        """Compile what the steps will run; False where a stop cut it short. Collective."""
        if not self.config.compile.enabled or not isinstance(self.task, TextToVideoTask):
            return True
        try:
            for name in warm_up(self.engine, self.task, self.buckets, **self.validation.inputs()):
                self.attempt.shape_name = name
                self.watchdog.enter(Phase.warm_up, self.step)
                self.requests.check()
        except StopAgreed:
            return False
        self.compilations = CompilationCount()
        return True

    def _train_step(self) -> bool:
        """A step, and what is due after it; whether the run goes on."""
        try:
            micro_batches = self._wait_for_data()
        except StopAgreed:
            return False
        self.watchdog.enter(Phase.step, self.step)
        self.attempt.shape_name = micro_batches[0].shape_name
        lr = learning_rate(self.config.optimizer, self.step, self.config.steps)
        result, verdict = self._optimizer_step(micro_batches, lr)
        if verdict.rolls_back and self._roll_back(verdict):
            return True
        if verdict.finding is not Finding.fine and not verdict.rolls_back:
            self._note(f"muybridge: {verdict.text}")
        if result.applied:
            self.ema.update(self.step + 1)
        self.utilisation.add(micro_batches[0])
        self.window.end_step(samples=micro_batches[0].step_samples, applied=result.applied)
        self.step += 1
        self.attempt.step = self.step
        if self.step % self.config.tracking.log_every_steps == 0 or self.step == self.config.steps:
            steps, seconds = self.window.steps, self.clock.take()
            row = self.window.close(result, lr)
            row |= time_row(seconds, steps) | self.utilisation.row(row["seconds_per_step"] * steps)
            self._log({**row, "samples_seen": self.feed.samples_before(self.step)})
            if self.compilations is not None and (number := self.compilations.take()):
                self._note(f"muybridge: {number} graphs were compiled at step {self.step}: {self.compilations.cause()}")
            for text in self.slow_ranks.add(seconds[Part.forward]):
                self._note(f"muybridge: {text}")
        # Before the checkpoint: it must count this step's bad clips, and none may be of a step that was one too many.
        is_written, is_lost = self.saver.is_written(), self.attempt.lock.is_lost
        agreed = self.feed.agree(self.requests, self.step, is_written=is_written, is_lost=is_lost)
        if agreed.is_lost:
            raise RunIsLocked(f"run_dir={self.run_dir} was taken over by another attempt, and this one ends")
        if self._is_due(self.config.guards.hash_every_steps):
            check_same_weights(self.engine, self.step)
        self._save_where_due(seconds=agreed.seconds, is_asked=agreed.save, is_written=agreed.is_written)
        goes_on = not agreed.stop
        if self.validation.is_due(self.step):
            goes_on = self._validate() and goes_on
        return goes_on

    def _wait_for_data(self) -> list[VideoBatch]:
        """This rank's batches of the step. Raises StopAgreed."""
        self.watchdog.enter(Phase.data, self.step)
        self.window.wait_for_data()
        batches = self.feed.next(self.requests, arrived=lambda: self.watchdog.enter(Phase.agreement, self.step))
        self.window.data_arrived()
        return batches

    def _optimizer_step(self, micro_batches: list[VideoBatch], lr: float) -> tuple[StepResult, Verdict]:
        self.guard.begin_step(self.step, micro_batches[0].shape_name)
        for number, batch in enumerate(micro_batches, start=1):
            batch = batch.to(self.task.device)
            with self.clock.running(Part.forward):
                losses = self.task.losses(self.engine, batch)
            # The step's loss is the mean over its samples; the engine averages over the ranks.
            loss = (losses.total * batch.weights).sum() * (self.world / batch.step_samples)
            with self.clock.running(Part.backward):
                self.engine.backward(loss, is_last=number == len(micro_batches))
            if not self.mesh.sequence.is_first:  # the first along it speaks for those that have the same clips
                batch = replace(batch, weights=torch.zeros_like(batch.weights))
            self.window.add(losses.total, losses.terms, batch.weights)
            self.guard.add(losses.total, losses.noise_levels, batch)
        with self.clock.running(Part.optimizer):
            result = self.engine.step(lr, accept=self.guard.accept)
        return result, self.guard.end_step(applied=result.applied)

    def _save_where_due(self, *, seconds: float, is_asked: bool, is_written: bool) -> None:
        """Take up the save in flight once all have written their parts, and begin the next one where it is due."""
        with self.watchdog.phase(Phase.save, self.step):
            self.saver.commit_if(is_written)
            samples = self.feed.samples_before(self.step)
            is_due = self.saver.schedule.is_due(step=self.step, samples=samples, seconds=seconds)
            if (is_due or is_asked) and self.step < self.config.steps:
                began = time.perf_counter()
                self.saver.begin(self.step, **self._to_save())
                self.window.leave_out(time.perf_counter() - began)

    def _to_save(self) -> dict[str, Any]:
        """What goes into a checkpoint besides the weights. Collective."""
        state = {
            **fixed_settings(self.config),
            **self.feed.state(self.step),
            "metrics_window": self.window.state(),
            "guard": self.guard.state(),
            "versions": versions(),
            **({"lora": self.lora_facts} if self.lora_facts else {}),
        }
        losses: dict[int, float] = {}
        if self.tracker is not None and self.config.checkpoint.keep_best:  # takes the longer, the more rows there are
            losses = self.tracker.validation_losses()
        return {"state": state, "bad_clips": self.feed.shared_ledger(), "validation_losses": losses}

    def _take_up(self, saved: Saved) -> None:
        if self.tracker is not None and self.attempt.diary is not None:
            tell_of_save(saved, self.tracker, self.attempt.diary)

    def _restore(self, folder: Path) -> bool:
        """Take up everything that a checkpoint holds; whether the data are others by now. Collective. Raises ValueError."""
        facts = load_checkpoint(folder, engine=self.engine, ema=self.ema)
        data_changed = self.feed.resume(folder, facts)
        self.step = facts["step"]
        self.window = MetricsWindow(self.task.device)
        self.window.restore(facts["metrics_window"])
        self.guard.restore(facts["guard"])
        return data_changed

    def _roll_back(self, verdict: Verdict) -> bool:
        """Go back to the newest checkpoint, if any, and on behind the samples of the step that stood out. Collective."""
        from_step, skipped = self.step, self.feed.skipped_steps
        with self.watchdog.phase(Phase.save, from_step):
            self.saver.finish()
            folder = choose_checkpoint(self.checkpoints)
            if folder is None:
                self._note(f"muybridge: {verdict.text}; as there is none yet, the step is left out instead")
                return False
            self._note(f"muybridge: {verdict.text}")
            self._restore(folder)
            set_aside_newer(self.checkpoints, folder)
        self.saver.saved_step = self.step
        self.guard.roll_backs += 1
        self.feed.skipped_steps = skipped + from_step + 1 - self.step
        self.feed.start(self.step)
        self.window.begin()
        self.attempt.step = self.step
        if self.tracker is not None:
            self.tracker.drop_rows_after(self.step)
        if self.attempt.diary is not None:
            self.attempt.diary.roll_back(from_step=from_step, to_step=self.step, cause=verdict.text)
        self._note(f"muybridge: back at step {self.step}; the samples up to step {from_step} are left out")
        return True

    def _validate(self) -> bool:
        """Look at the EMA weights; False where a stop cut it short, which is made up for when the run goes on. Collective."""
        began = time.perf_counter()
        try:
            with self.watchdog.phase(Phase.validation, self.step), self.ema.swapped_in():
                row, videos = self.validation.look(self.step, may_stop=self._may_stop)
        except StopAgreed:
            if self.step == self.config.steps:
                self._note("muybridge: the last validation was cut short by the request to stop, and is left out")
            return False
        seconds = time.perf_counter() - began
        self.window.leave_out(seconds)
        if self.tracker is not None:
            self.tracker.log_videos(self.step, videos)
        self._log({**row, VALIDATION_SECONDS: seconds})
        return True

    def _may_stop(self) -> None:
        # Between two clips or two steps of the sampler, which the limit of a validation is for. Raises StopAgreed.
        self.requests.check()
        self.watchdog.enter(Phase.validation, self.step)

    def _export(self) -> Path:
        """Write the EMA weights for use elsewhere, from the checkpoint: no rank has to hold what the others own."""
        weights = read_weights(committed_checkpoints(self.checkpoints)[-1])
        return self.task.export(self.run_dir / "model", weights, self.loader.every_row(self.config.micro_batch))

    def _note(self, text: str) -> None:
        if self.tracker is not None:
            self.tracker.note(text)

    def _log(self, row: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(self.step, row)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0
