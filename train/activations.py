"""What a block keeps of its forward for its backward, and what it computes again."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.dit import DiT


class ActivationPolicy(Enum):
    none = "none"  # keep everything
    block = "block"  # keep the input of each block and compute the rest again


@dataclass
class ActivationsConfig:
    """What a block keeps of its forward for its backward; results are the same bits with every policy."""

    policy: ActivationPolicy = ActivationPolicy.none

    def faults(self, field: str) -> list[str]:
        return []


def set_activation_policy(dit: DiT, config: ActivationsConfig) -> None:
    """Make the model's blocks keep what the policy says."""
    if config.policy is ActivationPolicy.block:
        dit.run_block = _recomputed


def _recomputed(number: int, block: nn.Module, *inputs: object) -> Tensor:
    if not torch.is_grad_enabled():
        return block(*inputs)
    # Nothing in a block is random, so no generator state has to be kept.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
