"""Rewires a model that was written for one device for the processes and the memory of a run; the model's files know of none."""

from typing import TYPE_CHECKING

from torch import nn

from ..models.text_to_video import TextToVideoModel
from .activations import set_activation_policy
from .mesh import Mesh
from .sequence_parallel import split_sequence

if TYPE_CHECKING:
    from .config import TrainConfig


def parallelize(model: nn.Module, mesh: Mesh, config: "TrainConfig") -> None:
    """Change a model in place, before an engine wraps it; an autoencoder stays as it is. Collective."""
    if not isinstance(model, TextToVideoModel):
        return
    split_sequence(model.transformer, mesh.sequence)
    set_activation_policy(model.transformer, config.activations)
