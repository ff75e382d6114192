"""Trains a tiny transformer at every ZeRO stage, compiled and not, after a warm-up and without one; for test_warm_up.py to judge.

One start of torch and DeepSpeed costs seconds, so everything happens in one pair of forked processes.
"""

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from muybridge.data.buckets import Bucket
from muybridge.data.config import Access, DataConfig
from muybridge.models.blocks import DiTBlock
from muybridge.models.dit import DiTConfig
from muybridge.models.text import TextEncoderConfig, TextEncoderKind
from muybridge.models.text_to_video import TextToVideoModel
from muybridge.tests.train.forked import start
from muybridge.train.activations import ActivationPolicy, ActivationsConfig, set_activation_policy
from muybridge.train.compile_blocks import CompilationCount, CompileConfig, compile_blocks
from muybridge.train.config import TrainConfig
from muybridge.train.engine import Engine
from muybridge.train.engine_config import EngineConfig, Precision
from muybridge.train.optimizer import OptimizerConfig, build_optimizer
from muybridge.train.tasks import TextToVideoTask
from muybridge.train.warm_up import ghosts, warm_up

BUCKETS = [Bucket(5, 16, 16, global_batch=2, micro_batch=1), Bucket(5, 16, 32, global_batch=2, micro_batch=1)]
# Name: ZeRO stage, compiled, warmed up.
CASES = {
    **{f"{zero}-eager": (zero, False, False) for zero in range(4)},
    **{f"{zero}-warm": (zero, False, True) for zero in range(4)},
    **{f"{zero}-compiled": (zero, True, True) for zero in (1, 2, 3)},
}


def settings(zero: int) -> TrainConfig:
    sizes = {"in_channels": 16, "out_channels": 16, "dim": 32, "num_attention_heads": 2, "ffn_dim": 64, "text_dim": 16}
    return TrainConfig(
        model=DiTConfig(num_layers=2, freq_dim=16, patch_size=[1, 2, 2], **sizes),
        text=TextEncoderConfig(kind=TextEncoderKind.bytes, dim=16, num_heads=2, max_tokens=4),
        data=DataConfig(access=Access.latents, frames=5, height=16, width=16),
        deepspeed=EngineConfig(zero=zero, precision=Precision.fp32),
        micro_batch=1,
    )


def run(zero: int, compiled: bool, warm: bool, rank: int) -> dict[str, Any]:
    config, activations = settings(zero), ActivationsConfig(ActivationPolicy.block)
    task = TextToVideoTask(config, torch.device("cpu"))
    torch.manual_seed(0)
    model = task.build_model()
    assert isinstance(model, TextToVideoModel)
    dit = model.transformer
    torch.nn.init.normal_(dit.proj_out.weight, std=0.1)
    set_activation_policy(dit, activations)
    compile_blocks(dit, CompileConfig(enabled=compiled), activations, shapes=len(BUCKETS))
    engine = Engine(
        model,
        build_optimizer(model, OptimizerConfig(lr=1e-2)),
        config=config.deepspeed,
        micro_batch=1,
        gradient_clipping=1.0,
        leaf_modules=(DiTBlock,),
    )
    random_state = torch.get_rng_state()
    prompts = int(zero == 1)
    shapes = list(warm_up(engine, task, BUCKETS, validates=True, prompts=prompts)) if warm else []
    found: dict[str, Any] = {"shapes": shapes, "drew": not torch.equal(random_state, torch.get_rng_state())}
    count = CompilationCount()
    found["losses"], found["norms"] = [], []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        batch = ghosts(task, BUCKETS[step % 2])
        assert batch.latents is not None
        latents = torch.randn(batch.latents.shape, generator=generator).bfloat16()
        batch = replace(batch, step=step, slots=torch.tensor([rank]), captions=["a red dog"], latents=latents)
        loss = task.losses(engine, batch).total.mean()
        engine.backward(loss, is_last=True)
        found["norms"].append(float(engine.step(1e-2).grad_norm))
        found["losses"].append(loss.item())
    with torch.no_grad():
        task.losses(engine, ghosts(task, BUCKETS[1]), purpose="validation/")
    return {**found, "late": count.take()}


def be_rank(rank: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.compile = partial(torch.compile, backend="aot_eager")
    found = {name: run(*case, rank) for name, case in CASES.items()}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    group = start(be_rank, Path(sys.argv[1]))
    while not group.has_ended():
        time.sleep(0.1)
    print(json.dumps(group.facts()))
