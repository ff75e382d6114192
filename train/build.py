"""From a task and its settings to an engine: weights, rewiring, optimizer and shards, in the order in which they can be made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.blocks import DiTBlock
from .config import TrainConfig
from .engine import Engine
from .mesh import Mesh
from .optimizer import build_optimizer
from .parallelize import parallelize
from .sharded_model import build_model
from .tasks import Task


@dataclass(frozen=True)
class Built:
    """An engine, and what there is to know of its model."""

    engine: Engine
    lora_facts: dict[str, Any]  # of a LoRA's base, for checkpoints; empty without one
    notes: list[str]  # choices that were left to the program


def build_engine(task: Task, config: TrainConfig, mesh: Mesh, resume_from: Path | None) -> Built:
    """The engine of a run on this process. Collective. Raises ValueError where weights, machine or model do not suit the settings.

    What trains next must not be done to the model any more: DeepSpeed casts and shards what it is given.
    """
    torch.manual_seed(config.seed)  # the same weights on every rank, whatever was drawn before
    model, lora_facts = build_model(task, config, resume_from)
    notes = parallelize(model, mesh, config)
    engine = Engine(
        model,
        build_optimizer(model, config.optimizer, on_host=config.deepspeed.offload_optimizer),
        config=config.deepspeed,
        micro_batch=config.micro_batch,
        gradient_clipping=config.optimizer.gradient_clipping,
        leaf_modules=(DiTBlock,),
    )
    engine.time_reduction(task.clock)
    return Built(engine, lora_facts, notes)
