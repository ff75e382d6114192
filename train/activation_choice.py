"""Chooses the activation policy that costs least of those that fit a device, for `activations.policy=auto`."""

from collections.abc import Mapping

from ..models.dit import DiTConfig
from .activation_bytes import ActivationShape, activation_bytes
from .activations import ActivationPolicy, ActivationsConfig

GIB = 2**30
# Of what is free, this much is left to what the formulas do not count: workspaces of kernels, buckets of gradients on their way,
# latents and the loss, and above all the holes between the allocator's blocks, which grow with the number of clip shapes.
SAFETY_MARGIN = 0.1

# From the one that computes nothing again, to one forward more and copies over the bus.
LADDER = (
    ActivationsConfig(ActivationPolicy.none),
    ActivationsConfig(ActivationPolicy.selective),
    *(ActivationsConfig(ActivationPolicy.every_k, every=every) for every in (4, 3, 2)),
    ActivationsConfig(ActivationPolicy.block),
    ActivationsConfig(ActivationPolicy.block, offload=True),
)


def choose_policy(
    model: DiTConfig, shapes: Mapping[str, ActivationShape], *, free_bytes: int, held_bytes: int
) -> tuple[ActivationsConfig, str]:
    """The first of `LADDER` that fits for all clip shapes (by name, such as 81x480x832), and a line that says why.

    `free_bytes` of the device, before weights, gradients, optimizer and averages, which take `held_bytes` of it. Where not even
    the last fits by these formulas, it is the answer all the same, and the line says so: they may err. All processes have to give
    the same numbers, for they must not choose differently.
    """
    limit = int((1 - SAFETY_MARGIN) * (free_bytes - held_bytes))
    rejected = ""
    for config in LADDER:
        needed, name = max((activation_bytes(model, shape, config).peak, name) for name, shape in shapes.items())
        room = f"{needed / GIB:.1f} GiB of {limit / GIB:.1f} GiB free at {name}"
        if needed <= limit:
            return config, f"activations: {policy_words(config)} ({room}{rejected})"
        rejected = f"; {policy_words(config)} would need {needed / GIB:.1f} GiB"
    return config, f"activations: {policy_words(config)}, which may not fit ({room})"


def policy_words(config: ActivationsConfig) -> str:
    """The policy as one writes about it: `block`, `every_k with every=2`, `block with offload`."""
    words = config.policy.name
    if config.policy is ActivationPolicy.every_k:
        words += f" with every={config.every}"
    return words + (" with offload" if config.offload else "")
