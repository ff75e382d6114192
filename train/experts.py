"""Wan 2.2's two experts in training: one run trains one of them, on its part of the noise levels only."""

from dataclasses import replace
from enum import StrEnum

from ..models.diffusion.noise_schedule import NoiseScheduleConfig


class Expert(StrEnum):
    """Which part of the noise levels a transformer is for."""

    none = "none"  # all of them: a model of one transformer
    high = "high"  # from the boundary up to pure noise: layout and motion
    low = "low"  # from data up to the boundary: detail


def expert_schedule(objective: NoiseScheduleConfig, expert: Expert, boundary: float) -> NoiseScheduleConfig:
    """The noise levels that an expert trains on: those of `objective` on its side of the boundary."""
    if expert is Expert.high:
        return replace(objective, min_level=max(objective.min_level, boundary))
    if expert is Expert.low:
        return replace(objective, max_level=min(objective.max_level, boundary))
    return objective


def expert_faults(objective: NoiseScheduleConfig, expert: Expert, boundary: float) -> list[str]:
    """Breaches between the expert, its boundary and the noise levels asked for, as messages naming field, value and rule."""
    if expert is Expert.none:
        return []
    if not 0 < boundary < 1:
        return [f"boundary={boundary} must lie between 0 and 1 (the noise level from which on the high expert serves)"]
    low, high = objective.min_level, objective.max_level
    found = []
    if expert is Expert.high:
        if low != 0 and low < boundary:
            found.append(f"objective.min_level={low} must be 0 or from boundary={boundary} on with expert=high")
        if high <= boundary:
            found.append(f"objective.max_level={high} must be above boundary={boundary} with expert=high")
    else:
        if high != 1 and high > boundary:
            found.append(f"objective.max_level={high} must be 1 or up to boundary={boundary} with expert=low")
        if low >= boundary:
            found.append(f"objective.min_level={low} must be below boundary={boundary} with expert=low")
    return found or expert_schedule(objective, expert, boundary).faults("objective")
