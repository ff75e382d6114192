"""One training run from its settings to the exit of the process: what went wrong, in words and as an exit code."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ..data.ledger import DataBudgetError
from ..data.media_bytes import DatasetChangedError
from ..data.storage import TransientReadError
from .config import TrainConfig
from .deepspeed_contract import check_deepspeed
from .engine import RendezvousError, initialise_distributed
from .exit_codes import ExitCode, exit_process
from .guards import Diverged
from .life import Asked, life_name, tell_end
from .memory import peak_memory_words
from .model_hash import RanksDiffer
from .one_attempt import NoProgress, OneAttempt
from .open_files import allow_open_files
from .preemption import StoppedInSetUp, leave_on_signal
from .probe import ProbeError, probe
from .run_lock import RunIsLocked
from .saving import CheckpointsFail
from .trainer import Trainer

GOES_ON = "the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    code: int
    text: str = ""  # for people, and for the run's diary
    # Whether all ranks are expected to end so, and rank 0 speaks for them.
    is_common: bool = True
    # Who asked for it, if somebody did.
    asked: Asked = Asked.nobody
    # Whether a machine failed its test: the next attempt may be on another.
    failed_probe: bool = False


def train(config: TrainConfig) -> NoReturn:
    """Run or resume training and end the process with the run's exit code."""
    leave_on_signal()
    allow_open_files()
    _print_what_can_be_printed()
    attempt: OneAttempt | None = None
    device = torch.device("cpu")
    try:
        check_deepspeed()
        device = initialise_distributed(config.deepspeed)
        attempt = OneAttempt(config)
        probe(device, Path(config.run_dir))
        trainer = Trainer(config, device, attempt)
        code = trainer.run()
        outcome = Outcome(code, asked=trainer.requests.asked if code == ExitCode.requeue else Asked.nobody)
    except BaseException as error:
        if attempt is not None and (type(error) is RuntimeError or isinstance(error, (dist.DistError, StoppedInSetUp))):
            attempt.watchdog.give_way()  # ends the process, if the error is what another rank's end looks like from here
        outcome = _outcome(error, config, device, attempt)
    if outcome.text and (not outcome.is_common or os.environ.get("RANK", "0") == "0"):
        print(f"muybridge: {outcome.text}", file=sys.stderr)
    if attempt is not None:
        attempt.end(outcome.code, outcome.text, asked=outcome.asked, failed_probe=outcome.failed_probe)
    else:
        tell_end(outcome.code, outcome.asked, outcome.text)
    # What the batch script of a Slurm job has been told: to srun a code is a failure, for which it ends the others.
    is_told = life_name() and outcome.asked is not Asked.nobody and not outcome.text
    exit_process(ExitCode.done if is_told else outcome.code, alone=bool(outcome.text))


def _print_what_can_be_printed() -> None:
    """From here on, output that meets an error, such as a full disk under the log, is lost and ends nothing."""

    def tried(call: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_lose(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            except OSError:
                return len(arguments[0]) if arguments else None  # as if it were written

        return call_or_lose

    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        stream.write, stream.flush = tried(stream.write), tried(stream.flush)


def _outcome(error: BaseException, config: TrainConfig, device: torch.device, attempt: OneAttempt | None) -> Outcome:
    """What an error means for the run, and what there is to do."""
    match error:
        case DatasetChangedError():  # on the rank that reads the clip
            return Outcome(ExitCode.config, str(error), is_common=False)
        case TransientReadError():
            return Outcome(ExitCode.requeue, f"{error}; {GOES_ON}", is_common=False)
        case DataBudgetError():  # every rank says what it met
            return Outcome(ExitCode.data_budget, str(error), is_common=False)
        case Diverged():
            return Outcome(ExitCode.diverged, str(error))
        case NoProgress():
            return Outcome(ExitCode.no_progress, str(error))
        case RunIsLocked():
            return Outcome(ExitCode.requeue, str(error))
        case ProbeError():
            return Outcome(ExitCode.requeue, str(error), failed_probe=True)
        case RendezvousError():
            return Outcome(ExitCode.requeue, str(error), is_common=False)
        case CheckpointsFail() | RanksDiffer():
            return Outcome(ExitCode.requeue, f"{error}; {GOES_ON}")
        case StoppedInSetUp():
            text = f"stopped by {error} before the first step"
            return Outcome(ExitCode.requeue, text, is_common=False, asked=error.asked)
        case ValueError():
            if os.environ.get("MUYBRIDGE_TRACEBACK") == "1":
                traceback.print_exception(error)
            return Outcome(ExitCode.config, str(error))
    if _is_out_of_memory(error):
        where = f" at step {attempt.step} with clips of {attempt.shape_name}" if attempt and attempt.shape_name else ""
        return Outcome(
            ExitCode.out_of_memory,
            f"out of memory{where}, micro_batch={config.micro_batch}, {peak_memory_words(device)} ({_first_line(error)}). Lower "
            "micro_batch, set activations.policy=auto or block, or shard more with deepspeed=zero3 or more processes",
            is_common=False,
        )
    # One rank's failure must end the others too, and a rank that waits for nobody lets the launcher do that.
    traceback.print_exception(error)
    return Outcome(ExitCode.failed, f"{type(error).__name__}: {_first_line(error)}", is_common=False)


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU torch raises a RuntimeError like any other.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
