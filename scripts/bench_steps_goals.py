"""What measured steps say of the goals for steps and memory: met, not met or not measured, and how far the limit is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .bench_steps_plan import CURVE_SIZE, CURVE_STEPS, LARGE, POLICIES

# What the best matmuls of an H100 or H200 reach of their 989 TFLOP/s: nothing made of matmuls is faster.
PRACTICAL_FLOPS = 790e12
# Between two loss curves that differ in the order of bf16 roundings: a velocity moves by a percent at most, in all directions, and
# the loss is a mean over 100 thousand elements and more, mostly of noise that no model foresees.
CURVE_TOLERANCE = 1e-3
GB = 1e9 / 2**30  # in GiB
NOT_MEASURED = "not measured"
Results = dict[str, dict[str, Any]]
Entry = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One goal and what was found."""

    text: str
    state: str  # met, not met or not measured
    found: str = ""
    limit: str = ""


def goals(results: Results) -> Iterator[Goal]:
    """All goals that a machine with one GPU can decide."""
    for size in LARGE:
        yield from _speed_goals(results, size)
    yield from _memory_goals(results)
    eager, compiled = (_fastest(_ours(results, "256p B=1", compiled=flag)) for flag in (False, True))
    yield _ratio_goal("256p B=1: 2.0 times as fast compiled as eager", _speed(compiled), _speed(eager), 2.0)
    yield from _curve_goal(results)
    yield from _prediction_goals(results)


def _speed_goals(results: Results, size: str) -> Iterator[Goal]:
    ours = _fastest(_ours(results, size))
    text = f"{size}: MFU of 50 % or more"
    if ours is None or not ours.get("mfu"):
        yield Goal(text, NOT_MEASURED)
    else:
        share = ours["tflops_per_second"] * 1e12 / PRACTICAL_FLOPS
        limit = ours["model_tflop_per_step"] * 1e12 / PRACTICAL_FLOPS
        yield Goal(
            text,
            _state(ours["mfu"] >= 0.5),
            f"{100 * ours['mfu']:.1f} % ({ours['policy']})",
            f"{limit:.3g} s at 790 TFLOP/s, of which this is {100 * share:.1f} %",
        )
    peers = _peers(results, size)
    default = _fastest([peer for peer in peers if peer["transformer"] == "default"])
    best = _fastest(peers)
    yield _ratio_goal(f"{size}: 2.0 times diffusers' default", _speed(ours), _speed(default), 2.0)
    yield _ratio_goal(f"{size}: 1.0 times diffusers' best", _speed(ours), _speed(best), 1.0)
    for policy in ("block", "none"):
        text = f"{size}: less memory than diffusers with policy {policy}"
        mine, theirs = (
            min((entry["peak_memory_gib"] for entry in group if entry["policy"] == policy), default=None)
            for group in ([e for e in _ours(results, size) if _memory(e)], [e for e in peers if _memory(e)])
        )
        if mine is None or theirs is None:
            yield Goal(text, NOT_MEASURED)
        else:
            yield Goal(text, _state(mine < theirs), f"{mine:.1f} against {theirs:.1f} GiB")


def _memory_goals(results: Results) -> Iterator[Goal]:
    text = "480p B=1: no matmul and no attention computed again within 95 GB"
    found = [e for e in _ours(results, "480p B=1") if e["policy"] in ("none", "selective") and _memory(e)]
    if not found:
        yield Goal(text, NOT_MEASURED)
        return
    least = min(found, key=lambda entry: entry["peak_memory_gib"])
    gigabytes = least["peak_memory_gib"] / GB
    rest = (least["memory_between_steps_gib"] or 0.0) / GB
    yield Goal(
        text,
        _state(gigabytes <= 95),
        f"{gigabytes:.1f} GB ({least['policy']})",
        f"{rest:.1f} GB of weights, gradients, optimizer and average",
    )


def _curve_goal(results: Results) -> Iterator[Goal]:
    text = f"{CURVE_SIZE}: {CURVE_STEPS} losses as diffusers' within {100 * CURVE_TOLERANCE:g} %"
    ours = next((e for e in _ours(results, CURVE_SIZE, compiled=False) if len(e["losses"]) >= CURVE_STEPS), None)
    theirs = next((e for e in _peers(results, CURVE_SIZE) if len(e["losses"]) >= CURVE_STEPS), None)
    if ours is None or theirs is None:
        yield Goal(text, NOT_MEASURED)
        return
    pairs = zip(ours["losses"][:CURVE_STEPS], theirs["losses"][:CURVE_STEPS], strict=True)
    apart = [abs(mine / other - 1) for mine, other in pairs]
    is_met = all(value <= CURVE_TOLERANCE for value in apart)  # which what is not a number is not
    yield Goal(text, _state(is_met), f"{100 * max(apart):.3g} % apart at most")


def _prediction_goals(results: Results) -> Iterator[Goal]:
    for policy in POLICIES:
        text = f"480p B=1: memory of policy {policy} within 10 % of its formula"
        found = [e for e in _ours(results, "480p B=1") if e["policy"] == policy and _memory(e)]
        predicted = next((e for e in found if e.get("predicted_activations_gib")), None)
        if predicted is None:
            yield Goal(text, NOT_MEASURED)
            continue
        held = predicted["peak_memory_gib"] - predicted["memory_between_steps_gib"]
        ratio = held / predicted["predicted_activations_gib"]
        words = f"{held:.1f} GiB beside the weights, {predicted['predicted_activations_gib']:.1f} predicted"
        yield Goal(text, _state(abs(ratio - 1) <= 0.1), words, f"{100 * (ratio - 1):+.0f} %")


def _ours(results: Results, size: str, *, compiled: bool | None = None) -> list[Entry]:
    return [
        entry
        for entry in _timed(results, size)
        if entry["transformer"] == "ours" and compiled in (None, entry["compiled"])
    ]


def _peers(results: Results, size: str) -> list[Entry]:
    return [entry for entry in _timed(results, size) if entry["transformer"] != "ours"]


def _timed(results: Results, size: str) -> list[Entry]:
    """Of the group that is compared: float8 is another arithmetic, and another optimizer another step."""
    return [
        entry
        for entry in results.values()
        if (entry["group"], entry["size"]) == ("steps", size) and "seconds_per_step" in entry
    ]


def _fastest(entries: list[Entry]) -> Entry | None:
    return min(entries, key=lambda entry: entry["seconds_per_step"], default=None)


def _speed(entry: Entry | None) -> float | None:
    return None if entry is None else float(entry["tokens_per_second"])


def _memory(entry: Entry) -> bool:
    return entry.get("peak_memory_gib") is not None


def _ratio_goal(text: str, mine: float | None, theirs: float | None, wanted: float) -> Goal:
    if mine is None or theirs is None:
        return Goal(text, NOT_MEASURED)
    return Goal(text, _state(mine >= wanted * theirs), f"{mine / theirs:.2f} times")


def _state(is_met: bool) -> str:
    return "met" if is_met else "not met"
