"""Rewires a model that was written for one device for the processes and the memory of a run; the model's files know of none."""

from typing import TYPE_CHECKING

from torch import nn

from ..models.text_to_video import TextToVideoModel
from .activations import set_activation_policy
from .compile_blocks import compile_blocks
from .fp8 import use_fp8
from .mesh import Mesh
from .sequence_parallel import split_sequence

if TYPE_CHECKING:
    from .config import TrainConfig


def parallelize(model: nn.Module, mesh: Mesh, config: "TrainConfig") -> None:
    """Change a model in place, before an engine wraps it; an autoencoder stays as it is. Collective.

    Raises ValueError where this machine or model cannot do what the settings ask for.
    """
    if not isinstance(model, TextToVideoModel):
        return
    dit = model.transformer
    split_sequence(dit, mesh.sequence)
    use_fp8(dit, config.fp8)
    set_activation_policy(dit, config.activations)
    compile_blocks(dit, config.compile, config.activations, shapes=len(config.data.buckets) or 1)
