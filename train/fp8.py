"""The blocks' wide Linears in float8, by torchao: weights, names and checkpoints stay as they are, and only matmuls change.

Each matmul of a Linear's forward and backward casts its two operands to 8 bits, scaled by their largest values of that moment, so
nothing of float8 outlives it.
"""

import importlib.util
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from ..models.dit import DiT
from ..models.lora import LoRALinear
from ..models.quiet import quiet

# The tensor cores of Ada and Hopper are the first with float8.
SMALLEST_CAPABILITY = (8, 9)
# What a float8 matmul needs its widths to be a multiple of.
ALIGNMENT = 16
# The Linears of a block that see a row for each video token; keys and values of text and image have a few hundred rows.
_ENDINGS = (
    *(f".attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f".attn2.{name}" for name in ("to_q", "to_out.0")),
    *(".ffn.net.0.proj", ".ffn.net.2"),
)


class Fp8Recipe(Enum):
    off = "off"
    tensorwise = (
        "tensorwise"  # one scale a tensor: the fastest; gradients have 2 bits of mantissa (e5m2), the rest 3 (e4m3)
    )
    rowwise = "rowwise"  # a scale for each row and column, powers of two: more exact and slower; e4m3 throughout


@dataclass
class Fp8Config:
    """Float8 matmuls (Micikevicius et al., arXiv:2209.05433) for NVIDIA GPUs from Ada and Hopper on; a CPU emulates them."""

    # How operands are scaled; off computes in the precision of the weights. On a GPU it gains nothing without compile.enabled,
    # which puts the casts into the kernels around them.
    recipe: Fp8Recipe = Fp8Recipe.off
    # Linears with a narrower side than this stay as they are: scaling and casting what goes into a matmul takes time with its rows,
    # and the matmul gains with rows and width. By bandwidth and peak of an H200, a square Linear breaks even near 1200.
    min_width: int = 1024

    @property
    def is_on(self) -> bool:
        return self.recipe is not Fp8Recipe.off

    def faults(self, field: str) -> list[str]:
        found = []
        if self.min_width < 1:
            found.append(f"{field}.min_width={self.min_width} must be at least 1")
        if self.is_on and importlib.util.find_spec("torchao") is None:
            found.append(f"{field}.recipe={self.recipe.name} needs torchao: pip install 'muybridge[fp8]'")
        return found


def use_fp8(dit: DiT, config: Fp8Config) -> list[str]:
    """Make the wide Linears of the blocks compute in float8, where the config says so; returns their names.

    Parameters stay the same objects under the same names. Before torch.compile, and before an engine wraps the model.

    Raises:
        ValueError: torchao is missing, the GPU has no float8, the model has LoRA layers, or no Linear is wide enough.
    """
    if not config.is_on:
        return []
    field = f"fp8.recipe={config.recipe.name}"
    if faults := config.faults("fp8"):
        raise ValueError("; ".join(faults))
    device = next(dit.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < SMALLEST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"{field} must be off on {torch.cuda.get_device_name(device)}: float8 needs compute capability 8.9, it has {found}"
        )
    if any(isinstance(module, LoRALinear) for module in dit.modules()):
        raise ValueError(f"{field} must be off with LoRA, whose layers have matmuls of their own")
    names = fp8_layers(dit, config)
    if not names:
        raise ValueError(
            f"{field} must be off: no Linear of the blocks has both sides a multiple of {ALIGNMENT} and at least "
            f"fp8.min_width={config.min_width}"
        )
    # Of kernels for other purposes that it cannot load, and of what torch finds old about it.
    with quiet("torchao", "torch.utils._pytree"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        chosen = set(names)
        convert_to_float8_training(
            dit,
            module_filter_fn=lambda module, name: name in chosen,
            config=_padded(Float8LinearConfig, config.recipe, emulate=device.type != "cuda"),
        )
    return names


def fp8_layers(dit: DiT, config: Fp8Config) -> list[str]:
    """The names of the Linears that are wide enough and whose sides 16 divides."""
    found = []
    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and name.endswith(_ENDINGS):
            sides = module.in_features, module.out_features  # the weight may be in parts
            if min(sides) >= config.min_width and all(side % ALIGNMENT == 0 for side in sides):
                found.append(name)
    return found


def _padded(config_class: Any, recipe: Fp8Recipe, *, emulate: bool) -> Any:
    """torchao's settings of a recipe. The weight's gradient sums over rows, which 81 frames at 480p have 32760 of: not 16 times
    something, so they are padded."""
    settings = vars(config_class.from_recipe_name(recipe.value))
    return config_class(**{**settings, "pad_inner_dim": True, "emulate": emulate})
