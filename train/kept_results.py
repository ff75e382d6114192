"""Keeps the results of matmuls and attention in a forward and hands them out again when the forward is computed again.

torch has contexts for that, `create_selective_checkpoint_contexts`, which torch.compile understands (`traced_contexts`). In eager
code they give wrong gradients under ZeRO-3, without a word: DeepSpeed's Linear adds its bias in place to a result that was kept,
and the recomputation adds it again. Nor do they (torch 2.13) let a recomputation call operators that the forward did not, as
gathering weights may do.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .. import kernels  # noqa: F401 (registers muybridge::attention)

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

aten = torch.ops.aten
_MATMULS = (aten.mm.default, aten.addmm.default, aten._scaled_mm.default)
# Not bmm, which attention becomes where torch has no kernel for it: its results are the scores.
_ATTENTION = (
    torch.ops.muybridge.attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
# A matmul whose inner dim is so many times smaller than its result's width costs about what a pointwise operation does, and
# keeping it (the second of LoRA's two, beside the layer's own) would double what is kept. A feed-forward is up to 6 times wider.
LOW_RANK = 8


def is_kept(op: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether the result of this call is kept."""
    if op in _MATMULS:
        right = arguments[2 if op is aten.addmm.default else 1]  # [inner, width]
        return bool(LOW_RANK * right.shape[0] > right.shape[1])
    return op in _ATTENTION


def keep_and_replay() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts for a forward and for its recomputation, as `checkpoint(context_fn=...)` wants them.

    Each operator costs a Python call in both, some microseconds, which large blocks hide behind the device's work.
    """
    kept: list[Any] = []
    return _Keep(kept), _Replay(kept)


def traced_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The same for code that torch.compile traces, where nothing is in place."""
    return create_selective_checkpoint_contexts(_traced_policy)


def _traced_policy(_context: Any, op: Any, *arguments: Any, **_named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(op, arguments) else CheckpointPolicy.PREFER_RECOMPUTE


class _Keep(TorchDispatchMode):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            # An alias: the tensor itself will know its graph, which knows this list.
            self.kept.append(_map_tensors(Tensor.detach, out))
        return out


class _Replay(TorchDispatchMode):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept
        self.place = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_kept(func, args):
            if self.place == len(self.kept):
                raise RuntimeError("activations.policy=selective: the backward pass of a block can run only once")
            out = self.kept[self.place]
            self.place += 1
            _map_tensors(lambda tensor: self.storages.add(_storage(tensor)), out)
            return out
        if func._schema.is_mutable and args and isinstance(args[0], Tensor) and _storage(args[0]) in self.storages:
            return args[0]  # it has been done to the kept result already
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        # All of them until here, so that no other tensor is taken for one of them because it came to lie in the same place.
        self.kept.clear()
        self.storages.clear()
        self.place = 0


def _map_tensors(function: Callable[[Tensor], Any], result: Any) -> Any:
    """An operator's result, tensors mapped: one tensor or a tuple of tensors and numbers."""
    if isinstance(result, Tensor):
        return function(result)
    if isinstance(result, (tuple, list)):
        return tuple(_map_tensors(function, part) for part in result)
    return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
