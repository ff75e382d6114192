"""Chooses the activation policy that costs least of those that fit a device, for `activations.policy=auto`."""

from dataclasses import replace

from .activations import ActivationPolicy, ActivationsConfig
from .config import TrainConfig
from .config_rules import engine_faults
from .costs_memory import step_memory
from .memory import parameter_counts

GIB = 2**30
# From the one that computes nothing again, to one forward more and copies over the bus.
LADDER = (
    ActivationsConfig(ActivationPolicy.none),
    ActivationsConfig(ActivationPolicy.selective),
    *(ActivationsConfig(ActivationPolicy.every_k, every=every) for every in (4, 3, 2)),
    ActivationsConfig(ActivationPolicy.block),
    ActivationsConfig(ActivationPolicy.block, offload=True),
)


def choose_policy(config: TrainConfig, world_size: int, memory_bytes: int) -> tuple[ActivationsConfig, str]:
    """The first of `LADDER` with which a process of `world_size` fits into so much memory on clips of every bucket, and why.

    Where not even the last fits by these formulas, it is the answer all the same, and the line says so: they may err. All processes
    have to give the same numbers, for they must not choose differently.
    """
    counts, buckets = parameter_counts(config), config.buckets(world_size)
    rejected = ""
    for chosen in LADDER:
        changed = replace(config, activations=chosen)
        if engine_faults(changed):  # float8 at ZeRO 3 goes with some of them only
            continue
        needed, name = max((step_memory(changed, counts, b, world_size).peak, b.name) for b in buckets)
        room = f"{needed / GIB:.1f} GiB of {memory_bytes / GIB:.1f} GiB at the peak of {name}"
        if needed <= memory_bytes:
            return chosen, f"activations: {policy_words(chosen)} ({room}{rejected})"
        rejected = f"; {policy_words(chosen)} would need {needed / GIB:.1f} GiB"
    return chosen, f"activations: {policy_words(chosen)}, which may not fit ({room})"


def policy_words(config: ActivationsConfig) -> str:
    """The policy as one writes about it: `block`, `every_k with every=2`, `block with offload`."""
    words = config.policy.name
    if config.policy is ActivationPolicy.every_k:
        words += f" with every={config.every}"
    return words + (" with offload" if config.offload else "")
