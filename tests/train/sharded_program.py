"""Builds models whole and parameter by parameter, on two processes, and writes how they differ as JSON for test_sharded_model.py.

Called with a folder that has cases.json: by the name of a case, the overrides of its settings.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muybridge.models.blocks import DiTBlock
from muybridge.models.dit import DiT
from muybridge.models.dit_config import DiTConfig
from muybridge.tests.train.forked_world import run_world
from muybridge.tests.train.guarded_net import are_equal
from muybridge.train.config import TrainConfig, load_train_config
from muybridge.train.drawn_weights import build_one_by_one
from muybridge.train.engine import Engine, shard_parameter
from muybridge.train.engine_config import EngineConfig
from muybridge.train.flat_shards import full_shape
from muybridge.train.optimizer import build_optimizer
from muybridge.train.sharded_model import build_model
from muybridge.train.tasks import TextToVideoTask
from muybridge.train.trained_weights import prepare_weights

CPU = torch.device("cpu")
WORLD, STEPS = 2, 2
# 52 M parameters, the largest of 3.5 M.
LARGE = DiTConfig(
    in_channels=4, out_channels=4, num_layers=5, dim=768, num_attention_heads=12, ffn_dim=3072, text_dim=64
)


def whole_model(task: TextToVideoTask, config: TrainConfig) -> tuple[nn.Module, dict[str, Any]]:
    model = task.build_model()
    return model, prepare_weights(model, config, None)


def train(config: TrainConfig, model: nn.Module) -> list[Tensor]:
    """What a rank holds in an engine at once, and after steps on random latents."""
    engine = Engine(
        model,
        build_optimizer(model, config.optimizer),
        config=config.deepspeed,
        micro_batch=1,
        gradient_clipping=1.0,
        leaf_modules=(DiTBlock,),
    )
    held = [shard.master.detach().clone() for shard in engine.shards]
    generator = torch.Generator().manual_seed(dist.get_rank())
    channels = config.model.in_channels
    text: Any = torch.randint(1, 200, (1, config.text.max_tokens, 3), generator=generator)
    for _ in range(STEPS):
        latents = torch.randn(1, channels, 2, 4, 4, generator=generator)
        loss = (engine(latents, torch.full((1,), 500.0), text).float() - latents).square().mean()
        engine.backward(loss, is_last=True)
        held.append(torch.as_tensor(engine.step(1e-2).grad_norm))
    held += [shard.master.detach().clone() for shard in engine.shards]
    # What is frozen is in no shard.
    held += [getattr(parameter, "ds_tensor", parameter).detach().clone() for parameter in model.parameters()]
    engine.destroy()
    return held


def compare(overrides: list[str]) -> dict[str, Any]:
    """A whole model against one that was built parameter by parameter."""
    config = load_train_config(overrides)
    torch.manual_seed(config.seed)
    model, facts = whole_model(TextToVideoTask(config, CPU), config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    after = torch.rand(4)
    expected = train(config, model)

    torch.manual_seed(config.seed)
    model, built_facts = build_model(TextToVideoTask(config, CPU), config, None)
    found: dict[str, Any] = {
        "generator": torch.equal(torch.rand(4), after),
        "facts": built_facts == facts,
        "shapes": {name: full_shape(parameter) for name, parameter in model.named_parameters()} == shapes,
        "elements": sum(parameter.numel() for parameter in model.parameters()),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "trained": sum(parameter.requires_grad for parameter in model.parameters()),
    }
    found["values"] = are_equal(expected, train(config, model))
    return found


def peak_bytes() -> dict[str, int]:
    """The most memory that building a large model takes at ZeRO 3 in bf16, beyond what was there before; and what it has."""

    def place(parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.to(torch.bfloat16)
        shard_parameter(parameter, EngineConfig(zero=3))

    build_one_by_one(lambda: nn.Linear(3, 3), CPU, place)  # loads what is loaded when it is first used
    # Resets the peak that the kernel keeps.
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    model = build_one_by_one(lambda: DiT(LARGE), CPU, place)
    peak = _kilobytes("VmHWM")
    return {
        "peak": 1024 * (peak - before),
        "pieces": sum(parameter.ds_tensor.nbytes for parameter in model.parameters()),  # type: ignore[attr-defined]
        "largest": max(4 * full_shape(parameter).numel() for parameter in model.parameters()),
        "whole": sum(4 * full_shape(parameter).numel() for parameter in model.parameters()),
    }


def _kilobytes(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1])


def find(root: Path) -> dict[str, Any]:
    """What one rank has to tell."""
    found: dict[str, Any] = {"peak": peak_bytes()}
    for name, overrides in json.loads((root / "cases.json").read_text()).items():
        found[name] = compare(overrides)
    return found


def main(root: Path) -> None:
    run_world(partial(find, root), world=WORLD, out=root / "found.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
