"""From the overrides of `muybridge submit` to what is queued, with all faults of the run and of Slurm in one message."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString
from rich.console import Console
from rich.progress import track

from ..train.compose import ConfigFaults, compose_config, fault_message, read_settings
from ..train.config import SCHEMA_NAME, TrainConfig, load_train_config
from ..train.secrets import refuse_secrets_in_overrides
from .config import SlurmConfig, site_file
from .render import read_template, render, resource_lines
from .run_checks import done_words, missing_data, other_run_fault, path_fault
from .sweep import Combination, expand, parse

_MOST_NAME_CHARACTERS = 40
_MOST_IDLE_SHARE = 0.2


@dataclass
class SubmitConfig:
    """The settings of `muybridge submit` that are not the run's."""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class Run:
    """One run, which may be one of a sweep's."""

    run_dir: Path  # absolute
    overrides: list[str]  # of `muybridge train`
    config: TrainConfig
    chosen: list[str]  # the overrides that tell it from the others of its sweep


@dataclass(frozen=True)
class Plan:
    """What is queued: one job, or one job array for a sweep."""

    submit_dir: Path  # the run directory, or the folder that the sweep's lie in
    runs: list[Run]
    is_sweep: bool
    slurm: SlurmConfig
    job_name: str
    script: str
    warnings: list[str]  # of what is allowed and may yet be a mistake
    still_needed: list[str]  # in a dry run, files that the settings name and that are not there

    @property
    def script_path(self) -> Path:
        return self.submit_dir / "slurm" / "train.sbatch"

    def sbatch_arguments(self, *, previous: int | None = None) -> list[str]:
        """Arguments of sbatch, beside what the script says; `previous` is the job before it in a chain."""
        # Never two jobs at work on one run, whatever else happens: those of one name go one after the other.
        dependencies = ["singleton"]
        if previous is not None:
            dependencies.append(f"afterany:{previous}")
        elif self.slurm.after is not None:
            dependencies.append(f"afterok:{self.slurm.after}")
        arguments = [f"--chdir={self.submit_dir}", f"--dependency={','.join(dependencies)}"]
        if self.is_sweep:
            at_a_time = f"%{self.slurm.parallel}" if self.slurm.parallel else ""
            arguments.append(f"--array=0-{len(self.runs) - 1}{at_a_time}")
        return [*arguments, str(self.script_path)]


def build_plan(overrides: list[str], *, multirun: bool, dry_run: bool) -> Plan:
    """Compose and check everything. Raises ValueError with all faults in one message; writes nothing and asks no Slurm."""
    refuse_secrets_in_overrides(overrides)  # first: other messages repeat what they are about
    of_slurm = [text for text in overrides if _is_of_slurm(text)]
    of_train = [text for text in overrides if not _is_of_slurm(text)]
    slurm, faults = _slurm_config(of_slurm)
    template, template_faults = read_template(slurm, "slurm.template")
    if slurm.template is None or Path(slurm.template).is_file():  # else that is the fault
        faults += template_faults
    combinations, common = [Combination("", [])], of_train
    if multirun:
        try:
            sweep = expand(of_train)
            combinations, common = sweep.combinations, sweep.common
        except ValueError as error:
            raise ValueError(fault_message([*faults, str(error)])) from error
    elif slurm.parallel:
        faults.append(f"slurm.parallel={slurm.parallel} must be 0 without --multirun: there is one run")
    runs: list[Run] = []
    folder = _sweep_folder(common) if multirun else None
    fault_of: dict[str, list[str]] = {}
    shown = Console(stderr=True)
    for combination in track(
        combinations, "checking the runs", console=shown, transient=True, disable=len(combinations) < 5
    ):
        run, found = _check_run(common, combination, folder, world_size=max(1, slurm.processes), dry_run=dry_run)
        runs += [run] if run is not None else []
        for fault in found:
            fault_of.setdefault(fault, []).append(" ".join(combination.overrides))
    for fault, where in fault_of.items():
        faults.append(fault if len(where) == len(combinations) else f"{fault} (with {where[0]})")
    done = [words for run in runs if not run.config.dry_run and (words := done_words(run.config))]
    if done and len(done) == len(combinations):
        faults += done[:1]
    if multirun and folder is None and not faults:
        faults.append("run_dir=FOLDER must be set with --multirun, for the runs to lie in")
    if faults:
        raise ValueError(fault_message(faults))
    submit_dir = folder or runs[0].run_dir
    is_dry = dry_run or runs[0].config.dry_run
    still_needed = (
        [text for run in runs for text in [*run.config.missing_inputs(), *missing_data(run.config)]] if is_dry else []
    )
    name = job_name(slurm, submit_dir)
    resources = resource_lines(slurm, job_name=name, is_array=multirun)
    numbers = {
        "LEAD_SECONDS": slurm.lead_seconds,
        "RESTART_LIMIT": runs[0].config.restart_limit,
        "HEALTH": int(slurm.health),
        "PROCESSES_PER_NODE": slurm.tasks_per_node,
    }
    script = render(template, resources=resources, numbers=numbers)
    warnings = [*slurm.warnings(), *(text for run in runs for text in _idle_places(run.config, slurm.processes))]
    if done:
        warnings.append(f"{len(done)} of {len(runs)} runs are done already, and their tasks will end at once")
    unique = [list(dict.fromkeys(texts)) for texts in (warnings, still_needed)]
    return Plan(submit_dir, runs, multirun, slurm, name, script, *unique)


