"""LoRA (Hu et al., arXiv:2106.09685): low-rank changes of the blocks' Linear layers are trained, the DiT stays as it is.

The change of a layer's weight is alpha / rank * B @ A. A starts random and B zero, so that training starts from the DiT's velocity.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dit import DiT
from .weight_files import some


class LoRATarget(Enum):
    """Linear layers of a block that LoRA can change: those of both attentions, and the feed-forward."""

    q = "q"
    k = "k"
    v = "v"
    o = "o"
    ffn = "ffn"


# The image tokens of Wan 2.1 I2V have keys and values of their own in the cross-attention.
_ENDINGS = {
    LoRATarget.q: (".to_q",),
    LoRATarget.k: (".to_k", ".add_k_proj"),
    LoRATarget.v: (".to_v", ".add_v_proj"),
    LoRATarget.o: (".to_out.0",),
    LoRATarget.ffn: (".ffn.net.0.proj", ".ffn.net.2"),
}


@dataclass
class LoRAConfig:
    """A LoRA on top of the weights that `init_from` names."""

    # Rank of the change of each layer; 0 is off (all weights are trained).
    rank: int = 0
    # The change is scaled by alpha / rank; null takes a layer's rank, which makes it 1.
    alpha: float | None = None
    # Kinds of layers that are changed.
    targets: list[LoRATarget] = field(default_factory=lambda: list(LoRATarget))
    # Other ranks for some of these layers, as PATTERN:RANK with * and ? in the pattern, such as blocks.0.*:64; the last that
    # matches holds, and rank 0 leaves a layer out.
    layer_ranks: list[str] = field(default_factory=list)
    # LoRA file, in any of the common forms, that a fresh run starts from; null starts from no change.
    init_from: str | None = None

    @property
    def is_on(self) -> bool:
        return self.rank > 0

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules, as messages that name the field, the value and the rule."""
        found = []
        if self.rank < 0:
            found.append(f"{field}.rank={self.rank} must be 0 (off) or more")
        if self.alpha is not None and not self.alpha > 0:
            found.append(f"{field}.alpha={self.alpha} must be positive, or null for the rank")
        if not self.targets:
            found.append(f"{field}.targets=[] must name at least one of {', '.join(t.name for t in LoRATarget)}")
        for place, text in enumerate(self.layer_ranks):
            pattern, _, rank = text.rpartition(":")
            if not pattern or not rank.isdecimal():
                found.append(f"{field}.layer_ranks[{place}]={text} must be PATTERN:RANK, such as blocks.0.*:64")
        if not self.is_on and (self.layer_ranks or self.init_from):
            name = "layer_ranks" if self.layer_ranks else "init_from"
            found.append(f"{field}.rank={self.rank} must be at least 1 where {field}.{name} is set")
        return found

    def scale(self, rank: int) -> float:
        """What the product B @ A of a layer of this rank is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / rank


@dataclass(frozen=True)
class LoRAFactors:
    """The change of one layer's weight: scale * up @ down."""

    down: Tensor  # [rank, in], A
    up: Tensor  # [out, rank], B
    scale: float  # alpha / rank

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """The change itself, float32 [out, in]."""
        return self.scale * (self.up.float() @ self.down.float())


