"""A model's fresh weights, drawn one parameter at a time: the same values that building the whole model draws.

The model is built without memory while its draws are taken down, those included that a later one replaces, as every draw moves the
generator on. Then they are made again, in their order, each in memory that is free again before the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Module = TypeVar("Module", bound=nn.Module)


class Build(Protocol):
    """Makes a module of a function that constructs it."""

    def __call__(self, construct: Callable[[], Module]) -> Module: ...


def at_once(construct: Callable[[], Module]) -> Module:
    """As it is written: all of it in memory, its weights drawn as it is constructed."""
    return construct()


META = torch.device("meta")
_RANDOM = ("aten::uniform_", "aten::normal_")
_FILLING = (*_RANDOM, "aten::zero_", "aten::fill_")
# What makes a tensor that is filled already, and with what.
_FACTORIES = {"aten::zeros": 0.0, "aten::ones": 1.0, "aten::zeros_like": 0.0, "aten::ones_like": 1.0}


@dataclass(frozen=True)
class _Fill:
    """One operation that fills a part of a parameter's memory, or all of it."""

    # Kept, so that no later tensor is taken for this one.
    storage: torch.UntypedStorage
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_random: bool

    @property
    def home(self) -> int:
        """What tells the memory from any other."""
        return self.storage._cdata

    @property
    def replaces_all(self) -> bool:
        return torch.Size(self.size).numel() == self.elements

    @property
    def elements(self) -> int:
        """Of the memory; drawn are float32."""
        return self.storage.nbytes() // 4

    def on(self, flat: Tensor) -> None:
        """Do it again, on memory of the parameter's size."""
        self.function(flat.as_strided(self.size, self.stride, self.offset), *self.arguments, **self.settings)


@dataclass
class _Notes(TorchDispatchMode):
    """Takes down what fills memory while a model is built."""

    fills: list[_Fill] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        name = func._schema.name
        if name in _FACTORIES and answer.is_meta:
            self._note(answer, torch.ops.aten.fill_.Scalar, (_FACTORIES[name],), {}, is_random=False)
        elif func._schema.is_mutable and args and isinstance(args[0], Tensor) and args[0].is_meta:
            assert name in _FILLING, f"{name} fills a parameter, and only {', '.join(_FILLING)} can be made again"
            self._note(args[0], func, args[1:], kwargs, is_random=name in _RANDOM)
        return answer

    def _note(self, filled: Tensor, function: Any, arguments: Any, settings: Any, *, is_random: bool) -> None:
        assert filled.dtype is torch.float32, f"{filled.dtype} is drawn"
        storage = filled.untyped_storage()
        place = (tuple(filled.shape), filled.stride(), int(filled.storage_offset()))
        self.fills.append(_Fill(storage, function, arguments, settings, *place, is_random))


@torch.no_grad()
def build_one_by_one(
    construct: Callable[[], Module], device: torch.device, place: Callable[[nn.Parameter], None]
) -> Module:
    """The model of `construct`, which is called where tensors have no memory.

    Each parameter is drawn on the device and given to `place`, which may change its data.

    Values, and where the generator is afterwards, are those of building it on the device. Memory beyond what `place` keeps is one
    parameter's, or two's.
    """
    notes = _Notes()
    with META, notes:
        model = construct()
    homes = _homes(model)
    assert all(parameter.is_meta for parameter, _ in homes.values()), "all of the model is built without memory"
    assert not list(model.buffers()), "a buffer would be lost"
    # The last that fills all of a parameter, and what comes after it, makes its values; the others only move the generator.
    first_kept = {fill.home: number for number, fill in enumerate(notes.fills) if fill.replaces_all}
    last = {fill.home: number for number, fill in enumerate(notes.fills)}
    assert homes.keys() <= first_kept.keys(), "every parameter is filled"
    values: dict[int, Tensor] = {}
    for number, fill in enumerate(notes.fills):
        if fill.home not in homes or number < first_kept[fill.home]:
            if fill.is_random:
                fill.on(torch.empty(fill.elements, device=device))
            continue
        if number == first_kept[fill.home]:
            values[fill.home] = torch.empty(fill.elements, device=device)
        fill.on(values[fill.home])
        if number == last[fill.home]:
            parameter, owners = homes[fill.home]
            value = values.pop(fill.home).view(parameter.shape)
            drawn = nn.Parameter(value, requires_grad=parameter.requires_grad)
            del value
            place(drawn)
            for module, name in owners:
                setattr(module, name, drawn)
    return model


def _homes(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """By its memory, each parameter with the modules and names that have it."""
    homes: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            homes.setdefault(parameter.untyped_storage()._cdata, (parameter, []))[1].append((module, name))
    return homes
