"""Counts the bytes of tensors that are alive while a model runs on the meta device, where its operators are those of a GPU."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators made on that device in its body and that are still there, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Tensors that were there before: weights, their gradients, inputs."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self.most = max(self.most, self.now)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.is_meta and key not in self._sizes and key not in self._known:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
