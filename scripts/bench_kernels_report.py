"""What the measurements of `muybridge bench kernels` say: tables, the goals, and where the dispatch table is wrong."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
# Whom the tables compare with: the first of these that was measured.
BASELINES = ("cudnn", "flex", "compiled", "foreach", "math", "eager")
# Contestants that are a backend of the dispatch table, by the backend's name.
BACKENDS = {"own": "own", "cudnn": "cudnn", "reference": "eager"}
# A table line is only called wrong where another backend is faster by more than noise.
NOISE = 1.03
# Norm of the difference against the norm of the answer, in bf16.
LARGEST_DIFFERENCE = 0.02


def key(result: Result) -> tuple[str, ...]:
    """What a newer measurement of the same thing replaces."""
    return result["group"], result["problem"], result["contestant"], result["direction"]


def measured_in(result: Result) -> str:
    """The rate in its unit."""
    if "tflops" in result:
        return f"{result['tflops']:.4g} TFLOP/s"
    return f"{result['terabytes']:.3g} TB/s" if "terabytes" in result else ""


@dataclass(frozen=True)
class Goal:
    """A ratio to reach in every problem that it is about."""

    text: str
    least: float
    ratios: Callable[[Sequence[Result]], dict[str, float]]


def faster_than(
    peers: Sequence[str],
    directions: Sequence[str],
    *,
    group: str,
    contestant: str = "own",
    where: Callable[[Result], bool] = lambda result: True,
) -> Callable[[Sequence[Result]], dict[str, float]]:
    """Speed against the best of the peers that ran, over these directions together."""

    def ratios(results: Sequence[Result]) -> dict[str, float]:
        found = {}
        for problem, times in _times([r for r in results if r["group"] == group and where(r)], directions).items():
            best = min((times[peer] for peer in peers if peer in times), default=None)
            if best is not None and contestant in times:
                found[problem] = best / times[contestant]
        return found

    return ratios


def of_copy_bandwidth(direction: str, *, group: str) -> Callable[[Sequence[Result]], dict[str, float]]:
    """TB/s of the least traffic against those of the copy."""

    def ratios(results: Sequence[Result]) -> dict[str, float]:
        copied = [r["terabytes"] for r in results if r["group"] == "ceilings" and "terabytes" in r]
        ours = [r for r in results if (r["group"], r["contestant"], r["direction"]) == (group, "own", direction)]
        return {r["problem"]: r["terabytes"] / copied[0] for r in ours if copied and "terabytes" in r}

    return ratios


def of_dense_rate(direction: str) -> Callable[[Sequence[Result]], dict[str, float]]:
    """Our TFLOP/s under a sparse mask against ours without one, at the same lengths."""

    def ratios(results: Sequence[Result]) -> dict[str, float]:
        ours = [r for r in results if (r["contestant"], r["direction"]) == ("own", direction) and "tflops" in r]
        sizes = ("batch", "length", "head_width")
        dense = {tuple(r[s] for s in sizes): r["tflops"] for r in ours if r["group"] == "attention"}
        return {
            r["problem"]: r["tflops"] / dense[at]
            for r in ours
            if r["mask"].startswith("tiles") and (at := tuple(r[s] for s in sizes)) in dense
        }

    return ratios


def _attention(
    peers: Sequence[str], direction: str, head_width: int, contestant: str = "own"
) -> Callable[[Sequence[Result]], dict[str, float]]:
    """Dense attention from 9 000 tokens on."""

    def is_long(result: Result) -> bool:
        return result["head_width"] == head_width and result["length"] >= 9000

    return faster_than(peers, [direction], group="attention", contestant=contestant, where=is_long)


SDPA = ("cudnn", "flash", "efficient")
BOTH = ("forward", "backward")
GOALS = (
    Goal("cuDNN's speed, forward, head width 128", 0.78, _attention(["cudnn"], "forward", 128)),
    Goal("the best SDPA backend's speed, forward, head width 64", 0.8, _attention(SDPA, "forward", 64)),
    Goal("cuDNN's speed, deterministic backward, 128", 0.55, _attention(["cudnn"], "backward", 128)),
    Goal("SDPA flash's speed, deterministic backward, 128", 1.05, _attention(["flash"], "backward", 128)),
    Goal("cuDNN's speed, fused-dQ backward, 128", 0.7, _attention(["cudnn"], "backward", 128, "own_fused_dq")),
    Goal("FlexAttention's speed, masked", 1.15, faster_than(["flex"], BOTH, group="masks")),
    Goal("our dense rate, tiles at 10 and 20 %, forward", 0.85, of_dense_rate("forward")),
    Goal("our dense rate, tiles at 10 and 20 %, backward", 0.85, of_dense_rate("backward")),
    Goal("copy bandwidth, pointwise forward", 0.85, of_copy_bandwidth("forward", group="pointwise")),
    Goal("copy bandwidth, pointwise backward", 0.75, of_copy_bandwidth("backward", group="pointwise")),
    Goal("eager speed, pointwise", 5.0, faster_than(["eager"], BOTH, group="pointwise")),
    Goal("torch.compile's speed, pointwise", 1.2, faster_than(["compiled"], BOTH, group="pointwise")),
    Goal("copy bandwidth, optimizer", 0.9, of_copy_bandwidth("step", group="optimizer")),
    Goal("foreach speed, optimizer", 2.5, faster_than(["foreach"], ["step"], group="optimizer")),
)


def goal_lines(results: Sequence[Result]) -> list[str]:
    """One line a goal that something was measured for, with the problem that is furthest from it."""
    lines = []
    for goal in GOALS:
        ratios = goal.ratios(results)
        if ratios:
            worst = min(ratios, key=lambda problem: ratios[problem])
            outcome = "reached" if ratios[worst] >= goal.least else "MISSED"
            lines.append(
                f"goal {goal.least} x {goal.text}: {outcome}, {ratios[worst]:.2f} x at worst of {len(ratios)} ({worst})"
            )
    return lines


def disagreements(results: Sequence[Result]) -> list[str]:
    """The lines of kernels/dispatch.py's TABLE that the measurements speak against, forward and backward together."""
    lines = []
    agreed = 0
    for problem, times in _times(results, BOTH).items():
        entries = [result for result in results if result["problem"] == problem]
        chosen = next((result["chosen"] for result in entries if result.get("chosen")), None)
        backends = {backend: times[name] for backend, name in BACKENDS.items() if name in times}
        if chosen is None or not backends or (chosen in backends and len(backends) < 2):
            continue
        fastest = min(backends, key=lambda backend: backends[backend])
        op = "attention" if entries[0]["group"] in ("attention", "masks") else "pointwise"
        line = f'dispatch.TABLE, the line Rule("{op}", Backend.{chosen}, ...), for {problem}'
        if chosen not in backends:
            lines.append(f"{line}: that backend failed, {fastest} ran")
        elif backends[chosen] > NOISE * backends[fastest]:
            lines.append(f"{line}: {fastest} is {backends[chosen] / backends[fastest]:.2f} times as fast")
        else:
            agreed += 1
    return [*lines, f"dispatch.TABLE takes the fastest backend in {agreed} of {agreed + len(lines)} measured problems"]


