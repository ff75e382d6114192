"""Runs the engine at every ZeRO stage with steps that are called off or not finite, checks what it relies on in DeepSpeed, and
writes what it found as JSON, for test_guarded_steps.py and test_deepspeed_contract.py to judge.

Torch and DeepSpeed are imported once; the ranks of each world are forks of this process.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muybridge.data.batch import VideoBatch
from muybridge.tests.train.deepspeed_facts import check_contract
from muybridge.tests.train.forked_world import run_world
from muybridge.tests.train.guarded_net import (
    GLOBAL_BATCH,
    are_equal,
    build,
    held,
    inputs,
    local_places,
    sample_losses,
    train_step,
)
from muybridge.train.engine_config import Precision
from muybridge.train.guards import GuardConfig, SpikePolicy, StepGuard
from muybridge.train.model_hash import differing_ranks, model_fingerprint

WORLDS = (1, 2)
# What happens to the steps of `run_guarded_steps`; of those that are not finite, the loss is so on the last rank only.
PLAN = ("called off", "applied", "applied", "nan", "applied", "called off", "called off", "inf", "applied")
APPLIED = [step for step, what in enumerate(PLAN) if what == "applied"]
# And to those of `run_step_guard`, the first of which are needed to know what is usual.
SPIKE, WRONG_LOSS, WRONG_GRADIENT, GUARDED_STEPS = 55, 57, 59, 61


def run_guarded_steps(zero: int, precision: Precision, *, on_host: bool = False) -> dict[str, Any]:
    """The steps of PLAN, and beside them a run that has never seen those which were left out."""
    engine, ema, _ = build(zero, precision, on_host=on_host)
    found: dict[str, Any] = {"applied": [], "asked": [], "norms": [], "unchanged": []}
    for step, what in enumerate(PLAN):
        before = held(engine, ema)
        asked: list[float] = []

        def accept(norm: float, is_called_off: bool = what == "called off", asked: list[float] = asked) -> bool:
            asked.append(norm)
            return not is_called_off

        factor = {"nan": float("nan"), "inf": float("inf")}.get(what, 1.0)
        norm, applied = train_step(engine, step, accept, factor)
        found["unchanged"].append(are_equal(before, held(engine, ema)))
        if applied:
            ema.update(step + 1)
        found["applied"].append(applied)
        found["asked"].append(asked)
        found["norms"].append(norm if torch.tensor(norm).isfinite() else None)
    found["optimizer_steps"] = engine.optimizer_step_count()
    end = held(engine, ema)
    engine.destroy()
    engine, ema, _ = build(zero, precision, on_host=on_host)
    for step in APPLIED:
        train_step(engine, step)
        ema.update(step + 1)
    found["equals_a_run_without"] = are_equal(end, held(engine, ema))
    engine.destroy()
    return found


def check_fingerprints(zero: int, precision: Precision) -> dict[str, Any]:
    """Fingerprints of all ranks: at first, after a step, with one bit of one weight flipped on the last rank, and with its weights
    in another order."""
    engine, _, _ = build(zero, precision)

    def gather() -> list[int | None]:
        everyone: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, model_fingerprint(engine))
        return everyone

    found: dict[str, Any] = {"first": gather()}
    train_step(engine, 0)
    found["stepped"] = gather()
    if zero < 3 and dist.get_rank() == dist.get_world_size() - 1:
        weight = engine.module.get_parameter("wide.weight").detach().view(-1)
        weight.view(torch.int16 if precision is Precision.bf16 else torch.int32)[1234] ^= 1
    found["flipped"] = gather()
    if zero < 3 and dist.get_rank() == dist.get_world_size() - 1:
        engine.module.get_parameter("wide.weight").data = engine.module.get_parameter("wide.weight").flip(0)
    found["turned"] = gather()
    if zero < 3:
        found["differing"] = differing_ranks([value or 0 for value in found["flipped"]])
    engine.destroy()
    return found


def run_step_guard() -> dict[str, Any]:
    """Steps that a StepGuard judges; one has a spike, one a loss that is not finite though its gradient is, one neither finite."""
    engine, ema, _ = build(2, Precision.bf16)
    guard = StepGuard(GuardConfig(spike_policy=SpikePolicy.skip))
    is_last_rank = dist.get_rank() == dist.get_world_size() - 1
    found: dict[str, Any] = {"applied": [], "texts": {}}
    for step in range(GUARDED_STEPS):
        guard.begin_step(step, "5x8x8")
        micro_batches = local_places()
        for number, places in enumerate(micro_batches, start=1):
            losses = sample_losses(engine, inputs(step, places))
            is_last = number == len(micro_batches)
            shown = losses
            if is_last_rank and is_last:
                losses = losses * {SPIKE: 1000.0, WRONG_GRADIENT: float("nan")}.get(step, 1.0)
                shown = losses * float("inf") if step == WRONG_LOSS else losses
            guard.add(shown, torch.linspace(0.1, 0.9, GLOBAL_BATCH)[places], video_batch(step, places))
            engine.backward(losses.mean() / len(micro_batches), is_last=is_last)
        result = engine.step(1e-4, guard.accept)
        verdict = guard.end_step(applied=bool(result.applied))
        if result.applied:
            ema.update(step + 1)
        found["applied"].append(bool(result.applied))
        if verdict.text:
            found["texts"][step] = verdict.text
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (guard.state(), found))
    found["ranks_agree"] = all(other == everyone[0] for other in everyone)
    found["state_bytes"] = len(json.dumps(guard.state()))
    engine.destroy()
    return found


def video_batch(step: int, places: list[int]) -> VideoBatch:
    numbers = torch.tensor(places)
    return VideoBatch(
        step=step,
        step_samples=GLOBAL_BATCH,
        slots=numbers,
        datasets=torch.zeros(len(places), dtype=torch.int64),
        rows=100 + numbers,
        weights=torch.ones(len(places)),
        keys=[f"clip-{place}" for place in places],
        captions=[""] * len(places),
    )


def find() -> dict[str, Any]:
    """What one rank has to tell."""
    cases = {f"fp32-{zero}": (zero, Precision.fp32) for zero in range(4)}
    cases |= {f"bf16-{zero}": (zero, Precision.bf16) for zero in (1, 2, 3)}
    found: dict[str, Any] = {
        name: {
            "steps": run_guarded_steps(*case),
            "contract": check_contract(*case),
            "fingerprints": check_fingerprints(*case),
        }
        for name, case in cases.items()
    }
    return {**found, "guard": run_step_guard()}


def main(root: Path) -> None:
    for world in WORLDS:
        run_world(find, world=world, out=root / f"w{world}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
