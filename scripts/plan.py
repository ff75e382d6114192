"""`muybridge plan`: whether a run fits, how fast it will be and what it will cost, said before it is queued."""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from ..slurm.sweep import parse
from ..train.activation_choice import choose_policy
from ..train.activations import ActivationPolicy
from ..train.compose import ConfigFaults, compose_config, fault_message
from ..train.config import TaskKind, TrainConfig, load_train_config
from ..train.config_rules import parallel_faults
from ..train.cost_rates import Cluster
from ..train.costs_run import Conditions, RunCosts
from ..train.gpus import GPUS, gpu_named
from ..train.memory import parameter_counts
from ..train.save_schedule import GPU_HOURS_PER_FAILURE
from .dataset_commands import console, say
from .plan_measured import RESULTS, compared_results
from .plan_plot import plan_picture
from .plan_report import print_plan, without_nan
from .plan_search import Search
from .plan_verdict import Verdict, plan_facts, verdict_of

USAGE = f"""\
usage: muybridge plan +experiment=NAME nodes=N [gpus_per_node=8] [gpu=h100] [KEY=VALUE ...]

Say of a training run, from its settings alone, whether it fits the GPUs, how long a step and the whole run take, and what it
costs; the fewest nodes that would do; and what to change where it does not fit. Nothing is started or queued, and weights and
datasets need not be there.

  muybridge plan +experiment=wan_14b_480p nodes=8
  muybridge plan +experiment=wan_14b_480p nodes=1 gpu=h200 activations.policy=selective parallel.sequence=4
  muybridge plan +experiment=wan_1_3b_lora nodes=1 gpus_per_node=1 gpu=rtx_4090 global_batch=8 out=plans/lora
  muybridge plan +experiment=wan_14b_full nodes=4 price_per_gpu_hour=2.5 json=plan.json

  nodes, gpus_per_node       how large (1 node, 8 GPUs); a process runs on each GPU
  gpu                        {", ".join(gpu.name for gpu in GPUS)} (h100)
  network_gb_per_second      that one GPU sends to other nodes (50, a port of 400 Gbit/s for each)
  price_per_gpu_hour         in any currency; null for no price
  storage_gb_per_second      that all processes write checkpoints with, together (2)
  gpu_hours_per_failure      of one GPU, on average ({GPU_HOURS_PER_FAILURE}; Llama 3 met one in 50700: arXiv:2407.21783, table 5)
  restart_minutes            from a failure to the next step (5)
  json=FILE                  where the figures go
  out=FOLDER                 where plan.json and plan.png go
  KEY=VALUE                  any setting of `muybridge train`

Parameters and FLOPs are exact. Memory and times are predictions from the makers' data sheets and from shares of their peaks in
train/cost_rates.py, all of them estimates; where {RESULTS} has a step of this model on a GPU, the prediction's error is shown.
Data are taken to arrive in time; validation, samples and the start are not in the times.

Exit code: 0 planned, whether it fits or not; 64 for settings that no cluster can run."""


@dataclass
class PlanConfig:
    """Where a run is planned to be."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    # Of one GPU to other nodes.
    network_gb_per_second: float = 50.0
    price_per_gpu_hour: float | None = None
    # Of all processes together.
    storage_gb_per_second: float = 2.0
    gpu_hours_per_failure: float = float(GPU_HOURS_PER_FAILURE)
    restart_minutes: float = 5.0
    # File for the figures; null for none.
    json: str | None = None
    # Folder for plan.json and plan.png; null for none.
    out: str | None = None

    def faults(self) -> list[str]:
        """All breaches of the rules, as complete messages."""
        found = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("nodes", "gpus_per_node")
            if getattr(self, name) < 1
        ]
        for name in ("network_gb_per_second", "storage_gb_per_second", "gpu_hours_per_failure"):
            if not getattr(self, name) > 0:
                found.append(f"{name}={getattr(self, name)} must be positive")
        if self.price_per_gpu_hour is not None and not self.price_per_gpu_hour >= 0:
            found.append(f"price_per_gpu_hour={self.price_per_gpu_hour} must be 0 or more, or null")
        if not self.restart_minutes >= 0:
            found.append(f"restart_minutes={self.restart_minutes} must be 0 or more")
        try:
            gpu_named(self.gpu, "gpu")
        except ValueError as error:
            found.append(str(error))
        return found

    def cluster(self) -> Cluster:
        return Cluster(gpu_named(self.gpu, "gpu"), self.nodes, self.gpus_per_node, 1e9 * self.network_gb_per_second)

    def conditions(self) -> Conditions:
        return Conditions(self.gpu_hours_per_failure, 60 * self.restart_minutes, 1e9 * self.storage_gb_per_second)


def main(argv: list[str]) -> int:
    """Print a plan and write it where asked; returns the exit code. Raises ValueError with all mistakes in one message."""
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        print(USAGE)
        return 0
    place, config = read_settings(argv)
    counts = parameter_counts(config)
    search = Search(config, counts, place.conditions())
    verdict = verdict_of(search, place.cluster())
    measured = compared_results(config, counts, place.cluster())
    facts = plan_facts(verdict, measured, price_per_gpu_hour=place.price_per_gpu_hour)
    print_plan(verdict, facts, console)
    written = write_plan(place, verdict, facts)
    if written:
        say(f"Wrote {' and '.join(written)}.")
    say(f"Next: {next_command(argv, verdict)}")
    if verdict.faster is not None:
        say(f"Or, the fastest here: {submit_command(argv, verdict, verdict.faster)}")
    return 0


def read_settings(overrides: list[str]) -> tuple[PlanConfig, TrainConfig]:
    """The place and the run. Raises ValueError with the faults of both in one message."""
    names = {field.name for field in dataclasses.fields(PlanConfig)}
    of_place = [text for text in overrides if _key(text) in names]
    of_run = [text for text in overrides if _key(text) not in names]
    misspelt, of_run = _misspelt(of_run, names)
    faults: list[str] = []
    try:
        place: PlanConfig = compose_config(
            of_place, config_class=PlanConfig, config_name="plan", schema_name="plan_schema"
        )
    except ConfigFaults as error:
        place, faults = error.partial, error.faults
    faults += misspelt + place.faults()
    world = max(1, place.nodes) * max(1, place.gpus_per_node)
    try:
        config = load_train_config([*of_run, "dry_run=true"], world_size=world)
        faults += batch_faults(config, max(1, place.nodes), max(1, place.gpus_per_node))
        gpu = place.cluster().gpu if not place.faults() else None
        if config.fp8.is_on and gpu is not None and gpu.fp8_flops is None:
            faults.append(f"fp8.recipe={config.fp8.recipe.name} must be off on gpu={gpu.name}, which has no float8")
    except ConfigFaults as error:
        faults += error.faults
    if faults:
        raise ValueError(fault_message(faults))
    if config.task is TaskKind.text_to_video and config.activations.policy is ActivationPolicy.auto:
        activations, _ = choose_policy(config, world, place.cluster().gpu.memory_bytes)
        config = dataclasses.replace(config, activations=activations)
    return place, config


def _misspelt(overrides: list[str], names: set[str]) -> tuple[list[str], list[str]]:
    """Settings that are almost those of a plan and none of a run's, as faults; and the others."""
    of_run = {field.name for field in dataclasses.fields(TrainConfig)} | {"experiment", "hydra"}
    faults, others = [], []
    for text in overrides:
        key = _key(text)
        close = difflib.get_close_matches(key, sorted(names | of_run), n=1)
        if close and close[0] in names and key.partition(".")[0] not in of_run:
            faults.append(f"{key} is not a setting of a plan, did you mean {close[0]}?")
        else:
            others.append(text)
    return faults, others


