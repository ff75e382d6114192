"""The weights of an exported model: each file is written from its source tensor by tensor, then read again and compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.weight_files import Tensors, check_keys, open_weights
from ..models.weights import save_model
from ..train.checkpoint import FragmentReader, read_run_state
from .export_plan import RunWeights

# Modules and tables that Wan's own code and diffusers compute in float32 whatever the rest is in.
FP32_PARTS = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}


@contextmanager
def trained_tensors(expert: RunWeights, prefix: str) -> Iterator[Tensors]:
    """Those weights of a checkpoint that have the prefix, float32, without it."""
    shapes = {
        name.removeprefix(prefix): torch.Size(shape)
        for name, shape in read_run_state(expert.checkpoint)["shapes"].items()
        if name.startswith(prefix)
    }
    with FragmentReader(expert.checkpoint) as reader:

        def read(name: str) -> Tensor:
            return reader.read(expert.weights, prefix + name, 0, shapes[name].numel()).view(shapes[name])

        yield Tensors(shapes, read)


def transformer_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a weight of a transformer in `dtype` is stored in, by its name in diffusers."""
    return torch.float32 if FP32_PARTS & set(name.split(".")) else dtype


def write_model(folder: Path, config: dict[str, Any], tensors: Tensors, header: dict[str, str]) -> None:
    """Write and check a model folder in diffusers' form, in shards of at most 5 GB."""
    save_model(folder, config, tensors, metadata=header)
    check_written(folder, tensors)


def write_file(path: Path, tensors: Tensors, header: dict[str, str]) -> None:
    """Write and check one safetensors file, all of which is held in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors}, path, metadata={"format": "pt"} | header)
    check_written(path, tensors)


def check_written(source: Path, tensors: Tensors) -> None:
    """Read a file or folder: the same names and, bit for bit, the same tensors. Raises ValueError naming what differs."""
    with open_weights(source) as written:
        check_keys(written.shapes, tensors.shapes, where=str(source))
        for name, tensor in tensors:
            stored = written.read(name)
            if stored.dtype != tensor.dtype or not torch.equal(stored, tensor):
                raise ValueError(f"{source}: {name} is not what was written (is the disk sound?)")