def suspicions(results: Sequence[Result]) -> list[str]:
    """Answers that no rounding explains."""
    return [
        f"WRONG ANSWER? {r['problem']}: {r['contestant']} {r['direction']} differs by {r['difference']:.1e} from the first"
        for r in results
        if r.get("difference", 0.0) > LARGEST_DIFFERENCE or math.isnan(r.get("difference", 0.0))
    ]


def print_tables(results: Sequence[Result], console: Console) -> None:
    """A table a group: milliseconds, rates, and speed against the baseline."""
    for group in dict.fromkeys(result["group"] for result in results):
        table = Table(title=f"{group} (x: speed against the first of {', '.join(BASELINES)} that ran)")
        table.add_column("problem", overflow="fold")
        table.add_column("who", no_wrap=True)
        for direction in ("forward or all", "backward"):
            for column in (direction, "rate", "x"):
                table.add_column(column, justify="right", no_wrap=True)
        of_group = [result for result in results if result["group"] == group]
        for problem in dict.fromkeys(result["problem"] for result in of_group):
            entries = [result for result in of_group if result["problem"] == problem]
            for contestant in dict.fromkeys(result["contestant"] for result in entries):
                cells = [cell for one in _columns(entries) for cell in _cells(entries, contestant, one)]
                table.add_row(problem, contestant, *cells)
            table.add_section()
        console.print(table)


def _columns(entries: Iterable[Result]) -> Sequence[str]:
    """The directions of a problem; one that has a single one gets the first columns."""
    return [d for d in ("forward", "backward", "run", "step") if any(r["direction"] == d for r in entries)]


def _cells(entries: Sequence[Result], contestant: str, direction: str) -> tuple[str, str, str]:
    of_direction = {result["contestant"]: result for result in entries if result["direction"] == direction}
    result = of_direction.get(contestant)
    if result is None:
        return "", "", ""
    if "error" in result:
        return "failed", "", ""
    baseline = next((of_direction[b] for b in BASELINES if "milliseconds" in of_direction.get(b, {})), None)
    ratio = f"{baseline['milliseconds'] / result['milliseconds']:.2f}" if baseline else ""
    return f"{result['milliseconds']:.3f} ms", measured_in(result), ratio


def _times(results: Sequence[Result], directions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of all directions together, by problem and contestant, where every direction was measured."""
    found: dict[str, dict[str, float]] = {}
    for problem in dict.fromkeys(result["problem"] for result in results):
        times: dict[str, dict[str, float]] = {}
        for result in results:
            if result["problem"] == problem and result["direction"] in directions and "milliseconds" in result:
                times.setdefault(result["contestant"], {})[result["direction"]] = result["milliseconds"]
        found[problem] = {who: sum(t.values()) for who, t in times.items() if len(t) == len(directions)}
    return found
