"""Trains a small DiT with float8 in two processes through the ZeRO stages, saves with float8 and goes on without, and writes what
happened as JSON, for test_fp8.py to judge."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torchao.float8  # noqa: F401 (so that the forks have it)

from muybridge.models.dit import DiT, DiTConfig
from muybridge.tests.train.checkpoint_parts import save_at_once
from muybridge.tests.train.forked import start
from muybridge.train.activations import ActivationPolicy, ActivationsConfig, set_activation_policy
from muybridge.train.ema import EMA, EMAConfig
from muybridge.train.engine import Engine
from muybridge.train.engine_config import EngineConfig, Precision
from muybridge.train.fp8 import Fp8Config, Fp8Recipe, use_fp8
from muybridge.train.fragments import load_checkpoint
from muybridge.train.optimizer import OptimizerConfig, build_optimizer

STEPS, MICRO_BATCH, LR = 4, 2, 1e-3
SIZES = DiTConfig(
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_attention_heads=2,
    dim=64,
    ffn_dim=128,
    freq_dim=32,
    text_dim=32,
    patch_size=[1, 2, 2],
)


def build(zero: int, recipe: Fp8Recipe, precision: Precision = Precision.fp32) -> tuple[Engine, EMA]:
    torch.manual_seed(0)
    dit = DiT(SIZES)
    use_fp8(dit, Fp8Config(recipe, min_width=32))
    if zero == 3:
        set_activation_policy(dit, ActivationsConfig(ActivationPolicy.block))
    optimizer = build_optimizer(dit, OptimizerConfig(lr=LR))
    config = EngineConfig(zero=zero, precision=precision)
    engine = Engine(dit, optimizer, config=config, micro_batch=MICRO_BATCH, gradient_clipping=1.0)
    return engine, EMA(engine, EMAConfig([0.9]))


def run(engine: Engine, ema: EMA, steps: range) -> list[float]:
    """Mean losses over both ranks, each of which has clips of its own."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        x, target = torch.randn(2, MICRO_BATCH, 4, 3, 6, 10, generator=generator)  # 45 tokens, which 16 does not divide
        text = torch.randn(MICRO_BATCH, 5, 32, generator=generator)
        timestep = 1000 * torch.rand(MICRO_BATCH, generator=generator)
        dtype = next(engine.module.parameters()).dtype
        loss = (engine(x.to(dtype), timestep, text.to(dtype)).float() - target - x).square().mean()
        total = loss.detach() / 2
        engine.backward(loss, is_last=True)
        assert engine.step(LR).applied
        ema.update(step + 1)
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def train(rank: int, folder: Path) -> None:
    """One rank: every stage, then a checkpoint that a run with float8 writes and one without reads."""
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.init_distributed(dist_init_required=False)
    found: dict[str, Any] = {}
    for zero, recipe, precision in (
        (1, Fp8Recipe.off, Precision.fp32),
        (1, Fp8Recipe.tensorwise, Precision.fp32),
        (2, Fp8Recipe.tensorwise, Precision.fp32),
        (3, Fp8Recipe.tensorwise, Precision.fp32),
        (2, Fp8Recipe.rowwise, Precision.bf16),
        (3, Fp8Recipe.rowwise, Precision.bf16),
    ):
        engine, ema = build(zero, recipe, precision)
        found[f"{recipe.name} {precision.name} {zero}"] = run(engine, ema, range(STEPS))
        engine.destroy()

    engine, ema = build(2, Fp8Recipe.tensorwise)
    run(engine, ema, range(2))
    checkpoint = save_at_once(folder / "checkpoints", step=2, engine=engine, ema=ema)
    held = [shard.master.clone() for shard in engine.shards]
    found["goes on with"] = run(engine, ema, range(2, STEPS))
    engine.destroy()
    engine, ema = build(2, Fp8Recipe.off)
    load_checkpoint(checkpoint, engine=engine, ema=ema)
    found["is taken up"] = all(torch.equal(shard.master, old) for shard, old in zip(engine.shards, held, strict=True))
    found["goes on without"] = run(engine, ema, range(2, STEPS))
    engine.destroy()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    group = start(train, Path(sys.argv[1]) / "ranks")
    while not group.has_ended():
        time.sleep(0.05)
    print(*group.facts()["said"], sep="\n")
    sys.stdout.flush()
    os._exit(int(any(group.facts()["codes"])))
