"""Trains a small network in one process through every ZeRO stage with torch's AdamW and with ours, whose kernel runs in Triton's
interpreter, and writes how they differ as JSON for test_shard_adamw.py to judge."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muybridge.kernels.dispatch import INTERPRETED, Backend, forced
from muybridge.tests.train.checkpoint_parts import save_at_once
from muybridge.train.ema import EMA, EMAConfig, average_name
from muybridge.train.engine import Engine, initialise_distributed
from muybridge.train.engine_config import EngineConfig, Precision
from muybridge.train.exit_codes import exit_process
from muybridge.train.fragments import load_checkpoint
from muybridge.train.optimizer import PENDING_AVERAGE, OptimizerConfig, build_optimizer

STEPS, SAVED_AT, CALLED_OFF, POISONED = 7, 3, 4, 5
BATCH, CLIPPING, DECAYS = 8, 0.1, [0.8, 0.5]
EPS = 1e-4  # Adam's division by the root of a gradient near 0 would blow rounding up


def build(case: str, backend: Backend, *, clipping: float = CLIPPING) -> tuple[Engine, EMA]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 131), nn.Tanh(), nn.LayerNorm(131), nn.Linear(131, 3))
    with forced(pointwise=backend):
        optimizer = build_optimizer(net, OptimizerConfig(eps=EPS, weight_decay=0.3))
    precision, zero = case.split("-")
    config = EngineConfig(zero=int(zero), precision=Precision(precision))
    engine = Engine(net, optimizer, config=config, micro_batch=BATCH, gradient_clipping=clipping)
    return engine, EMA(engine, EMAConfig(DECAYS))


def run(engine: Engine, ema: EMA, steps: range) -> list[float]:
    """The gradient norms of the steps that were applied; every step has a learning rate of its own, one has a NaN, and one is
    called off while the average of the step before is pending."""
    norms = []
    for step in steps:
        x = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))
        x = x.to(next(engine.module.parameters()).dtype)
        loss = (engine(x) - x[:, :3].sin()).square().mean()
        engine.backward(loss * float("nan") if step == POISONED else loss, is_last=True)
        result = engine.step(1e-2 / (1 + step), partial(accept_unless, step == CALLED_OFF))
        assert result is not None
        assert result.applied == (step not in (CALLED_OFF, POISONED))
        if result.applied:
            ema.update(step + 1)
            norms.append(float(result.grad_norm))
    return norms


def accept_unless(is_called_off: bool, norm: float) -> bool:
    return not is_called_off


def has_pending(engine: Engine) -> bool:
    return all(PENDING_AVERAGE in shard.optimizer_state for shard in engine.shards)


def pieces(engine: Engine, tensors: list[Tensor]) -> list[Tensor]:
    """Copies of what shards hold of parameters, without the padding between, which ZeRO-3 leaves uninitialised."""
    return [
        tensor.view(-1)[fragment.offset : fragment.offset + fragment.numel].clone()
        for shard, tensor in zip(engine.shards, tensors, strict=True)
        for fragment in shard.fragments
    ]


def held(engine: Engine, ema: EMA) -> dict[str, list[Tensor]]:
    """What a checkpoint would hold."""
    found = {name: pieces(engine, tensors) for name, tensors in ema.averages.items()}
    found["master"] = pieces(engine, [shard.master for shard in engine.shards])
    for name in ("exp_avg", "exp_avg_sq"):
        found[name] = pieces(engine, [shard.optimizer_state[name] for shard in engine.shards])
    return {**found, "step": [torch.tensor(engine.optimizer_step_count())]}


def distances(ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]]) -> dict[str, float]:
    """Largest difference of each kind, relative to the largest element of its tensor."""
    return {
        name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours[name], theirs[name], strict=True))
        for name in theirs
    }


def compare(case: str, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ends, norms, saved = {}, {}, {}
    for backend in (Backend.reference, Backend.own):
        engine, ema = build(case, backend)
        norms[backend] = run(engine, ema, range(SAVED_AT))
        folder = root / f"{case}-{backend.value}"
        saved[backend] = save_at_once(folder, step=SAVED_AT, engine=engine, ema=ema)
        norms[backend] += run(engine, ema, range(SAVED_AT, STEPS))
        found[f"{backend.value}_is"] = type(
            getattr(engine._engine.optimizer, "optimizer", engine._engine.optimizer)
        ).__name__
        found[f"{backend.value}_defers"] = has_pending(engine)
        ends[backend] = held(engine, ema)
        with ema.swapped_in():
            swapped = pieces(engine, [shard.master for shard in engine.shards])
        found[f"{backend.value}_swaps"] = all(map(torch.equal, swapped, ends[backend][average_name(DECAYS[0])]))
        found[f"{backend.value}_swaps_back"] = not any(distances(held(engine, ema), ends[backend]).values())
        engine.destroy()
    found["distances"] = distances(ends[Backend.own], ends[Backend.reference])
    found["norms"] = [norms[Backend.own], norms[Backend.reference]]
    found["resumed"] = {}
    for source in saved:  # each continues what it saved itself and what the other one saved
        for target in saved:
            engine, ema = build(case, target)
            load_checkpoint(saved[source], engine=engine, ema=ema)
            run(engine, ema, range(SAVED_AT, STEPS))
            found["resumed"][f"{source.value} to {target.value}"] = distances(held(engine, ema), ends[target])
            engine.destroy()
    engine, ema = build(case, Backend.own, clipping=0.0)
    run(engine, ema, range(1))
    free = held(engine, ema)
    engine.destroy()
    engine, ema = build(case, Backend.reference, clipping=0.0)
    run(engine, ema, range(1))
    found["without clipping"] = distances(free, held(engine, ema))
    engine.destroy()
    return found


def main(root: Path) -> None:
    assert INTERPRETED
    initialise_distributed(EngineConfig(zero=1, precision=Precision.fp32))
    torch.set_num_threads(1)
    found = {case: compare(case, root) for case in ("fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-1")}
    (root / "found.json").write_text(json.dumps(found))
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