def job_name(slurm: SlurmConfig, submit_dir: Path) -> str:
    """The same for every job of a directory and for no other: readable, then 6 digits of its place."""
    place = hashlib.sha256(os.fsencode(os.path.realpath(submit_dir))).hexdigest()[:6]
    words = re.sub(r"[^A-Za-z0-9_.-]+", "-", submit_dir.name)[:_MOST_NAME_CHARACTERS].strip("-.")
    return f"{slurm.name or words or 'run'}-{place}"


def quoted(value: str) -> str:
    """A text as the value of an override."""
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def _slurm_config(overrides: list[str]) -> tuple[SlurmConfig, list[str]]:
    """The site's settings with those of the command line on top, and what is wrong with either."""
    site, faults, path = SlurmConfig(), [], None
    try:
        if (path := site_file()) is not None:
            site = read_settings(path, config_class=SlurmConfig)
    except ConfigFaults as error:
        site, faults = error.partial, error.faults
    except ValueError as error:
        faults = [str(error)]
    of_site = set(site.faults("slurm"))
    composed = SubmitConfig(site)
    try:
        composed = compose_config(
            overrides, config_class=SubmitConfig, config_name="submit", schema_name="submit_schema", defaults=composed
        )
    except ConfigFaults as error:
        composed, faults = error.partial, [*faults, *error.faults]
    except ValueError as error:
        faults = [*faults, str(error)]
    found = composed.slurm.faults("slurm")
    return composed.slurm, [*faults, *(f"{path}: {fault}" if fault in of_site else fault for fault in found)]


def _sweep_folder(common: list[str]) -> Path | None:
    """Where the settings put the runs of a sweep, as an absolute path; None where they do not compose, as each run says."""
    try:
        config = compose_config(common, config_class=TrainConfig, config_name="train", schema_name=SCHEMA_NAME)
    except ConfigFaults as error:
        config = error.partial
    except ValueError:
        return None
    return Path(os.path.abspath(config.run_dir)) if config.run_dir else None


def _check_run(
    common: list[str], combination: Combination, folder: Path | None, *, world_size: int, dry_run: bool
) -> tuple[Run | None, list[str]]:
    """One run and its faults; its directory is in the sweep's `folder`, or where the settings put it."""
    settings = [*common, *combination.overrides]
    if folder is not None:
        settings.append(f"run_dir={quoted(str(folder / combination.name))}")
    try:
        config = load_train_config([*settings, "dry_run=true"] if dry_run else settings, world_size=world_size)
    except ConfigFaults as error:
        # A folder that is missing is missing whatever else is wrong.
        also = missing_data(error.partial) if not (dry_run or error.partial.dry_run) else []
        return None, [*error.faults, *also]
    except ValueError as error:
        return None, [str(error)]
    config.run_dir = os.path.abspath(config.run_dir)  # the job's working directory may be another one day
    if folder is None:
        settings.append(f"run_dir={quoted(config.run_dir)}")
    faults = [path_fault(config.run_dir)]
    if not config.dry_run:
        faults += [*missing_data(config), other_run_fault(config)]
    return Run(Path(config.run_dir), settings, config, combination.overrides), [fault for fault in faults if fault]


def _idle_places(config: TrainConfig, processes: int) -> list[str]:
    """Where the batch does not fill the places that so many processes have for it."""
    found = []
    for bucket in config.buckets(processes):
        groups = config.data_groups(processes)
        at_once = bucket.micro_batch * groups
        places = -(-bucket.global_batch // at_once) * at_once
        if (idle := 1 - bucket.global_batch / places) > _MOST_IDLE_SHARE:
            sharing = "processes" if groups == processes else "groups of processes"
            found.append(
                f"{idle:.0%} of the GPUs' work is for nothing: {bucket.global_batch} samples of {bucket.name} in a step, and "
                f"micro_batch {bucket.micro_batch} x {groups} {sharing}; change global_batch, micro_batch or the processes"
            )
    return found


def _is_of_slurm(text: str) -> bool:
    override = parse(text)
    key = override.key_or_group if override is not None else text.partition("=")[0].lstrip("+~")
    return key == "slurm" or key.startswith("slurm.")
