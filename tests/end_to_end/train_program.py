"""Trains several configured runs one after the other in one process group, and writes what became of each as JSON.

Between the command line and the trainer there is one function; its exit codes are tested apart, so that not every run has to
pay for a start of torch and DeepSpeed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muybridge.train.config import TrainConfig, load_train_config
from muybridge.train.engine import initialise_distributed
from muybridge.train.engine_config import EngineConfig
from muybridge.train.exit_codes import exit_process
from muybridge.train.guards import Diverged
from muybridge.train.life import Asked
from muybridge.train.memory import bytes_per_process
from muybridge.train.one_attempt import OneAttempt
from muybridge.train.trainer import Trainer


def held_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of this process by what they serve, each storage counted once, for the first who holds it."""
    engine = trainer.engine
    weights = [getattr(p, "ds_tensor", p.data) for p in engine.module.parameters()]
    # ZeRO-3 keeps small weights gathered as well; that is its cache.
    optimizer = [shard.master for shard in engine.shards]
    optimizer += [value for shard in engine.shards for value in shard.optimizer_state.values() if value.ndim]
    seen: set[int] = set()

    def count(tensors: list[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    averages = [tensor for tensors in trainer.ema.averages.values() for tensor in tensors]
    return {"weights": count(weights), "optimizer": count(optimizer), "EMA": count(averages)}


def train(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What became of one run."""
    attempt = OneAttempt(config)
    torch.manual_seed(123)  # what came before must not matter
    try:
        trainer = Trainer(config, device, attempt)
        try:
            code = trainer.run()
            sizes = {"held": held_bytes(trainer), "estimated": bytes_per_process(config, dist.get_world_size())}
            return {"code": code, **sizes}
        finally:
            trainer.engine.destroy()
    except (ValueError, Diverged) as error:
        return {type(error).__name__: str(error)}
    finally:
        attempt.end(0, "", asked=Asked.scheduler)


def main(plan: Path, out: Path) -> None:
    device = initialise_distributed(EngineConfig())
    found: dict[str, dict[str, Any]] = {}
    for name, overrides in json.loads(plan.read_text()).items():
        try:
            config = load_train_config(overrides)
        except ValueError as error:
            found[name] = {"ValueError": str(error)}
            continue
        found[name] = train(config, device)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found, indent=1))
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