def batch_faults(config: TrainConfig, nodes: int, gpus_per_node: int) -> list[str]:
    """A batch that so many processes cannot share evenly: some would compute for nothing at every step."""
    world = nodes * gpus_per_node
    groups = config.data_groups(world)
    at_once = config.micro_batch * groups
    if config.global_batch % at_once == 0:
        return []
    below, above = config.global_batch // at_once * at_once, -(-config.global_batch // at_once) * at_once
    nearest = [f"global_batch={value}" for value in (below, above) if value]
    for width in range(config.parallel.sequence + 1, gpus_per_node + 1):
        wider = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, sequence=width))
        if gpus_per_node % width == 0 and not parallel_faults(wider) and _closes(wider, world):
            nearest.append(f"parallel.sequence={width}")
            break
    whole = [size for size in range(1, nodes) if _closes(config, size * gpus_per_node)]
    inside = [size for size in range(1, gpus_per_node) if _closes(config, size)]
    if whole:
        nearest.append(f"nodes={max(whole)}")
    elif inside:
        nearest.append(f"{'nodes=1 ' if nodes > 1 else ''}gpus_per_node={max(inside)}")
    who = "processes" if config.parallel.sequence == 1 else f"groups of {config.parallel.sequence} processes"
    return [
        f"global_batch={config.global_batch} must be a multiple of {at_once}, micro_batch={config.micro_batch} x {groups} {who}, "
        f"or some of them compute for nothing (nearest: {', or '.join(nearest)})"
    ]


def _closes(config: TrainConfig, world: int) -> bool:
    """Whether so many processes make whole groups, and these whole micro-batches of a batch."""
    is_whole = world % config.parallel.sequence == 0
    return is_whole and config.global_batch % (config.micro_batch * config.data_groups(world)) == 0


def write_plan(place: PlanConfig, verdict: Verdict, facts: dict[str, object]) -> list[str]:
    """Write what was asked for; returns the files. Raises ValueError for a place that cannot be written."""
    text = json.dumps(without_nan(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files = [Path(place.json)] if place.json else []
    if place.out:
        files.append(Path(place.out) / "plan.json")
    written = []
    try:
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            written.append(str(path))
        if place.out:
            picture = Path(place.out) / "plan.png"
            plan_picture(verdict, picture)
            written.append(str(picture))
    except OSError as error:
        where = f"out={place.out}" if place.out else f"json={place.json}"
        raise ValueError(f"{where} cannot be written ({error.strerror or error}); give another place") from error
    return written


def next_command(argv: list[str], verdict: Verdict) -> str:
    """What to type now: to queue what fits, or to plan again with what would."""
    if verdict.asked.fits:
        return submit_command(argv, verdict, verdict.asked)
    if verdict.fastest is None:
        return "a larger cluster or GPUs with more memory; see the tables above"
    changed = verdict.changes_to(verdict.fastest)
    kept = [text for text in argv if _key(text) not in {_key(change) for change in changed}]
    return " ".join(["muybridge plan", *kept, *changed])


def submit_command(argv: list[str], verdict: Verdict, costs: RunCosts) -> str:
    """What to type to queue one of the rows."""
    changed = verdict.changes_to(costs)
    gone = {field.name for field in dataclasses.fields(PlanConfig)} | {_key(change) for change in changed}
    rest = [text for text in argv if _key(text) not in gone]
    cluster = costs.cluster
    size = [f"slurm.nodes={cluster.nodes}"]
    size += [f"slurm.gpus_per_node={cluster.gpus_per_node}"] if cluster.gpus_per_node != 8 else []
    return " ".join(["muybridge submit", *rest, *changed, *size])


def _key(text: str) -> str:
    override = parse(text)
    return override.key_or_group if override is not None else text.partition("=")[0].lstrip("+~")
