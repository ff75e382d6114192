"""Rewires a model that was written for one device for the processes and the memory of a run; the model's files know of none."""

import os
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist
from torch import nn

from ..models.text_to_video import TextToVideoModel
from .activation_choice import choose_policy
from .activations import ActivationPolicy, set_activation_policy
from .compile_blocks import compile_blocks
from .fp8 import use_fp8
from .mesh import Mesh
from .ranks import from_all_ranks
from .sequence_parallel import split_sequence

if TYPE_CHECKING:
    from .config import TrainConfig


def parallelize(model: nn.Module, mesh: Mesh, config: "TrainConfig") -> list[str]:
    """Change a model in place, before an engine wraps it; an autoencoder stays as it is. Collective.

    Returns what there is to say of the choices that were left to it. Raises ValueError where this machine or model cannot do what
    the settings ask for.
    """
    if not isinstance(model, TextToVideoModel):
        return []
    dit, activations, notes = model.transformer, config.activations, []
    if activations.policy is ActivationPolicy.auto:
        activations, why = choose_policy(config, dist.get_world_size(), _memory_of_the_poorest(dit))
        notes.append(why)
    split_sequence(dit, mesh.sequence)
    use_fp8(dit, config.fp8)
    set_activation_policy(dit, activations)
    compile_blocks(dit, config.compile, activations, shapes=len(config.data.buckets) or 1)
    return notes


def _memory_of_the_poorest(model: nn.Module) -> int:
    """Bytes of the device of the process that has least, or of the host's memory that is left for it."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device).total_memory
    else:
        # What is left, and what the model has of it by now.
        own = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        own += sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    return min(from_all_ranks(own))
