"""A plan's formulas against steps that were measured on a GPU (`make gpu`): how far off they are, never adjusted to them."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..data.config import Access
from ..train.activations import ActivationPolicy
from ..train.config import TaskKind, TrainConfig
from ..train.cost_rates import Cluster
from ..train.costs_run import Conditions, run_costs
from ..train.engine_config import Precision
from ..train.gpus import GIB, recognised_gpu
from ..train.memory import ParameterCounts

RESULTS = "benchmarks/results"
_FOLDER = Path(__file__).parents[1] / RESULTS
# Plain PyTorch in place of our kernels, and matmuls in fp8.
_OTHERS = ("reference", "fp8.")
_NEEDED = ("device", "parameters", "clip", "micro_batch", "activations", "zero", "precision", "seconds_per_step")


@dataclass(frozen=True)
class Measured:
    """A measured step of a model, and what the formulas say of the same."""

    file: str
    name: str
    device: str
    seconds: float
    predicted_seconds: float
    peak_gib: float | None
    predicted_peak_gib: float

    @property
    def time_error(self) -> float:
        """Prediction over measurement, less one."""
        return self.predicted_seconds / self.seconds - 1

    @property
    def memory_error(self) -> float | None:
        """The same of the peak memory."""
        return None if self.peak_gib is None else self.predicted_peak_gib / self.peak_gib - 1

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "time_error": self.time_error, "memory_error": self.memory_error}


def compared_results(config: TrainConfig, counts: ParameterCounts, cluster: Cluster) -> list[Measured]:
    """Every measured step of this model on a GPU of the table, in files that `make gpu` writes; others are passed over."""
    if config.task is TaskKind.video_vae:
        return []
    found = []
    for path in sorted(_FOLDER.glob("*.json")):
        for name, row in _rows(path):
            measured = _compared(config, counts, cluster, path.name, name, row)
            found += [measured] if measured is not None else []
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Steps of our model with our kernels, from a file of `make gpu` (under "steps") or of `bench steps` ("results")."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for part in ("steps", "results"):
        steps = content.get(part) if isinstance(content, dict) else None
        for name, row in steps.items() if isinstance(steps, dict) else ():
            is_step = isinstance(row, dict) and row.get("ok") and all(key in row for key in _NEEDED)
            # What was measured to compare with is not what is predicted.
            if is_step and row.get("transformer", "ours") == "ours" and not any(word in name for word in _OTHERS):
                yield name, row


def _compared(
    config: TrainConfig, counts: ParameterCounts, cluster: Cluster, file: str, name: str, row: dict[str, Any]
) -> Measured | None:
    """None for another model, a GPU that is not in the table, or a policy that there no longer is."""
    gpu = recognised_gpu(row["device"])
    if gpu is None or row["parameters"] != counts.all or row["activations"] not in ActivationPolicy.__members__:
        return None
    frames, height, width = map(int, row["clip"].split("x"))
    micro_batch = row["micro_batch"]
    step = replace(
        config,
        global_batch=micro_batch,
        micro_batch=micro_batch,
        data=replace(config.data, frames=frames, height=height, width=width, buckets=[], access=Access.latents),
        activations=replace(config.activations, policy=ActivationPolicy[row["activations"]], offload=False),
        parallel=replace(config.parallel, sequence=1),
        deepspeed=replace(
            config.deepspeed, zero=row["zero"], precision=Precision(row["precision"]), offload_optimizer=False
        ),
    )
    costs = run_costs(step, counts, replace(cluster, gpu=gpu, nodes=1, gpus_per_node=1), Conditions(), {})
    assert costs.step_seconds is not None
    seconds, peak = float(row["seconds_per_step"]), row.get("peak_memory_gib")
    if not (math.isfinite(seconds) and seconds > 0):
        return None
    # What torch has allocated has no context in it.
    predicted = (costs.peak - costs.worst.memory.held["CUDA context"]) / GIB
    return Measured(file, name, row["device"], seconds, costs.step_seconds, peak, predicted)