class LoRALinear(nn.Linear):
    """A Linear with a low-rank change of its weight, which is a sum of its own so that the gradient reaches the factors alone.

    `weight` and `bias` keep their names; the factors lie beside them, so that whatever gathers the parameters of a module
    (ZeRO-3) has all of them when its forward runs.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        # Drawn in float32, so that they are the same for weights of any precision.
        down = torch.empty(rank, self.in_features, dtype=torch.float32, device=self.weight.device)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.lora_A = nn.Parameter(down.to(self.weight.dtype))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(input, self.lora_A) * self.scale  # [..., rank]: the cheapest place to scale
        return F.linear(input, self.weight, self.bias) + F.linear(low, self.lora_B)


def lora_ranks(module_names: Iterable[str], config: LoRAConfig) -> dict[str, int]:
    """The rank of every layer that is changed. Raises ValueError for a pattern that fits none of them, and where none is left."""
    endings = tuple(ending for target in config.targets for ending in _ENDINGS[target])
    ranks = {name: config.rank for name in module_names if name.startswith("blocks.") and name.endswith(endings)}
    for text in config.layer_ranks:
        pattern, _, rank = text.rpartition(":")
        matching = [name for name in ranks if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"lora.layer_ranks: {text} matches no layer; the layers are {', '.join(list(ranks)[:3])} ..."
            )
        ranks |= dict.fromkeys(matching, int(rank))
    if not any(ranks.values()):
        raise ValueError(
            f"lora.layer_ranks={list(config.layer_ranks)} leaves no layer to train; rank 0 leaves a layer out"
        )
    return {name: rank for name, rank in ranks.items() if rank}


def add_lora(dit: DiT, config: LoRAConfig) -> None:
    """Freeze the DiT and give its layers trainable factors, drawn by torch's global generator. ValueError as `lora_ranks`."""
    dit.requires_grad_(False)
    modules = dict(dit.named_modules())
    for name, rank in lora_ranks(modules, config).items():
        base = modules[name]
        assert isinstance(base, nn.Linear), name
        _replace(dit, name, LoRALinear(base, rank=rank, scale=config.scale(rank)))


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Add each change to its weight, in float32, and put plain Linears back; a module without LoRA stays as it is."""
    for name, layer in _lora_layers(module).items():
        merged = LoRAFactors(layer.lora_A, layer.lora_B, layer.scale).delta().add_(layer.weight)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        plain.weight.copy_(merged)
        plain.train(layer.training)
        _replace(module, name, plain)


@torch.no_grad()
def load_lora(dit: DiT, factors: Mapping[str, LoRAFactors], *, where: str) -> None:
    """Start the layers of `add_lora` from other factors, layer by layer; `where` names their source.

    The product stays what it was there, whatever scale it had. Raises ValueError naming layers that are missing or left over,
    and those of another shape or rank.
    """
    layers = _lora_layers(dit)
    faults = []
    for difference, words in (
        (layers.keys() - factors.keys(), "missing"),
        (factors.keys() - layers.keys(), "not in lora.targets"),
    ):
        if difference:
            faults.append(f"{words}: {some(sorted(difference))}")
    misshapen = [
        f"{name} (in, rank, out {_sizes(factors[name].down, factors[name].up)} instead of {_sizes(layer.lora_A, layer.lora_B)})"
        for name, layer in layers.items()
        if name in factors and _sizes(factors[name].down, factors[name].up) != _sizes(layer.lora_A, layer.lora_B)
    ]
    if misshapen:
        faults.append(f"of other sizes: {some(misshapen, limit=3)}")
    if faults:
        raise ValueError(f"{where} does not have the layers that `lora` asks for: {'; '.join(faults)}")
    for name, layer in layers.items():
        layer.lora_A.copy_(factors[name].down)
        layer.lora_B.copy_(factors[name].up.float() * (factors[name].scale / layer.scale))


def lora_factors(state_dict: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, LoRAFactors]:
    """The factors in a state dict, or in what a checkpoint of a LoRA run holds, by the name of their layer in the DiT."""
    suffix = ".lora_A"
    names = [name.removesuffix(suffix) for name in state_dict if name.endswith(suffix)]
    return {
        name.removeprefix("transformer."): LoRAFactors(
            down=state_dict[name + suffix],
            up=state_dict[f"{name}.lora_B"],
            scale=config.scale(state_dict[name + suffix].shape[0]),
        )
        for name in names
    }


def _lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def _replace(root: nn.Module, name: str, layer: nn.Linear) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, layer)


def _sizes(down: Tensor, up: Tensor) -> tuple[int, int, int]:
    return down.shape[1], down.shape[0], up.shape[0]
