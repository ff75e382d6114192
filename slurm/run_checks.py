"""Whether a run can be queued in its directory: what it needs is there, nobody is at work in it, and it is not another run's."""

import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..data.config import Access
from ..models.dit import DiT
from ..models.lora import add_lora
from ..train.attempts import read_attempts, resume_in_force
from ..train.checkpoint_folder import candidates_to_resume
from ..train.config import TaskKind, TrainConfig
from ..train.exit_codes import ExitCode
from ..train.fixed_settings import refuse_changed_settings
from ..train.fragments import read_run_state
from ..train.run_lock import holder_at_work
from .run_files import read_run_files
from .run_jobs import queued_jobs

_MOST_WATCHED = 200  # locks at the same time


def missing_data(config: TrainConfig) -> list[str]:
    """Datasets that the settings name and this machine does not have, which a job would find out after hours in the queue."""
    caches = "latents" if config.data.access is Access.latents else ""
    found = []
    for name, source in config.training_data().sources().items():
        field = f"data.datasets.{name}.path" if name else "data.path"
        if source.weight > 0 and not _is_there(source.path, may_be_pattern=config.data.access is Access.stream):
            what = f"data.latents={config.data.latents}" if caches else f"{field}={source.path}"
            cure = "muybridge encode" if caches else "muybridge prepare SRC OUT"
            found.append(f"{what} must be there: {source.path} is no folder (make it with: {cure})")
    validation = config.validation_data()
    if validation is not None and not _is_there(validation.path):
        found.append(f"validation.path={config.validation.path} must be there: {validation.path} is no folder")
    return found


def path_fault(run_dir: str) -> str:
    """What is wrong with the name of a run directory, or an empty string."""
    signs = [sign for sign in ("%", "\\", "${") if sign in run_dir] + [
        sign for sign in run_dir if not sign.isprintable()
    ]
    if not signs:
        return ""
    return f"run_dir={run_dir!r} must be without {signs[0]!r}: Slurm would read it otherwise in the names of logs"


def other_run_fault(config: TrainConfig) -> str:
    """Why a run of these settings cannot go on in its directory, as `train` itself would find, or an empty string."""
    run_dir = Path(config.run_dir)
    try:
        names = candidates_to_resume(run_dir / "checkpoints", resume_in_force(run_dir, config.resume))
        if names:
            refuse_changed_settings(config, checkpoint := run_dir / "checkpoints" / names[0])
            return _other_model(config, checkpoint)
    except (ValueError, OSError, KeyError, TypeError) as error:
        return f"run_dir={run_dir}: {error}"
    return ""


def _other_model(config: TrainConfig, checkpoint: Path) -> str:
    """How the model differs in size from a checkpoint's, or an empty string: by the parameters that both have, and the blocks."""
    if config.task is TaskKind.video_vae:
        return ""
    with torch.device("meta"):
        dit = DiT(config.model)
        if config.lora.is_on:
            add_lora(dit, config.lora)
    now = {f"transformer.{name}": list(parameter.shape) for name, parameter in dit.named_parameters()}
    saved: dict[str, list[int]] = read_run_state(checkpoint).get("shapes", {})
    changed = [
        f"{name} has the shape {saved[name]} saved, {now[name]} now"
        for name in now
        if saved.get(name, now[name]) != now[name]
    ]
    blocks = [
        {name.split(".")[2] for name in names if name.startswith("transformer.blocks.")} for names in (saved, now)
    ]
    if all(blocks) and len(blocks[0]) != len(blocks[1]):
        changed.insert(0, f"{len(blocks[0])} blocks saved, {len(blocks[1])} now")
    if not changed:
        return ""
    return (
        f"{checkpoint} cannot be continued, the model is another one: {changed[0]} (undo it in model or lora, or choose another "
        "run_dir)"
    )


def done_words(config: TrainConfig) -> str:
    """Why a job of a run would find nothing to do, which it would find out on all of its nodes; "" where there is something."""
    if config.resume not in ("auto", "must"):
        return ""
    run_dir = Path(config.run_dir)
    try:
        names = candidates_to_resume(run_dir / "checkpoints", config.resume)
    except (ValueError, OSError):  # other_run_fault says so
        return ""
    step = int(names[0].removeprefix("step-")) if names else 0
    # What comes after the last step may be left to do.
    is_finished = any((attempt.end or {}).get("exit_code") == ExitCode.done for attempt in read_attempts(run_dir))
    if step > config.steps or (step == config.steps and is_finished):
        return (
            f"run_dir={run_dir} is done (step {step}, and steps={config.steps}): set steps higher to train on, or choose another "
            "run_dir"
        )
    return ""


def refuse_busy(submit_dir: Path, run_dirs: Sequence[Path]) -> None:
    """Raises ValueError where a run has a job that waits or runs, or an attempt at work outside of Slurm; SchedulerError.

    So do runs that were submitted from `submit_dir` before: their jobs read files there that are about to be replaced.
    """
    run_dirs = list(dict.fromkeys([*run_dirs, *submitted_runs(submit_dir)]))
    files = [read_run_files(run_dir) for run_dir in run_dirs]
    busy = [(found.run_dir, job) for found, jobs in zip(files, queued_jobs(files)) for job in jobs]
    if busy:
        run_dir, job = busy[0]
        others = f" (and {len(busy) - 1} more)" if len(busy) > 1 else ""
        raise ValueError(
            f"run_dir={run_dir} has a job in the queue already: {job.id} ({job.state}){others}. Wait for it, or end it with: "
            f"muybridge cancel {shlex.quote(str(run_dir))}"
        )
    # At the same time: of each lock that a killed job left it takes seconds to see that nobody keeps it up.
    with ThreadPoolExecutor(_MOST_WATCHED) as threads:
        holders = list(threads.map(_holder, run_dirs))
    for run_dir, who in zip(run_dirs, holders):
        if who:
            raise ValueError(
                f"run_dir={run_dir} is in use by another attempt ({who}, in lock.json); stop that, or wait for its end"
            )


def submitted_runs(submit_dir: Path) -> list[Path]:
    """The runs that were submitted from a folder last; [] for none."""
    try:
        fields = (submit_dir / "slurm" / "tasks").read_bytes().split(b"\0")
    except OSError:
        return []
    return [Path(os.fsdecode(field)) for field in fields if field]


def _holder(run_dir: Path) -> str:
    try:
        return holder_at_work(run_dir)
    except OSError as error:
        raise ValueError(f"run_dir={run_dir} cannot be read ({error.strerror or error})") from error


def _is_there(path: str, *, may_be_pattern: bool = False) -> bool:
    is_elsewhere = "://" in path or (may_be_pattern and any(sign in path for sign in "{*?["))
    return is_elsewhere or Path(path).exists()
