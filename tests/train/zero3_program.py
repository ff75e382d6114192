"""Trains a small DiT on four processes, as two nodes of two, with ZeRO 2 and in all the ways of ZeRO 3, for test_zero3.py."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from muybridge.models.blocks import DiTBlock
from muybridge.models.dit import DiT
from muybridge.models.dit_config import DiTConfig
from muybridge.tests.train.forked_world import run_world
from muybridge.train.activations import ActivationPolicy, ActivationsConfig, set_activation_policy
from muybridge.train.ema import EMA, EMAConfig
from muybridge.train.engine import Engine, shard_parameter
from muybridge.train.engine_config import EngineConfig, Precision
from muybridge.train.flat_shards import fill
from muybridge.train.optimizer import OptimizerConfig, build_optimizer

WORLD, STEPS, VALIDATED_AT, TIMEOUT_SECONDS = 4, 3, 1, 4321
SIZES = DiTConfig(in_channels=4, out_channels=4, num_layers=2, dim=64, num_attention_heads=2, ffn_dim=96, text_dim=16)
# The stage, whether blocks are leaves, are computed again, and how many processes a node has. The last, since its groups stay.
CASES: dict[str, tuple[int, bool, ActivationPolicy, int | None]] = {
    "zero2": (2, False, ActivationPolicy.none, None),
    "zero3": (3, False, ActivationPolicy.none, None),
    "leaves": (3, True, ActivationPolicy.none, None),
    "leaves, recomputed": (3, True, ActivationPolicy.block, None),
    "nodes": (3, True, ActivationPolicy.none, 2),
    "nodes, recomputed": (3, True, ActivationPolicy.block, 2),
}


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 2, 4, 4, generator=generator)
    return latents, 1000 * torch.rand(2, generator=generator), torch.randn(2, 3, 16, generator=generator)


def train(zero: int, leaves: bool, policy: ActivationPolicy, node_shards: int | None) -> dict[str, Any]:
    """Losses and norms, what a validation in the middle says, and the weights at the end as this rank holds them."""
    torch.manual_seed(0)
    dit: nn.Module = DiT(SIZES)
    set_activation_policy(dit, ActivationsConfig(policy=policy))
    config = EngineConfig(zero=zero, precision=Precision.fp32, node_shards=node_shards)
    if node_shards is not None:
        for parameter in dit.parameters():  # split with other values, and then given theirs, as by `init_from`
            value = parameter.detach().clone()
            parameter.data.zero_()
            shard_parameter(parameter, config)
            fill(parameter, value)
    optimizer = build_optimizer(dit, OptimizerConfig(eps=1e-4))
    leaf_modules = (DiTBlock,) if leaves else ()
    engine = Engine(dit, optimizer, config=config, micro_batch=2, gradient_clipping=0.1, leaf_modules=leaf_modules)
    ema = EMA(engine, EMAConfig([0.5]))
    found: dict[str, Any] = {"losses": [], "norms": [], "validation": []}
    for step in range(STEPS):
        latents, timestep, text = inputs(10 * step + dist.get_rank())
        loss = (engine(latents, timestep, text) - latents.sin()).square().mean()
        engine.backward(loss, is_last=True)
        # A step makes them old.
        found["second copies"] = sum(
            getattr(each, "ds_secondary_tensor", None) is not None for each in dit.parameters()
        )
        found["norms"].append(float(engine.step(1e-2).grad_norm))
        ema.update(step + 1)
        found["losses"].append(loss.item())
        if step == VALIDATED_AT:
            for _ in range(2):  # the second gathers from where the first left its weights
                with ema.swapped_in(), torch.no_grad():
                    engine.eval()
                    found["validation"].append(engine(*inputs(99)).double().norm().item())
                    engine.train()
    weights = {
        part.name: shard.master[part.offset :][: part.numel] for shard in engine.shards for part in shard.fragments
    }
    sums = {name: piece.double().sum().item() for name, piece in weights.items()}
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, sums)
    found["weights"] = {name: sum(part.get(name, 0.0) for part in everyone) for name in engine.parameter_shapes}
    engine.destroy()
    return found


def find() -> dict[str, Any]:
    """What one rank has to tell."""
    found: dict[str, Any] = {name: train(*case) for name, case in CASES.items()}
    made_later = (groups._get_data_parallel_group(), groups._get_zero_param_intra_parallel_group())
    found["limits"] = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in made_later]
    return found


def main(root: Path) -> None:
    run_world(find, world=WORLD, out=root / "found.json", timeout_seconds=TIMEOUT_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
