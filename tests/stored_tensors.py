"""What tests of several folders read back of the weights that were written."""

from pathlib import Path

from torch import Tensor

from muybridge.models.weight_files import open_weights


def read_all(source: Path) -> dict[str, Tensor]:
    """Every tensor of a weight file or a model folder."""
    with open_weights(source) as tensors:
        return dict(tensors)
