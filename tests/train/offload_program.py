"""Runs the engine with its optimizer's states on the host, and without, and writes what it found as JSON for test_offload.py.

The ranks of each world are forks of this process, as in guard_program.py, whose steps and whose look at DeepSpeed it repeats.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from muybridge.tests.train.checkpoint_parts import save_at_once
from muybridge.tests.train.deepspeed_facts import check_contract
from muybridge.tests.train.forked_world import run_world
from muybridge.tests.train.guard_program import run_guarded_steps
from muybridge.tests.train.guarded_net import build, held, train_step, whole
from muybridge.train.ema import EMA
from muybridge.train.engine import Engine
from muybridge.train.engine_config import Precision
from muybridge.train.fragments import load_checkpoint

WORLDS = (1, 2)
STEPS, SAVED_AT = 5, 2
CASES = {"fp32-1": (1, Precision.fp32), "fp32-3": (3, Precision.fp32), "bf16-2": (2, Precision.bf16)}


def run(engine: Engine, ema: EMA, steps: range) -> list[float]:
    """Gradient norms of the steps."""
    norms = []
    for step in steps:
        norm, applied = train_step(engine, step)
        assert applied
        ema.update(step + 1)
        norms.append(norm)
    return norms


def end_of(engine: Engine, ema: EMA) -> list[torch.Tensor]:
    """What a checkpoint holds of a rank, then the weights of the forward; of a run that has ended."""
    tensors = held(engine, ema)
    engine.destroy()
    return tensors


def compare(zero: int, precision: Precision, folder: Path) -> dict[str, Any]:
    """Training on the host against training on the device; each continues what the other saved."""
    found: dict[str, Any] = {"norms": []}
    ends = []
    for on_host in (False, True):
        engine, ema, _ = build(zero, precision, on_host=on_host)
        norms = run(engine, ema, range(SAVED_AT))
        save_at_once(folder / f"{on_host}", step=SAVED_AT, engine=engine, ema=ema)
        with ema.swapped_in(), whole(engine) as parameters:
            seen = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
        first = next(iter(ema.averages.values()))
        found["a validation sees the average"] = all(
            torch.equal(
                average[part.offset : part.offset + part.numel].to(dtype).float(),
                seen[part.name].view(-1)[part.start : part.start + part.numel],
            )
            for dtype in [torch.bfloat16 if precision is Precision.bf16 else torch.float32]
            for shard, average in zip(engine.shards, first, strict=True)
            for part in shard.fragments
        )
        norms += run(engine, ema, range(SAVED_AT, STEPS))
        found["norms"].append(norms)
        ends.append(end_of(engine, ema))
    found["largest_difference"] = largest_difference(*ends)
    for on_host in (False, True):
        engine, ema, _ = build(zero, precision, on_host=True)
        (checkpoint,) = (folder / f"{on_host}").glob("step-*")
        load_checkpoint(checkpoint, engine=engine, ema=ema)
        run(engine, ema, range(SAVED_AT, STEPS))
        again = end_of(engine, ema)
        found["resumed from the host" if on_host else "resumed from the device"] = largest_difference(ends[1], again)
    return found


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    assert len(one) == len(other)
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(one, other, strict=True) if a.numel())


def run_elsewhere(root: Path) -> list[float]:
    """What one process saved on its host, continued by two at another stage without it: norms of the steps."""
    engine, ema, _ = build(3, Precision.fp32)
    (checkpoint,) = (root / "fp32-1-w1" / "True").glob("step-*")
    load_checkpoint(checkpoint, engine=engine, ema=ema)
    norms = run(engine, ema, range(SAVED_AT, STEPS))
    engine.destroy()
    return norms


def find(root: Path, world: int) -> dict[str, Any]:
    """What one rank has to tell."""
    names = list(CASES) if world == 2 else ["fp32-1"]
    found: dict[str, Any] = {name: compare(*CASES[name], root / f"{name}-w{world}") for name in names}
    if world == 2:
        found["elsewhere"] = run_elsewhere(root)
        for name, case in CASES.items():
            found[name]["steps"] = run_guarded_steps(*case, on_host=True)
            found[name]["contract"] = check_contract(*case, on_host=True)
    return found


def main(root: Path) -> None:
    for world in WORLDS:
        run_world(partial(find, root, world), world=world, out=root / f"w{world}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
