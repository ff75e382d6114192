"""A model as its engine holds it, in the run's precision and at ZeRO 3 split over the processes, made parameter by parameter.

What the engine would cast and split afterwards need never be in memory: 14 B parameters are 57 GB in float32, on each process.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .drawn_weights import Module, build_one_by_one
from .engine import shard_parameter
from .engine_config import EngineConfig, Precision
from .trained_weights import prepare_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import TrainConfig
    from .tasks import Task


def build_model(task: "Task", config: "TrainConfig", resume_from: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a task with the weights that it starts from, and what `prepare_weights` returns of it. Collective at ZeRO 3.

    Its values are the same however it is built. At ZeRO 3 a parameter has its piece alone: `full_shape` is its shape, and `fill`
    writes it. Raises ValueError as `prepare_weights` does.
    """
    if not _is_built_by_parameter(config):
        model = task.build_model()
        return model, prepare_weights(model, config, resume_from)

    def place(parameter: nn.Parameter) -> None:
        _place(parameter, config.deepspeed)

    def build(construct: "Callable[[], Module]") -> Module:
        return build_one_by_one(construct, task.device, place)

    model = task.build_model(build)
    for parameter in model.parameters():  # a text encoder that is trained along
        place(parameter)
    facts = prepare_weights(model, config, resume_from)
    for parameter in model.parameters():  # a LoRA's factors
        place(parameter)
    return model, facts


def _is_built_by_parameter(config: "TrainConfig") -> bool:
    """Whether the engine holds the model in another form than it is drawn in, and it is one of those that are large."""
    is_changed = config.deepspeed.zero == 3 or config.deepspeed.precision is Precision.bf16
    return is_changed and config.task.name == "text_to_video"


def _place(parameter: nn.Parameter, config: EngineConfig) -> None:
    """Bring a parameter into the form in which the engine holds it; one that is in it stays as it is."""
    if hasattr(parameter, "ds_tensor"):
        return
    if config.precision is Precision.bf16:
        parameter.data = parameter.data.to(torch.bfloat16)
    if config.zero == 3:
        shard_parameter(parameter, config)
