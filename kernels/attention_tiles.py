"""What the attention kernels share: loading and storing rows of one head, the mask's rule, and the sizes of a launch."""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclasses.dataclass(frozen=True)
class Launch:
    """Sizes of one kernel: a step multiplies a tile of `queries` x `keys` scores; loads are pipelined `stages` deep."""

    queries: int
    keys: int
    warps: int
    stages: int
    # Load tiles through tensor descriptors (the bulk copy engine of compute capability 9.0) instead of pointers.
    descriptors: bool = False
    # Let one group of warps load while the others multiply; needs descriptors and 4 warps.
    warp_specialize: bool = False


class MaskTensors(NamedTuple):
    """The tensors of attention_mask.py's TileMask as the operators pass them on; M is 1 (all samples alike) or B."""

    key_tiles: torch.Tensor  # [M, QT, KT]
    key_counts: torch.Tensor  # [M, QT, 2]
    query_tiles: torch.Tensor  # [M, KT, QT]
    query_counts: torch.Tensor  # [M, KT, 2]
    query_low: torch.Tensor  # [M, L]
    query_high: torch.Tensor  # [M, L]
    key_position: torch.Tensor  # [M, S]

    @property
    def step(self) -> int:
        """How many masks further the next sample's is: a kernel finds its mask at index batch * step."""
        return int(self.key_tiles.shape[0] > 1)


@triton.jit
def load_rows(base, rows, columns, row_stride, row_limit, HEAD_WIDTH: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Loads [rows, columns] with zeros outside the tensor; masks cost nothing where the tile is known to be inside."""
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    PADDED: tl.constexpr = columns.shape[0] != HEAD_WIDTH
    if MASK_ROWS and PADDED:
        tile = tl.load(pointers, mask=(rows[:, None] < row_limit) & (columns[None, :] < HEAD_WIDTH), other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=rows[:, None] < row_limit, other=0.0)
    elif PADDED:
        tile = tl.load(pointers, mask=columns[None, :] < HEAD_WIDTH, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, tile, rows, columns, row_stride, row_limit, HEAD_WIDTH: tl.constexpr):
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = (rows[:, None] < row_limit) & (columns[None, :] < HEAD_WIDTH)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_described_rows(descriptor, batch, head, start):
    """Loads rows start, start + 1, ... of one head through what `describe` made; zeros outside the tensor, past either end."""
    tile = descriptor.load([batch.to(tl.int32), head.to(tl.int32), start, 0])
    return tile.reshape(descriptor.block_shape[2], descriptor.block_shape[3])


@triton.jit
def is_allowed(query_low, query_high, key_position):
    """The mask's rule inside a partial tile: [queries, keys] from the interval of each query and the position of each key."""
    return (query_low[:, None] <= key_position[None, :]) & (key_position[None, :] < query_high[:, None])


def with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def can_describe(tensor: torch.Tensor) -> bool:
    """Whether the bulk copy engine can address this [B, N, L, K]: 16-byte aligned, no expanded dim, head width contiguous."""
    outer = [tensor.stride(dim) * tensor.itemsize for dim in range(3) if tensor.shape[dim] > 1]
    return (
        tensor.stride(3) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride % 16 == 0 and 0 < stride < 2**40 for stride in outer)
    )


def describable_strides(tensor: torch.Tensor) -> list[int]:
    """The strides of [B, N, L, K], with a valid one for dims of size 1: PyTorch gives those any stride."""
    *outer, head_width = tensor.shape
    return [stride if size > 1 else head_width for stride, size in zip(tensor.stride(), outer, strict=False)] + [1]


def describe(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """What `load_described_rows` reads tiles of `rows` rows through; the head width is padded as the launch tables pad it.

    Not for a tile whose rows a warp-specialised kernel splits among its groups of warps (the rows of the accumulator): Triton 3.6
    then loads wrong rows without a word, 3.7 refuses. Such a tile needs a descriptor made in the kernel.
    """
    block = [1, 1, rows, padded_head_width(tensor.shape[-1])]
    return TensorDescriptor(tensor, list(tensor.shape), describable_strides(tensor), block)


def padded_head_width(head_width: int) -> int:
    """A power of two of at least 64: what the launch tables are keyed by."""
    return max(64, triton.next_power_of_2(head_width))


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's (nor a GPU, in the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def launch_constants(launch: Launch, head_width: int) -> dict[str, int]:
    return {
        "HEAD_WIDTH": head_width,
        "BLOCK_K": padded_head_width(head_width),
        "BLOCK_L": launch.queries,
        "BLOCK_S": launch.keys,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
