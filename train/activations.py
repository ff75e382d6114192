"""What a block keeps of its forward for its backward, what it computes again, and what waits on the host meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.dit import DiT
from .host_inputs import HostInput, HostInputs
from .kept_results import Contexts, keep_and_replay, traced_contexts

BlockCall = Callable[..., Tensor]  # (x, context, modulation, layout, image) -> x, as a block


class ActivationPolicy(Enum):
    none = "none"  # keep everything
    selective = (
        "selective"  # keep results of matmuls and attention; norms, modulation, rotary, GELU and casts run again
    )
    every_k = "every_k"  # each k-th block as `block`, the others as `selective`
    block = "block"  # keep the input of each block and compute the rest again
    auto = "auto"  # the first of these that fits the device


@dataclass
class ActivationsConfig:
    """What a block keeps of its forward for its backward; gradients are the same bits with every policy."""

    policy: ActivationPolicy = ActivationPolicy.none
    # every_k: of so many blocks one is computed again as a whole. (The others keep what `selective` keeps: if they kept all, 2
    # would need as much memory as `selective`.)
    every: int = 2
    # block, every_k: the inputs of the blocks that are computed again wait in pinned host memory.
    offload: bool = False

    def faults(self, field: str) -> list[str]:
        """All breaches of this config's own rules."""
        found = []
        if self.every < 2:
            found.append(f"{field}.every={self.every} must be at least 2 (all blocks: {field}.policy=block)")
        if self.offload and self.policy not in (ActivationPolicy.block, ActivationPolicy.every_k):
            found.append(
                f"{field}.offload=true must go with {field}.policy=block or every_k, which keep the inputs of blocks, not with "
                f"{self.policy.name}"
            )
        return found


def set_activation_policy(dit: DiT, config: ActivationsConfig) -> None:
    """Make the model's blocks keep what the policy says, which may no longer be `auto`."""
    wrappers = block_wrappers(config, len(dit.blocks))

    def run_block(number: int, block: nn.Module, *inputs: object) -> Tensor:
        return wrappers[number](block)(*inputs)

    dit.run_block = run_block


def block_wrappers(config: ActivationsConfig, blocks: int) -> list[Callable[[BlockCall], BlockCall]]:
    """For each block, what turns a call of it into one that keeps what the policy says, and the rest of the block's inputs.

    The call may be the block itself (so that hooks on it run in the recomputation, too) or a compiled form of it. Compiled code is
    opaque to `selective`, which has to be inside: compile `traced_selective(block)` for the blocks where `keeps_results`.
    """
    assert config.policy is not ActivationPolicy.auto, "resolved before a model is changed"
    host = HostInputs() if config.offload else None
    whole = _recomputed if host is None else partial(_offloaded, host)
    wrappers: list[Callable[[BlockCall], BlockCall]] = []
    for number in range(blocks):
        if is_recomputed(config, number):
            wrappers.append(lambda call: partial(whole, call))
        elif keeps_results(config, number):
            wrappers.append(lambda call: partial(_selective, call))
        else:
            wrappers.append(lambda call: call)
    return wrappers


def is_recomputed(config: ActivationsConfig, number: int) -> bool:
    """Whether this block keeps its input only; of `every_k` it is the first of every so many."""
    if config.policy is ActivationPolicy.every_k:
        return number % config.every == 0
    return config.policy is ActivationPolicy.block


def keeps_results(config: ActivationsConfig, number: int) -> bool:
    """Whether this block keeps the results of its matmuls and attentions only."""
    if config.policy is ActivationPolicy.every_k:
        return not is_recomputed(config, number)
    return config.policy is ActivationPolicy.selective


def traced_selective(call: BlockCall) -> BlockCall:
    """`selective` for a call that torch.compile traces as a whole: marks for its partitioner instead of what eager code does."""
    return partial(_selective, call, contexts=traced_contexts)


def _recomputed(call: BlockCall, *inputs: object) -> Tensor:
    if not torch.is_grad_enabled():
        return call(*inputs)
    # Nothing in a block is random, so no generator state has to be kept.
    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False)


def _selective(call: BlockCall, *inputs: object, contexts: Contexts = keep_and_replay) -> Tensor:
    if not torch.is_grad_enabled():
        return call(*inputs)
    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _offloaded(host: HostInputs, call: BlockCall, x: Tensor, *others: object) -> Tensor:
    if not torch.is_grad_enabled():
        return call(x, *others)
    waiting = host.send(x)
    # x is handed over in a box, which the recomputation opens again: then it holds what came back from the host.
    out = checkpoint(_opened, call, waiting, *others, use_reentrant=False, preserve_rng_state=False)
    waiting.leave_device()
    return out


def _opened(call: BlockCall, waiting: HostInput, *others: object) -> Tensor:
    return call(waiting.open(), *others)
