"""Trains configured runs as train_program.py does, and writes down every sample of which a loss was computed.

A run can be interrupted in the middle of a step: by waiting to be killed, by a stop file, or by a signal to its last rank alone.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from muybridge.data import workers
from muybridge.data.batch import VideoBatch
from muybridge.data.ledger import DataBudgetError
from muybridge.tests.data.time_limits import time_limits_for
from muybridge.tests.end_to_end.damaged_decoder import HANGS
from muybridge.train import tasks
from muybridge.train.config import load_train_config
from muybridge.train.engine import initialise_distributed
from muybridge.train.engine_config import EngineConfig
from muybridge.train.exit_codes import exit_process
from muybridge.train.life import Asked
from muybridge.train.one_attempt import OneAttempt
from muybridge.train.trainer import Trainer


class RecordedTask(tasks.TextToVideoTask):
    """The task, with a line of JSON for each sample: what the batch held and what the loss was given."""

    records: Path
    interruption: dict[str, Any]

    def losses(self, model: Any, batch: VideoBatch, *, purpose: str = "") -> tasks.SampleLosses:
        if purpose:  # not training
            return super().losses(model, batch, purpose=purpose)
        with mock.patch.object(tasks, "rectified_flow_loss", wraps=tasks.rectified_flow_loss) as flow:
            found = super().losses(model, batch)
        [(_, latents, text, noise, noise_levels)] = [call.args for call in flow.call_args_list]
        assert batch.frames is not None
        assert len(latents) == len(batch)
        lines = [
            {
                "step": batch.step,
                "slot": int(batch.slots[i]),
                "weight": float(batch.weights[i]),
                "dataset": int(batch.datasets[i]),
                "row": int(batch.rows[i]),
                "key": batch.keys[i],
                "shape": list(batch.frames.shape[1:4]),
                "frames": digest(batch.frames[i]),
                "caption": batch.captions[i],
                "text": digest(text[i]),
                "noise": digest(noise[i]),
                "noise_level": float(noise_levels[i]),
                "loss": float(found.total[i]),
            }
            for i in range(len(batch))
        ]
        with open(self.records, "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        if self.interruption.get("step") == batch.step:
            self._interrupt()
        return found

    def _interrupt(self) -> None:
        how, run_dir = self.interruption["how"], Path(self.config.run_dir)
        if how == "kill":
            (run_dir / "waiting").touch()
            time.sleep(1000)
        elif how == "stop file":
            (run_dir / "STOP").touch()
        elif dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def digest(tensor: Tensor) -> str:
    """A short hash of a tensor's bytes."""
    return hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def train(overrides: list[str], records: str, interruption: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Trains one run and says what became of it on this rank."""
    torch.manual_seed(123)  # what came before must not matter
    attempt: OneAttempt | None = None
    trainer: Trainer | None = None
    try:
        config = load_train_config(overrides)
        attempt = OneAttempt(config)
        Path(config.run_dir).mkdir(exist_ok=True)
        RecordedTask.records = Path(config.run_dir) / f"samples-{records}-{dist.get_rank()}.jsonl"
        RecordedTask.interruption = interruption
        trainer = Trainer(config, device, attempt)
        return {"code": trainer.run(), "counts": trainer.loader.counts()}
    except (ValueError, DataBudgetError) as error:
        return {type(error).__name__: str(error)}
    finally:
        if trainer is not None:
            trainer.loader.close()
            trainer.engine.destroy()
        if attempt is not None:
            attempt.end(0, "", asked=Asked.scheduler)


def main(plan: Path, out: Path) -> None:
    device = initialise_distributed(EngineConfig())
    settings = json.loads(plan.read_text())
    if program := settings["decoding program"]:
        workers._COMMAND = [sys.executable, program]
    mine = {}
    with (
        mock.patch("muybridge.train.trainer.build_task", RecordedTask),
        time_limits_for(lambda _, data: data.endswith(HANGS)),
    ):
        for run in settings["runs"]:
            mine[run["name"]] = train(run["overrides"], run["records"], run["interruption"], device)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({name: [ranks[name] for ranks in found] for name in mine}, indent=1))
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
